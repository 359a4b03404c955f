"""Starting an encoder from other weights: public ones, those of a run, and files of other people's code.

What a file calls its weights is `layouts.py`'s; here they are read, resampled to the encoder that they are for, and what
became of each is told.
"""

import argparse
import contextlib
import hashlib
import io
import math
import re
import socket
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import constants as hub
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table
from timm.models import adapt_input_conv, is_model
from torch import Tensor, nn

from underpaint.backbones.build import describe_encoder
from underpaint.backbones.layouts import (
    Network,
    Weights,
    as_timm,
    beside,
    layout_of,
    network_of,
    prefixes,
    require_network,
    statistics_of,
    told,
    without,
)
from underpaint.backbones.protocols import Backbone
from underpaint.data.scaling import stored_scaling
from underpaint.errors import InputError
from underpaint.reading import one_line, plain_yaml, read_object

ENOUGH = 0.5  # of an encoder's numbers, to be called started from a file
INSIDE = (
    "state_dict",
    "model",
    "module",
    "teacher",
    "encoder",
    "target_encoder",
)  # where a state dict may lie in a file


@dataclass
class Matched:
    """What became of the weights that an encoder was to start from, by name.

    Attributes:
        left_out: in the file, not taken.
        untouched: in the encoder, not in the file.
        reasons: of what was left out, as a group and why.
        start: where the weights are from, as plain data without paths.
        share: of the encoder's numbers that were taken, in [0, 1].
    """

    equal: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)
    reasons: dict[str, tuple[str, str]] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    share: float = 0.0

    def __str__(self) -> str:
        text = f"{len(self.equal)} weights taken as they are, {len(self.adapted)} adapted"
        groups = Counter(self.reasons.get(name, (_block(name), "not in the encoder")) for name in self.left_out)
        groups.update((_block(name), "not in the file") for name in self.untouched)
        return text + "".join(f"; {group}: {why} ({count})" for (group, why), count in groups.items())


def _block(name: str) -> str:
    """The part of a network that a weight is of, the same for all of its blocks."""
    part = name.rpartition(".")[0] or name
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", part)


@dataclass(frozen=True)
class Found:
    """Weights that were read.

    Attributes:
        statistics: `mean` and `std` of their images in [0, 1], and `scaling`, where they are known.
        start: where they are from (`Matched.start`).
        network: what they are of, where that is said beside them.
        grid: rows and columns of their positions, where that is known.
    """

    weights: Weights
    statistics: dict[str, Any] | None
    start: dict[str, Any]
    network: Network | None = None
    grid: tuple[int, int] | None = None


def init_from(backbone: Backbone, start: str) -> tuple[Matched, dict[str, Any] | None]:
    """Start an encoder from public or own weights: `timm:NAME`, a run folder, a Hugging Face folder, or a file.

    Files are safetensors, or state dicts read with `weights_only=True`. Positions are resampled to the grid, patch
    embeddings to the patch size, first layers to the number of channels.

    Returns:
        What matched, and `{"mean": ..., "std": ...}` where the weights come with the statistics of their images, with
        `scaling` where they are of a run that says it.

    Raises:
        InputError: the weights cannot be read, or less than half of the encoder's numbers are among them.
    """
    return start_from(backbone, start, read_start(start))


def start_from(backbone: Backbone, start: str, found: Found) -> tuple[Matched, dict[str, Any] | None]:
    """As `init_from`, with weights that were read before.

    Raises:
        InputError: less than half of the encoder's numbers are among them.
    """
    matched = fill(backbone.model, found.weights, found.grid)
    matched.start = found.start
    if matched.share < ENOUGH:
        raise InputError(_unfit(backbone, start, found, matched))
    statistics = found.statistics
    return matched, statistics if statistics and len(statistics["mean"]) == backbone.channels else None


def _unfit(backbone: Backbone, start: str, found: Found, matched: Matched) -> str:
    weights, nothing = found.weights, not (matched.equal or matched.adapted)
    said = "nothing matched" if nothing else f"only {100 * matched.share:.0f} % of the encoder's numbers are in it"
    layout, network = found.start.get("layout"), found.network or network_of(weights)
    looks = f"; it looks like {layout}'s" if layout else ""
    if network is not None:
        return f"{start}: {said}{looks}, and is for {told(network)}"
    own = ", ".join(list(backbone.model.state_dict())[:3])
    return f"{start}: {said}{looks}; the file has {', '.join(list(weights)[:3])}, ... and the encoder {own}, ..."


