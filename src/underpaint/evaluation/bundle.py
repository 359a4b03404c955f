"""What is judged: an encoder, the transform of its images, and the same choices untrained."""

import copy
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from timm.layers import DropPath
from timm.models import get_pretrained_cfg, is_model
from torch import Tensor

from underpaint.backbones import Backbone, create_arguments, describe_encoder, from_arguments, load_encoder
from underpaint.backbones.build import default_size, with_drop_path
from underpaint.backbones.norms import settled
from underpaint.backbones.weights import Found, fill, is_run, network_for, read_start, start_from
from underpaint.computing import lay_out
from underpaint.console import say
from underpaint.data import ImageSet, Indices, Scaling, Source, load_images, settle_scaling, stored_scaling
from underpaint.errors import InputError
from underpaint.patches import Standardize
from underpaint.train.run_folder import Run

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@dataclass
class EncoderBundle:
    """An encoder to judge.

    Attributes:
        name: what the user wrote.
        arguments: of `timm.create_model`, so that the same one untrained or a network with a head can be made.
        standardize: from images in [0, 1] to what the encoder takes.
        size: of its images, height and width in pixels.
        clean: standardised images from which a random-init network's batch norms take their statistics.
        scaling: how images come to lie in [0, 1]; None where the encoder does not say.
        notes: what must be known of its weights, in sentences.
    """

    name: str
    encoder: Backbone
    arguments: dict[str, Any]
    standardize: Standardize
    size: tuple[int, int]
    trained: bool
    clean: Callable[[], Iterable[Tensor]] | None = None
    scaling: Scaling | None = None
    notes: tuple[str, ...] = ()

    def untrained(self, seed: int) -> Backbone:
        """The same choices with weights as they are before training."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return from_arguments(copy.deepcopy(self.arguments)).eval()

    def random_init(self, seed: int) -> "EncoderBundle":
        """The same choices untrained."""
        encoder = self.untrained(seed).to(self.standardize.mean.device)
        if self.clean is not None:
            encoder = settled(encoder, self.clean)
        return replace(self, encoder=encoder, trained=False)

    def images(self, source: Source, indices: Indices | None = None) -> ImageSet:
        """Images of a source, all where None, at the encoder's size, channels and scaling."""
        chosen = range(len(source.entries)) if indices is None else indices
        return load_images(source, chosen, size=self.size, channels=self.encoder.channels, scaling=self.scaling)

    def scaled(self, source: Source, indices: Indices | None = None) -> "EncoderBundle":
        """With a scaling for all images: its own, else one measured on these, all of a source where None."""
        chosen = range(len(source.entries)) if indices is None else indices
        channels = self.encoder.channels
        return replace(
            self, scaling=settle_scaling(self.scaling, source, chosen, size=self.size, channels=channels, tell=say)
        )

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().contiguous() for name, value in self.encoder.model.state_dict().items()}

    @cached_property
    def fingerprint(self) -> str:
        """Tells these weights from all others."""
        return hashlib.sha256(save(self.weights())).hexdigest()[:32]


