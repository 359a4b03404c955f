"""Making encoders from timm names, and writing and reading them.

An encoder on disk is `encoder.safetensors` (timm's own parameter names) and `encoder.json` (every argument that
`timm.create_model` needs, the pooling, scaling, mean and deviation of its images, a format version).
"""

import difflib
import functools
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import HybridEmbed
from timm.models import get_pretrained_cfg, is_model, is_model_in_modules, model_entrypoint
from timm.models.beit import Beit as TimmBeit
from timm.models.cait import Cait as TimmCait
from timm.models.eva import Eva as TimmEva
from timm.models.hiera import Hiera as TimmHiera
from timm.models.hieradet_sam2 import HieraDet
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from underpaint import __version__
from underpaint.backbones.beit import Beit
from underpaint.backbones.cait import Cait
from underpaint.backbones.eva import Eva
from underpaint.backbones.hiera import Hiera, UnnormedMaps
from underpaint.backbones.maps import MapBackbone
from underpaint.backbones.naflex import NaFlex
from underpaint.backbones.protocols import Backbone
from underpaint.backbones.swin import Swin, SwinV2
from underpaint.backbones.vit import ViT
from underpaint.data.scaling import Scaling, stored_scaling
from underpaint.errors import InputError
from underpaint.files import replacing, write_json
from underpaint.patches import Standardize
from underpaint.reading import one_line, read_object
from underpaint.transforms import Transform

FORMAT = 1
PLAIN: tuple[tuple[type[nn.Module], Any], ...] = (
    (VisionTransformer, ViT),
    (TimmEva, Eva),
    (TimmBeit, Beit),
    (TimmCait, Cait),
    (NaFlexVit, NaFlex),
)
REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# what a model might take beside its architecture, should a version of timm move it into a class
OPENS = frozenset(
    {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path", "cache_dir"}
)


def create_arguments(
    name: str,
    *,
    image_size: tuple[int, int] | None = None,
    patch_size: int | None = None,
    in_chans: int = 3,
    **arguments: Any,
) -> dict[str, Any]:
    """Every argument of `timm.create_model` for this encoder, as plain data.

    Drop path is 0 unless `arguments` says otherwise, whatever timm's own default for this model is.

    `in_chans` (of the images) and `arguments` go to timm as they are (embed_dim, depth, num_heads, norm_layer="groupnorm",
    the `channels` of a ResNet's stages, ...).

    Raises:
        InputError: timm has no such model, or the patch does not divide the image.
    """
    if not is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"near it: {', '.join(near)}" if near else "timm.list_models() lists them"
        raise InputError(f"encoder: timm has no model '{name}'; {hint}")
    made: dict[str, Any] = {"model_name": name, "num_classes": 0, "in_chans": in_chans}
    config = get_pretrained_cfg(name)
    height, width = image_size or default_size(name)
    convolved = is_model_in_modules(name, ["vision_transformer_hybrid", "vitamin"])
    sized = {"img_size": [height, width]}
    if convolved or is_model_in_modules(name, ["vision_transformer", "vision_transformer_relpos", "deit", "naflexvit"]):
        # the mean of the *normed* patch tokens; timm's default for "avg" would rename norm to fc_norm
        made |= sized | {"global_pool": "token" if "_distilled_" in name else "avg", "fc_norm": False}
        if is_model_in_modules(name, ["vision_transformer", "naflexvit"]):
            made["final_norm"] = True  # some have none: C-RADIO, InternViT
    elif is_model_in_modules(name, ["beit", "eva"]):
        made |= sized | {"global_pool": "avg", "use_fc_norm": False}
        if is_model_in_modules(name, ["eva"]):
            made["use_post_transformer_norm"] = True  # some have none: Perception Encoder, spatial
    elif is_model_in_modules(name, ["cait"]):
        made |= sized | {"global_pool": "avg"}
    elif is_model_in_modules(name, ["hiera"]):
        made |= sized
        if patch_size is not None:
            made["patch_stride"] = [patch_size, patch_size]
    elif config and config.fixed_input_size:
        made |= sized
    elif patch_size is not None:
        raise InputError(f"patch_size: '{name}' has no patches; leave --patch-size away")
    if patch_size is not None:
        if convolved:
            raise InputError(f"patch_size: '{name}' makes its tokens by convolutions; leave --patch-size away")
        if "patch_stride" not in made:
            made["patch_size"] = patch_size
    patch = made.get("patch_size", _own_patch_size(name))
    if patch and (height % patch or width % patch):
        raise InputError(
            f"patch_size: {patch} px does not divide an image of {height}x{width}; "
            f"such patch sizes do: {', '.join(map(str, _common_divisors(height, width)))}"
        )
    return with_drop_path(made | arguments, arguments.get("drop_path_rate") or 0.0)


@functools.cache
def takes_drop_path(name: str) -> bool:
    """Whether timm's model of this name can have drop path: a plain VGG or DenseNet refuses the argument."""
    if "drop_path_rate" not in architecture_arguments(name):
        return False
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):  # shapes alone: takes a tenth of a second
            timm.create_model(name, num_classes=0, drop_path_rate=0.0)
    except TypeError:
        return False
    return True