def network_at(start: str) -> Network | None:
    """The network that a file or a folder is of, as `create_arguments` takes it, by its description or its names and shapes.

    Raises:
        InputError: it cannot be read.
    """
    found = read_start(start)
    return found.network or network_of(found.weights)


def network_for(start: str) -> tuple[Network, Found]:
    """As `network_at`, with the weights.

    Raises:
        InputError: it cannot be read, or told.
    """
    found = read_start(start)
    return found.network or require_network(found.weights, start), found


def is_run(path: Path) -> bool:
    """Whether this is a folder with an encoder that underpaint wrote, or that encoder."""
    if path.is_dir():
        return (path / "encoder.json").is_file()
    return path.name in ("encoder.safetensors", "encoder.json") and path.with_name("encoder.json").is_file()


# -- reading -----------------------------------------------------------------------------------------------------------


def read_start(start: str) -> Found:
    """The weights that `--init` or ENCODER names.

    Raises:
        InputError: they cannot be read.
    """
    if start.startswith("timm:"):
        return _of_timm(start)
    path = Path(start)
    if is_run(path):
        return _of_run(path)
    if path.is_dir() and (path / "config.json").is_file():
        return _of_hub(path)
    weights = read_weights(path)
    layout = layout_of(weights)
    said = {"from": "file", "layout": layout, "file": path.name, "sha256": _digest(path), "licence": None}
    return Found(weights, statistics_of(layout), said)


def _of_timm(start: str) -> Found:
    name = start.removeprefix("timm:")
    if not is_model(name):
        raise InputError(f"{start}: timm has no model '{name}'")
    public = _public_model(name)
    config: dict[str, Any] = dict(getattr(public, "pretrained_cfg", None) or {})
    statistics = {"mean": list(config["mean"]), "std": list(config["std"])} if "mean" in config else None
    tag = config.get("tag")
    full = f"{name}.{tag}" if tag and "." not in name else name
    said = {"from": "timm", "name": full, "licence": config.get("license"), "versions": {"timm": timm.__version__}}
    return Found(public.state_dict(), statistics, said)


def _of_run(path: Path) -> Found:
    described = describe_encoder(path)
    folder = path if path.is_dir() else path.parent
    statistics: dict[str, Any] = {"mean": described["mean"], "std": described["std"]}
    if (scaling := stored_scaling(described.get("scaling"))) is not None:
        statistics["scaling"] = scaling
    before = described.get("start")
    said = {
        "from": "run",
        "name": str(described["create_model"].get("model_name")),
        "sha256": _digest(folder / "encoder.safetensors"),
        "licence": before.get("licence") if isinstance(before, dict) else None,
        **{name: described.get(name) for name in ("trained_on", "versions", "start")},
    }
    made = described["create_model"]
    return Found(read_weights(folder / "encoder.safetensors"), statistics, said, grid=_grid_of(made))


