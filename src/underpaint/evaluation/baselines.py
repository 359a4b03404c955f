"""What images give without any network: the baselines that a pretrained encoder must beat."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from underpaint.errors import InputError
from underpaint.evaluation.results import Probe
from underpaint.evaluation.splits import Labels, as_labels

RAW_SIDE = 32  # pixels
ORIENTATIONS = 9  # of HOG, over 180 degrees
HOG_CHUNK = 2**22  # pixels at once


def raw_pixels(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    """Pixels as features: every image reduced (antialiased, aspect kept) to at most 32 pixels a side, and flattened."""
    height, width = images.shape[-2:]
    scale = min(1.0, RAW_SIDE / max(height, width))
    if scale < 1:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    return images.flatten(1)


def hog(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    """Histograms of oriented gradients (Dalal and Triggs 2005) of the luma of images in [0, 1].

    What `skimage.feature.hog` gives with its defaults but for the cells, and a test says so; a batch at a time. Cells
    are at least 4 pixels and at most 8 a side; 9 orientations, blocks of 2 x 2 cells, L2-Hys. The luma of other than
    3 channels is their mean. Raises InputError for images below 4 pixels a side.
    """
    height, width = images.shape[-2:]
    if min(height, width) < 4:
        raise InputError(f"HOG needs images of at least 4 x 4 pixels; got {height} x {width}")
    chunk = max(1, HOG_CHUNK // (height * width))
    return torch.cat([_hog_chunk(part) for part in images.split(chunk)])


def hog_cell(side: int) -> int:
    """Pixels of a cell along a side: 8 cells or fewer, of at least 4 pixels."""
    return max(4, -(-side // 8))


def luma(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n h w"]:
    """ITU-R 601 luma of three channels, else the mean of the channels; float64."""
    channels = images.shape[1]
    weights = [0.299, 0.587, 0.114] if channels == 3 else [1 / channels] * channels
    return torch.einsum("nchw,c->nhw", images.double(), images.new_tensor(weights, dtype=torch.float64))


def majority(train_y: Labels, test_y: Labels) -> Probe:
    """Always say the most frequent class of train (the smallest label among equals)."""
    train, test = as_labels(train_y), as_labels(test_y)
    if not len(train) or not len(test):
        raise InputError(f"the majority needs labels in both parts; train has {len(train)}, test has {len(test)}")
    classes, counts = np.unique(train, return_counts=True)
    return Probe.of(test == classes[counts.argmax()], {})


def _hog_chunk(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    grey = luma(images)
    height, width = grey.shape[-2:]
    rows, columns = torch.zeros_like(grey), torch.zeros_like(grey)  # the outermost gradients stay 0
    rows[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    columns[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
    magnitude = torch.hypot(rows, columns)
    degrees = torch.rad2deg(torch.atan2(rows, columns)) % 180
    # the remainder of a tiny negative angle rounds to 180, which is 0 again (scikit-image counts it nowhere)
    bins = (degrees / (180 / ORIENTATIONS)).long() % ORIENTATIONS
    votes = grey.new_zeros(len(grey), ORIENTATIONS, height, width)
    votes.scatter_(1, bins[:, None], magnitude[:, None])
    cells = F.avg_pool2d(votes, (hog_cell(height), hog_cell(width)))  # drops what does not fill a cell
    tall, wide = min(2, cells.shape[2]), min(2, cells.shape[3])
    blocks = cells.unfold(2, tall, 1).unfold(3, wide, 1)  # [n, orientation, row, column, tall, wide]
    blocks = blocks.permute(0, 2, 3, 4, 5, 1).flatten(3)
    blocks = _unit(_unit(blocks).clamp(max=0.2))
    return blocks.flatten(1).float()


def _unit(blocks: Float[Tensor, "n r c d"]) -> Float[Tensor, "n r c d"]:
    return blocks / (blocks.square().sum(-1, keepdim=True) + 1e-10).sqrt()