def with_drop_path(arguments: dict[str, Any], rate: float) -> dict[str, Any]:
    """The arguments of `timm.create_model` with this rate of drop path, said even where it is 0: Swin's default is 0.1.

    A network that cannot have it stays as it is.
    """
    return arguments | ({"drop_path_rate": rate} if takes_drop_path(arguments["model_name"]) else {})


def encoder(
    name: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    channels: int | Sequence[int] = 3,
    in_chans: int = 3,
    **arguments: Any,
) -> Backbone:
    """An untrained encoder on a timm model.

    >>> import torch, underpaint
    >>> vit = underpaint.encoder("vit_tiny_patch16_224", image_size=(32, 64), patch_size=8)
    >>> features = vit(torch.zeros(2, 3, 32, 64))
    >>> tuple(features.pooled.shape), tuple(features.patches.shape)
    ((2, 192), (2, 32, 192))

    Args:
        name: any timm model.
        image_size: pixels, one number or (height, width); the model's own size where None.
        patch_size: pixels, for transformers.
        channels: of the images; or, as a list, the widths of a ResNet's stages, which timm calls `channels` too.
        in_chans: channels of the images where `channels` are widths.
        arguments: further arguments of `timm.create_model`.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if isinstance(channels, int):
        in_chans = channels
    else:
        arguments["channels"] = list(channels)
    made = create_arguments(name, image_size=size, patch_size=patch_size, in_chans=in_chans, **arguments)
    return from_arguments(made, size)


@functools.cache
def architecture_arguments(name: str) -> frozenset[str]:
    """What may be said of a timm model: the arguments of the networks in its module, or that its module uses.

    `timm.create_model` itself takes more, which opens files or asks the network (`checkpoint_path`, `pretrained`,
    `pretrained_cfg`, `cache_dir`): none of these is among them.
    """
    module = sys.modules[model_entrypoint(name).__module__]
    kinds = [
        kind for kind in vars(module).values() if inspect.isclass(kind) and kind.__module__.startswith("timm.models.")
    ]
    networks = [signature for kind in kinds if "num_classes" in (signature := inspect.signature(kind).parameters)]
    if NaFlexVit in kinds:
        networks.append(inspect.signature(NaFlexVitCfg).parameters)  # its factories take these apart
    named = {each.name for signature in networks for each in signature.values() if each.kind not in REST}
    return frozenset(named - OPENS)


def create_model(arguments: Mapping[str, Any]) -> nn.Module:
    """timm's model of these arguments, which may come from somebody else's file: its weights are random.

    Raises:
        InputError: no architecture of timm's own, an argument that is none of its, or a value that it does not take.
    """
    name = arguments.get("model_name")
    if not isinstance(name, str) or not is_model(name):
        raise InputError(f"encoder: timm has no model {name!r}")
    known = architecture_arguments(name)
    if unknown := sorted(set(arguments) - known - {"model_name"}):
        raise InputError(f"encoder: '{unknown[0]}' is no part of {name}; there are: {', '.join(sorted(known))}")
    try:
        return timm.create_model(**arguments)
    except Exception as error:  # of arguments that it does not check itself: a division by 0, an index, a size
        raise InputError(f"encoder: timm cannot build '{name}': {one_line(error)}") from error


def from_arguments(arguments: Mapping[str, Any], image_size: tuple[int, int] | None = None) -> Backbone:
    """The encoder that `create_arguments` described, for images of this height and width in pixels where it takes any.

    Raises:
        InputError: as `create_model`, or a network that cannot be an encoder.
    """
    model: Any = create_model(arguments)
    try:
        size = arguments.get("img_size") or image_size or default_size(arguments["model_name"])
        height, width = (size, size) if isinstance(size, int) else size
        if not isinstance(getattr(model, "patch_embed", None), HybridEmbed):  # tokens of convolutions are no patches
            for kind, adapter in PLAIN:
                if isinstance(model, kind):
                    return adapter(model, (height, width))
        if isinstance(model, SwinTransformer):
            return Swin(model, arguments["in_chans"])
        if isinstance(model, SwinTransformerV2):
            return SwinV2(model, arguments["in_chans"])
        if isinstance(model, TimmHiera):
            return Hiera(model, arguments["in_chans"], (height, width))
        kind = UnnormedMaps if isinstance(model, HieraDet) else MapBackbone
        return kind(model, arguments["in_chans"], (height, width))
    except Exception as error:  # beside our ValueError, of sizes that only timm takes
        raise InputError(f"encoder: '{arguments['model_name']}' cannot be used: {one_line(error)}") from error


def default_size(name: str) -> tuple[int, int]:
    """Height and width of the images that a model of timm was made for."""
    config = get_pretrained_cfg(name)
    return (config.input_size[1], config.input_size[2]) if config else (224, 224)


def _own_patch_size(name: str) -> int | None:
    found = re.search(r"_patch(\d+)", name)
    return int(found.group(1)) if found else None


def _common_divisors(height: int, width: int) -> list[int]:
    return [p for p in range(2, min(height, width) + 1) if height % p == 0 and width % p == 0]


# -- on disk ---------------------------------------------------------------------------------------------------------


def save_encoder(
    folder: Path,
    backbone: Backbone,
    arguments: dict[str, Any],
    standardize: Standardize,
    scaling: Scaling | None = None,
    provenance: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `encoder.safetensors` and `encoder.json` into a folder, each atomically; `scaling` is how its images came to
    lie in [0, 1], `provenance` where its weights are from (`start`, `trained_on`), as plain data without paths; `weights`
    are those of the network where they were copied before."""
    write_weights(folder / "encoder.safetensors", backbone.model.state_dict() if weights is None else weights)
    description = {
        "format": FORMAT,
        "create_model": arguments,
        "image_size": image_size_of(backbone),
        "pooling": backbone.pooling,
        "mean": standardize.mean.flatten().tolist(),
        "std": standardize.std.flatten().tolist(),
        "scaling": None if scaling is None else scaling.stored(),
        "start": None,
        "trained_on": None,
        **(provenance or {}),
        "versions": {"underpaint": __version__, "timm": timm.__version__, "torch": torch.__version__},
    }
    write_json(folder / "encoder.json", description)


