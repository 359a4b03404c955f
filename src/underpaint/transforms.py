"""Images as anybody has them, files, PIL images or arrays, to what an encoder takes: as those that it is judged on."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tifffile
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from underpaint.data import Scaling, Unreadable, centre_boxes, crop_resize
from underpaint.data.decode import MAX_PIXELS
from underpaint.data.images import Decoding, decode_as, resize
from underpaint.errors import InputError
from underpaint.patches import Standardize

Picture: TypeAlias = str | Path | Image.Image | np.ndarray
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # of PIL, that a PNG keeps as they are
NUMBERS = ("I", "I;16", "I;16B", "I;16L", "F")  # of PIL, that are arrays of one channel


def centred(data: bytes, scaling: Scaling, size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> Tensor:
    """[1, c, height, width] in [0, 1] of an image file: its short side resized so that `size` fits, then the centre.

    As an evaluation reads its images: held with a short side of at most twice that of `size` first.

    Raises:
        Unreadable: as `decode`, or of a type that the scaling was not measured on.
    """
    limit = 2 * min(size)
    array = decode_as(data, Decoding(len(scaling.low), max_pixels, limit, scaling), limit)
    if (short := min(array.shape[:2])) > limit:
        array = resize(array, (round(array.shape[0] * limit / short), round(array.shape[1] * limit / short)))
    whole = torch.from_numpy(array).permute(2, 0, 1)[None]
    boxes = torch.from_numpy(centre_boxes([array.shape[:2]], size))
    return scaling.unit(crop_resize(whole, boxes, torch.zeros(1, dtype=torch.bool), size))


@dataclass(frozen=True)
class Transform:
    """What an encoder asks of its images.

    Attributes:
        mean, std: by channel, of images in [0, 1].
        size: height and width in pixels.
    """

    scaling: Scaling
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]

    def unit(self, images: Picture | Sequence[Picture]) -> Float[Tensor, "b c height width"]:
        """In [0, 1].

        Raises:
            InputError: one cannot be read, or has other channels or another type than the encoder's.
        """
        several = [images] if isinstance(images, str | Path | Image.Image | np.ndarray) else list(images)
        if not several:
            raise InputError("no images: give paths, PIL images or arrays")
        made = []
        for number, image in enumerate(several):
            try:
                made.append(self.unit_of(encoded(image)))
            except Unreadable as error:
                name = image if isinstance(image, str | Path) else f"image {number}"
                raise InputError(f"{name}: {error}") from error
        return torch.cat(made)

    def unit_of(self, data: bytes) -> Float[Tensor, "1 c height width"]:
        """One image file in [0, 1]; raises Unreadable."""
        return centred(data, self.scaling, self.size)

    def __call__(self, images: Picture | Sequence[Picture]) -> Float[Tensor, "b c height width"]:
        """Standardised; raises as `unit`."""
        return Standardize(list(self.mean), list(self.std))(self.unit(images))


def encoded(image: Picture) -> bytes:
    """An image as the bytes of a file, so that there is one way to read all; of an array [h, w] or [h, w, c] as TIFF, in which
    four channels of whole numbers are colours and alpha.

    Raises:
        InputError: no such file, or an array of another form or type.
    """
    if isinstance(image, str | Path):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise InputError(f"{image}: {error.strerror}; give image files") from error
    file = io.BytesIO()
    if isinstance(image, Image.Image):
        turned = ImageOps.exif_transpose(image)
        if turned.mode not in NUMBERS:
            kept = turned if turned.mode in PNG_MODES else turned.convert("RGB")
            kept.save(file, "PNG", compress_level=0, exif=b"")
            return file.getvalue()
        image = np.asarray(turned)
        if image.dtype == np.int32 and image.min(initial=0) >= 0 and image.max(initial=0) < 2**16:
            image = image.astype(np.uint16)
    array = image[..., None] if image.ndim == 2 else image
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.ndim != 3 or 0 in array.shape or array.dtype not in (np.uint8, np.uint16, np.float32):
        shape = "x".join(map(str, array.shape))
        raise InputError(f"an array of {shape} {array.dtype}; give [h, w] or [h, w, c] of uint8, uint16 or float32")
    colour = array.shape[2] == 3 or (array.shape[2] == 4 and array.dtype != np.float32)
    said: dict[str, Any] = {"photometric": "rgb" if colour else "minisblack"}
    if array.shape[2] > 1:
        said["planarconfig"] = "contig"
    if colour and array.shape[2] == 4:
        said["extrasamples"] = ["unassalpha"]
    tifffile.imwrite(file, array[..., 0] if array.shape[2] == 1 else array, metadata=None, **said)
    return file.getvalue()