def _grid_of(made: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the patches of an encoder that says its sizes."""
    size, patch = made.get("img_size"), made.get("patch_size")
    named = re.search(r"_patch(\d+)", str(made.get("model_name")))
    patch = patch or (int(named[1]) if named else None)
    if not isinstance(size, list) or not isinstance(patch, int) or not patch:
        return None
    return int(size[0]) // patch, int(size[1]) // patch


def _of_hub(folder: Path) -> Found:
    """A folder as Hugging Face has them: timm's, or transformers'."""
    config = read_object(folder / "config.json")
    file = next(
        (folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()), None
    )
    if file is None:
        raise InputError(f"{folder}: neither model.safetensors nor pytorch_model.bin is there, in one piece")
    weights = read_weights(file)
    said = {"from": "Hugging Face", "file": file.name, "sha256": _digest(file), "licence": _card_licence(folder)}
    statistics: Any = None
    if isinstance(name := config.get("architecture"), str):
        pretrained = config.get("pretrained_cfg")
        pretrained = pretrained if isinstance(pretrained, dict) else {}
        statistics = _numbers(pretrained.get("mean"), pretrained.get("std"))
        said |= {"layout": "timm", "name": name, "licence": pretrained.get("license") or said["licence"]}
        network: Network = {"name": name}
        arguments = config.get("model_args")
        network |= arguments if isinstance(arguments, dict) else {}
        size = pretrained.get("input_size")
        if isinstance(size, list) and len(size) == 3:
            network["image_size"] = (int(size[1]), int(size[2]))
        return Found(weights, statistics, said, network)
    kind = config.get("model_type")
    said |= {"layout": "transformers", "name": kind if isinstance(kind, str) else None}
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        found = read_object(processor)
        statistics = _numbers(found.get("image_mean"), found.get("image_std"))
    network_found = network_of(weights)
    if network_found is not None and kind not in ("swin", "swinv2", "resnet", "convnext", "convnextv2"):
        size, heads, width = (config.get(name) for name in ("image_size", "num_attention_heads", "hidden_size"))
        if isinstance(heads, int) and heads != max(1, width // 64 if isinstance(width, int) else 0):
            network_found["num_heads"] = heads
        if isinstance(size, int):
            network_found["image_size"] = (size, size)
    return Found(weights, statistics, said, network_found)


def _numbers(mean: Any, std: Any) -> dict[str, Any] | None:
    """Mean and deviation, where both are lists of as many numbers."""
    if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std)):
        return None
    if not all(isinstance(each, int | float) and math.isfinite(each) for each in mean + std) or min(std) <= 0:
        return None
    return {"mean": [float(each) for each in mean], "std": [float(each) for each in std]}


def _card_licence(folder: Path) -> str | None:
    """What the head of a model card says of the licence."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    head = re.match(r"---\s*\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
    try:
        found = plain_yaml(head.group(1)) if head else None
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(said := found.get("license"), str):
        return None
    return str(found.get("license_name") or said) if said == "other" else said


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _public_model(name: str) -> nn.Module:
    """timm's model with its public weights, from the cache of this machine where they are there.

    Raises:
        InputError: they are not, and cannot be fetched.
    """
    try:
        offline = hub.HF_HUB_OFFLINE
        try:
            hub.HF_HUB_OFFLINE = (
                True  # what is there is taken at once, and a network that is not there is not waited for
            )
            return timm.create_model(name, pretrained=True, num_classes=0)
        except LocalEntryNotFoundError:
            hub.HF_HUB_OFFLINE = offline
            if offline or not _reachable(host := urlsplit(hub.ENDPOINT).hostname or ""):
                why = "HF_HUB_OFFLINE is set" if offline else f"{host} cannot be reached"
                raise InputError(
                    f"timm:{name}: the weights cannot be fetched, since {why}, and they are not in {hub.HF_HUB_CACHE}; "
                    "fetch them once where there is a network, and copy that folder"
                ) from None
            return timm.create_model(name, pretrained=True, num_classes=0)
        finally:
            hub.HF_HUB_OFFLINE = offline
    except InputError:
        raise
    except Exception as error:  # hub libraries raise many kinds: no network, no such file, no weights
        raise InputError(f"timm:{name}: the weights cannot be fetched: {one_line(error)}") from error


def _reachable(host: str) -> bool:
    """Whether this machine finds the address of another one."""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def read_weights(path: Path) -> Weights:
    """A state dict from safetensors, or from a pickled file with nothing but tensors and plain settings in it.

    Raises:
        InputError: it cannot be read, holds more, or holds no tensors.
    """
    if path.is_dir():
        path = path / "encoder.safetensors"
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; give timm:NAME, a run folder, a Hugging Face folder or a file of weights"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # settings: a class that does nothing with what it holds
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{path}: not readable as weights: {str(error).splitlines()[0]}") from error
    except Exception as error:
        if "weights" not in str(error).lower() and "pickle" not in type(error).__module__:
            raise
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise InputError(
            f"{path}: holds more than tensors{what}, so it is not read; where you trust it, save its state dict alone: "
            "torch.save(torch.load(FILE, weights_only=False)['model'], NEW)"
        ) from error
    for key in INSIDE:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    weights = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, dict) else {}
    if not weights:
        raise InputError(f"{path}: no tensors in it; save a state dict")
    return weights