def open_bundle(
    text: str, *, image_size: tuple[int, int] | None = None, untrained: bool = False, channels: int = 3, seed: int = 0
) -> EncoderBundle:
    """The encoder that ENCODER names: a run, an exported file, `timm:NAME`, a Hugging Face folder, or a file of a known
    layout (docs/weights.md); on the GPU where there is one.

    Where `image_size` differs from the encoder's own, its positions are resampled. An untrained `timm:NAME` takes
    images standardised as its weights would. Drop path that an encoder was pretrained with ends here: what is trained
    on top of it has the drop path that its own recipe says.

    Raises:
        InputError: no such encoder; weights that cannot be fetched; a size that does not fit.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if text.startswith("timm:"):
        found = _public(text, image_size, untrained, channels, seed)
    elif is_run(Path(text)) or (Path(text).is_dir() and not (Path(text) / "config.json").is_file()):
        found = _own(text, image_size, untrained, seed)
    else:
        found = _foreign(text, image_size, untrained, channels, seed)
    _divides(found.size, getattr(found.encoder, "patch_size", (1, 1)))
    for module in found.encoder.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    lay_out(found.encoder.to(device), device)
    return replace(
        found,
        arguments=with_drop_path(found.arguments, 0.0),
        standardize=found.standardize.to(device),
    )


def _divides(size: tuple[int, int], patch: tuple[int, int]) -> None:
    if size[0] % patch[0] or size[1] % patch[1]:
        got, want = "x".join(map(str, size)), "x".join(map(str, patch))
        raise InputError(f"--image-size {got}: does not divide into the encoder's patches of {want} px")


def _own(text: str, image_size: tuple[int, int] | None, untrained: bool, seed: int) -> EncoderBundle:
    described = describe_encoder(text)
    arguments = copy.deepcopy(described["create_model"])
    own = arguments.get("img_size")
    size = image_size or _pair(own) or _pair(described.get("image_size")) or _trained_size(Path(text))
    if size is None:
        raise InputError(f"{text}: does not say for which images it was trained; give --image-size")
    _divides(size, _pair(arguments.get("patch_size")) or (1, 1))  # before a network is made
    resized = own is not None and _pair(own) != size
    if resized:
        arguments["img_size"] = list(size)
    if untrained or resized:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = from_arguments(copy.deepcopy(arguments))
        if not untrained:
            before: Any = load_encoder(text).model
            grid = getattr(getattr(before, "patch_embed", None), "grid_size", None)
            matched = fill(encoder.model, before.state_dict(), grid)
            if matched.untouched:
                raise InputError(f"{text}: weights do not fit images of {size[0]}x{size[1]}: {matched}")
    else:
        encoder = load_encoder(text)
    standardize = Standardize(described["mean"], described["std"])
    scaling = stored_scaling(described.get("scaling"))
    return EncoderBundle(text, encoder.eval(), arguments, standardize, size, not untrained, scaling=scaling)


def _public(text: str, image_size: tuple[int, int] | None, untrained: bool, channels: int, seed: int) -> EncoderBundle:
    name = text.removeprefix("timm:")
    if not is_model(name):
        raise InputError(f"{text}: timm has no model '{name}'; timm.list_models() lists them")
    config: Any = get_pretrained_cfg(name)
    size = image_size or (tuple(config.input_size[1:]) if config else (224, 224))
    arguments = create_arguments(name, image_size=size, in_chans=channels)
    statistics: dict[str, Any] = dict(IMAGENET)
    if config is not None and config.mean is not None:
        statistics = {"mean": list(config.mean), "std": list(config.std)}
    return _started(text, None, arguments, size, statistics, untrained, channels, seed)


def _foreign(text: str, image_size: tuple[int, int] | None, untrained: bool, channels: int, seed: int) -> EncoderBundle:
    """The network of somebody else's file, by its description or its names and shapes."""
    network, found = network_for(text)
    settings = dict(network)
    size = image_size or settings.pop("image_size", None)
    settings.pop("image_size", None)
    name = settings.pop("name")
    arguments = create_arguments(name, image_size=size, in_chans=channels, **settings)
    return _started(
        text,
        found,
        arguments,
        size or default_size(name),
        found.statistics or dict(IMAGENET),
        untrained,
        channels,
        seed,
    )


def _started(
    text: str,
    read: Found | None,
    arguments: dict[str, Any],
    size: tuple[int, int],
    statistics: dict[str, Any],
    untrained: bool,
    channels: int,
    seed: int,
) -> EncoderBundle:
    """A network with the weights that `text` names (`read` where they were), where it is not to be untrained; `statistics` are those of its images
    where the weights say none."""
    if len(statistics["mean"]) != channels:
        statistics = {"mean": [0.5] * channels, "std": [0.25] * channels}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = from_arguments(copy.deepcopy(arguments), size)
    notes: tuple[str, ...] = ()
    if not untrained:
        matched, found = start_from(encoder, text, read or read_start(text))
        statistics = found or statistics
        if matched.untouched or matched.left_out:
            notes = (f"{text} does not fit in full: {matched}; what is not in the file is as before training",)
    standardize = Standardize(statistics["mean"], statistics["std"])
    return EncoderBundle(text, encoder.eval(), arguments, standardize, size, not untrained, notes=notes)


def _pair(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _trained_size(path: Path) -> tuple[int, int] | None:
    """Of a run, from its recipe: an encoder without positions does not say."""
    folder = path if path.is_dir() else path.parent
    if not (folder / "recipe.yaml").is_file():
        return None
    return _pair(Run(folder).recipe().data.image_size)