def image_size_of(backbone: Backbone) -> list[int] | None:
    """Height and width in pixels of the images that an encoder was trained on; None where it does not say."""
    size = getattr(backbone, "image_size", None)
    return None if size is None else list(size)


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """The state of a network as safetensors, atomically."""
    weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with replacing(path) as temporary:
        save_file(weights, temporary)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        InputError: there is none, or it is damaged or something else.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """The tensors of a safetensors file, into a model that has them all and no other.

    Raises:
        InputError: as `read_tensors`; or they do not fit.
    """
    try:
        model.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        raise InputError(f"{path}: does not fit the encoder that is described beside it: {one_line(error)}") from error


def describe_encoder(path: str | Path) -> dict[str, Any]:
    """The content of `encoder.json` for a run folder or an encoder file. Where its weights are from (`start`, `trained_on`,
    `versions`) is not in a file that was written before underpaint said so.

    Raises:
        InputError: there is none, or its format is newer than this version knows.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = folder / "encoder.json"
    if not file.is_file():
        raise InputError(f"{path}: no encoder.json here; a run folder of 'underpaint pretrain' has one")
    return read_description(file, FORMAT)


def read_description(file: Path, format: int) -> dict[str, Any]:
    """What a JSON file says of an encoder: `create_model`, `mean`, `std`, `scaling` and more.

    Raises:
        InputError: it is damaged, or of another format.
    """
    description = read_object(file)
    if (found := description.get("format")) != format:
        raise InputError(f"{file}: format {str(found)[:100]!r}; this version reads format {format}")
    if not isinstance(description.get("create_model"), dict):
        raise InputError(f"{file}: 'create_model' is no object with the arguments of an encoder")
    try:
        mean, std = (torch.tensor(description[name], dtype=torch.float32) for name in ("mean", "std"))
        if not (
            mean.ndim == 1 and mean.shape == std.shape and bool((mean.isfinite() & std.isfinite() & (std > 0)).all())
        ):
            raise ValueError("they are finite numbers, one of each for every channel")
        stored_scaling(description.get("scaling"))
        if (size := description.get("image_size")) is not None:
            height, width = size
            if not all(isinstance(side, int) and side > 0 for side in (height, width)):
                raise ValueError(f"image_size {size}: it is height and width in pixels")
    # of what is not there, no list, no numbers, too large, of other names: TypeError, KeyError, RuntimeError, ...
    except Exception as error:
        raise InputError(f"{file}: 'mean', 'std', 'scaling' or 'image_size' is damaged: {one_line(error)}") from error
    return description


def load_encoder(path: str | Path, image_size: tuple[int, int] | None = None) -> Backbone:
    """The pretrained encoder of a run, in eval mode, with its `transform`: features of files, PIL images or arrays are

    `encoder = underpaint.load_encoder(run); features = encoder(encoder.transform(["a.jpg", image]))`

    with `features.pooled` [b, d] and `features.patches` [b, n, d]. `image_size` is that of images to train it on, and of the
    transform, where it takes any.

    Raises:
        InputError: no encoder there, or a damaged one.
    """
    description = describe_encoder(path)
    size = image_size or description.get("image_size")
    backbone = from_arguments(description["create_model"], None if size is None else (size[0], size[1]))
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    load_weights(backbone.model, folder / "encoder.safetensors")
    scaling, taken = stored_scaling(description.get("scaling")), image_size_of(backbone)
    if scaling is not None and taken is not None and (size or description["create_model"].get("img_size")):
        mean, std = (tuple(description[name]) for name in ("mean", "std"))
        backbone.takes = Transform(scaling, mean, std, (taken[0], taken[1]))
    backbone.eval()
    return backbone


def standardize_for(path: str | Path) -> Standardize:
    """The transform from images in [0, 1] to what the encoder of this run takes."""
    description = describe_encoder(path)
    return Standardize(description["mean"], description["std"])


def scaling_for(path: str | Path) -> Scaling | None:
    """How images come to lie in [0, 1] for the encoder of this run; None where it was written without that."""
    return stored_scaling(describe_encoder(path).get("scaling"))