# -- fitting -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill(model: nn.Module, weights: Mapping[str, Tensor], grid: tuple[int, int] | None = None) -> Matched:
    """Copy into a timm model every weight of a known layout, adapting what only differs in size or form.

    `grid` is rows and columns of the weights' own positions, a square where it is not said.
    """
    own = model.state_dict()
    matched = Matched()
    prefix = _best(model, weights, own)
    named = {}
    for name, value in weights.items():
        if not name.startswith(prefix):
            matched.reasons[name] = beside(name) or (_block(name), "not in the encoder")
            matched.left_out.append(name)
        else:
            named[name.removeprefix(prefix)] = value
    named = as_timm(named)
    for name in list(named):
        if name not in own and (why := beside(name)):
            _drop(named, name, matched, *why)
    named = _renamed(model, _biases(named, own, matched), own)
    formed = _formed(named, own, matched)
    _class_position(model, formed, own, grid)
    done = set()
    for name, value in formed.items():
        if name not in own:
            matched.left_out.append(name)
            continue
        fitted = _fitted(model, name, value, own[name], formed, grid)
        if fitted is None:
            shapes = ("x".join(map(str, each.shape)) or "one number" for each in (value, own[name]))
            matched.reasons[name] = (_block(name), "{} in the file, {} in the encoder".format(*shapes))
            matched.left_out.append(name)
            continue
        own[name].copy_(fitted)
        done.add(name)
        same = fitted is value and named.get(name) is value
        (matched.equal if same else matched.adapted).append(name)
    matched.untouched = [name for name in own if name not in done and not name.endswith("num_batches_tracked")]
    taken = sum(own[name].numel() for name in done)
    matched.share = taken / max(1, sum(value.numel() for value in own.values()))
    return matched


def _best(model: nn.Module, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """The prefix ("module.", "backbone.", ...) whose removal makes the most names match."""
    known = list(own)[:8]
    found = prefixes(weights)
    found += sorted({name[: -len(end)] for name in weights for end in known if name.endswith("." + end)} - set(found))
    if len(found) == 1:
        return found[0]
    # the first of those with as many
    return max(found, key=lambda prefix: _hits(_renamed(model, as_timm(without(weights, prefix)), own), own))


def _renamed(model: nn.Module, weights: Weights, own: Mapping[str, Tensor]) -> Weights:
    """Under the names that timm's own filter of this family makes of them, where more of the encoder's are among those."""
    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    hits = _hits(weights, own)
    if rename is None or hits == len(weights):
        return weights
    # tables are resized below, to whichever blocks they go; a mask token would make a fine-tuned file of it
    held = {n: v for n, v in weights.items() if n == "mask_token" or n.endswith("relative_position_bias_table")}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            found = rename({name: value for name, value in weights.items() if name not in held}, model) | held
    except Exception:  # of names and sizes that it does not expect; they are told as they are
        return weights
    return found if _hits(found, own) > hits else weights


def _hits(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> int:
    return sum(name in own for name in weights)


def _formed(weights: Weights, own: Mapping[str, Tensor], matched: Matched) -> Weights:
    """The same network's weights in the form that the encoder keeps them in."""
    made = dict(weights)
    for form in (_norms, _projections, _biases, _scales, _tables):
        made = form(made, own, matched)
    return made


def _drop(made: Weights, name: str, matched: Matched, group: str, why: str) -> None:
    del made[name]
    matched.reasons[name] = (group, why)
    matched.left_out.append(name)


def _norms(made: Weights, own: Mapping[str, Tensor], matched: Matched) -> Weights:
    """The norm behind the pooling stands for the one before it, where the encoder has that alone."""
    for end in ("weight", "bias"):
        if f"fc_norm.{end}" in made and f"fc_norm.{end}" not in own and f"norm.{end}" in own:
            if f"norm.{end}" in made:
                _drop(made, f"fc_norm.{end}", matched, "fc_norm", "not used")
            else:
                made[f"norm.{end}"] = made.pop(f"fc_norm.{end}")
    return made


def _projections(made: Weights, own: Mapping[str, Tensor], matched: Matched) -> Weights:
    """Queries, keys and values together, or each for itself."""
    for name in list(made):
        if name.endswith(".q_proj.weight") and name not in own:
            stem = name.removesuffix("q_proj.weight")
            if f"{stem}qkv.weight" not in own or not all(f"{stem}{each}_proj.weight" in made for each in "kv"):
                continue
            made[f"{stem}qkv.weight"] = torch.cat([made.pop(f"{stem}{each}_proj.weight") for each in "qkv"])
            biases = [made.pop(f"{stem}{each}_proj.bias", None) for each in "qkv"]
            zero = next((torch.zeros_like(each) for each in biases if each is not None), None)
            if zero is not None:
                made[f"{stem}qkv.bias"] = torch.cat([zero if each is None else each for each in biases])
        elif name.endswith(".qkv.weight") and name not in own and f"{name[:-10]}q_proj.weight" in own:
            stem = name.removesuffix("qkv.weight")
            for each, part in zip("qkv", made.pop(name).chunk(3), strict=True):
                made[f"{stem}{each}_proj.weight"] = part
            for each, part in zip("qkv", made.pop(f"{stem}qkv.bias", torch.empty(0)).chunk(3), strict=False):
                made[f"{stem}{each}_proj.bias"] = part
    return made


def _biases(made: Weights, own: Mapping[str, Tensor], matched: Matched) -> Weights:
    """The biases of queries and values apart, or with one of the keys, which says nothing: every query adds the same to the
    logits of all keys."""
    for name in list(made):
        if name.endswith(".attn.q_bias") and name not in own:
            stem = name.removesuffix("q_bias")
            if f"{stem}v_bias" not in made or f"{stem}qkv.bias" not in own:
                continue
            q, v = made.pop(name), made.pop(f"{stem}v_bias")
            made[f"{stem}qkv.bias"] = torch.cat((q, made.pop(f"{stem}k_bias", torch.zeros_like(q)), v))
        elif name.endswith(".attn.qkv.bias") and name not in own:
            stem = name.removesuffix("qkv.bias")
            if f"{stem}q_bias" in own:
                made[f"{stem}q_bias"], _, made[f"{stem}v_bias"] = made.pop(name).chunk(3)
            elif not made[name].chunk(3)[0].any() and not made[name].chunk(3)[2].any():
                _drop(made, name, matched, "bias of queries and values", "all zero")
    return made


def _scales(made: Weights, own: Mapping[str, Tensor], matched: Matched) -> Weights:
    """LayerScale under the encoder's name; multiplied into what it scales where the encoder has none, and 1 where the file
    has none: both are the same network."""
    for name in list(made):
        if (match := re.match(r"(blocks\.\d+\.)(?:gamma_|ls)([12])(?:\.gamma)?$", name)) is None:
            continue
        block, which = match.groups()
        new = next((each for each in (f"{block}gamma_{which}", f"{block}ls{which}.gamma") if each in own), None)
        value = made.pop(name)
        if new is not None:
            made[new] = value
            continue
        scaled = f"{block}attn.proj." if which == "1" else f"{block}mlp.fc2."
        for end in ("weight", "bias"):
            if f"{scaled}{end}" in made:
                weight = made[f"{scaled}{end}"]
                made[f"{scaled}{end}"] = weight * (value.unsqueeze(1) if end == "weight" else value)
    for name in own:
        match = re.match(r"(blocks\.\d+\.)(gamma_[12]|ls[12]\.gamma)$", name)
        if match and name not in made and f"{match.group(1)}norm1.weight" in made:
            made[name] = torch.ones_like(own[name])
    return made


def _tables(made: Weights, own: Mapping[str, Tensor], matched: Matched) -> Weights:
    """A table of relative biases that all blocks share, for blocks of which each has its own."""
    shared = "rel_pos_bias.relative_position_bias_table"
    apart = [name for name in own if re.match(r"blocks\.\d+\.attn\.relative_position_bias_table$", name)]
    if shared in made and shared not in own and apart:
        table = made.pop(shared)
        for name in apart:
            made[name] = table + made[name] if name in made else table.clone()
    return made


def _class_position(model: Any, made: Weights, own: Mapping[str, Tensor], grid: tuple[int, int] | None) -> None:
    """A position of the class token, added to the token itself where the encoder keeps none for it."""
    positions, mine = made.get("pos_embed"), own.get("pos_embed")
    if positions is not None and positions.ndim == 2:  # CLIP's
        made["pos_embed"] = positions = positions.unsqueeze(0)
    if positions is None or mine is None or positions.ndim != 3 or not {"cls_token"} <= made.keys() & own.keys():
        return
    rows, columns = getattr(getattr(model, "patch_embed", None), "grid_size", (0, 0))
    count = positions.shape[1]
    first = count - grid[0] * grid[1] if grid else int(_square(count - 1) and not _square(count))
    if mine.shape[1] == rows * columns and first == 1 and positions.shape[-1] == made["cls_token"].shape[-1]:
        made["cls_token"] = made["cls_token"] + positions[:, :1]
        made["pos_embed"] = positions[:, 1:]


def _square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _fitted(
    model: Any, name: str, value: Tensor, own: Tensor, weights: Weights, grid: tuple[int, int] | None
) -> Tensor | None:
    """The value in the shape that the model wants, or None where it differs in kind."""
    if name == "pos_embed" and value.ndim == 3 and own.ndim == 3 and value.shape[-1] == own.shape[-1]:
        return _positions(model, value, own, grid)
    if value.shape == own.shape:
        return value
    if name.endswith("relative_position_bias_table"):
        window = getattr(model.get_submodule(name.rpartition(".")[0]), "window_size", None)
        if window is None or value.ndim != own.ndim or (value.ndim == 2 and value.shape[1] != own.shape[1]):
            return None
        try:
            with warnings.catch_warnings():  # its search warns of the layout of its own tensors
                warnings.simplefilter("ignore")
                resized = resize_rel_pos_bias_table(value, window, own.shape)
        except (ValueError, RuntimeError, AssertionError):
            return None
        return resized if resized.shape == own.shape else None
    if value.ndim == 4 and own.ndim == 4 and value.shape[0] == own.shape[0] and name == _first_layer(model):
        if value.shape[1] != own.shape[1]:
            value = _channels(value, own.shape[1])
        if value.shape[2:] != own.shape[2:]:
            stride = model.get_submodule(name.removesuffix(".weight")).stride
            if tuple(stride) != tuple(own.shape[2:]):
                return None  # no patches
            value = resample_patch_embed(value, list(own.shape[-2:]))
        return value
    flat = {value.ndim, own.ndim} == {2, 4} or value.ndim == own.ndim  # a linear layer for a convolution of 1 pixel
    return value.reshape(own.shape) if flat and value.squeeze().shape == own.squeeze().shape else None


def _first_layer(model: nn.Module) -> str | None:
    """The name of the weight that an image meets first."""
    return next((f"{name}.weight" for name, each in model.named_modules() if isinstance(each, nn.Conv2d)), None)


def _channels(value: Tensor, channels: int) -> Tensor:
    """A first layer for images of so many channels: those of a colour image as timm does it; else their sum for one
    channel, and repeated for more, weighted as many as there are more."""
    if value.shape[1] == 3:
        return adapt_input_conv(channels, value)
    if channels == 1:
        return value.sum(1, keepdim=True)
    repeated = value.repeat(1, math.ceil(channels / value.shape[1]), 1, 1)[:, :channels]
    return repeated * (value.shape[1] / channels)


def _positions(model: Any, value: Tensor, own: Tensor, grid: tuple[int, int] | None) -> Tensor | None:
    """Positions resampled to the model's grid; those of class and register tokens stay, and are 0 where there are none."""
    mine = tuple(model.patch_embed.grid_size) if hasattr(model, "patch_embed") else None
    if mine is None or own.shape[1] < mine[0] * mine[1]:
        return value if value.shape == own.shape else None
    prefix = own.shape[1] - mine[0] * mine[1]
    if grid is not None and value.shape[1] >= grid[0] * grid[1]:
        theirs, first = grid, value.shape[1] - grid[0] * grid[1]
    elif value.shape == own.shape:
        return value
    else:
        counts = dict.fromkeys((prefix, 1, 0, 2))
        fitting = [count for count in counts if _square(value.shape[1] - count)]
        if not fitting:
            return None
        first, side = fitting[0], math.isqrt(value.shape[1] - fitting[0])
        theirs = (side, side)
    if first == prefix and theirs == mine:
        return value
    patches = value[:, first:]
    if theirs != mine:
        patches = resample_abs_pos_embed(patches, list(mine), old_size=list(theirs), num_prefix_tokens=0)
    kept = value[:, : min(first, prefix)]
    missing = value.new_zeros(1, prefix - kept.shape[1], value.shape[2])
    return torch.cat((kept, missing, patches), dim=1)
