"""Encoders, and what `evaluate` trained on them, for use elsewhere: `export` writes one and proves that it computes the same."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from underpaint.errors import InputError
from underpaint.files import check_writable


class Format(NamedTuple):
    """A form that `--to` takes."""

    write: str  # the function that writes it
    line: str
    packages: tuple[str, ...] = ()  # that it needs, and that are no dependency of underpaint
    extra: str = ""  # that brings them


FORMATS = {
    "timm": Format("underpaint.exporting.weights:write_timm", "a folder for timm.create_model('local-dir:PATH')"),
    "transformers": Format(
        "underpaint.exporting.transformers:write_transformers",
        "a folder for AutoModel.from_pretrained: ViT, Swin, Swin V2, ResNet, ConvNeXt",
        ("transformers",),
        "hub",
    ),
    "onnx": Format(
        "underpaint.exporting.graphs:write_onnx",
        "model.onnx, of images in [0, 1]",
        ("onnx", "onnxscript", "onnxruntime"),
        "onnx",
    ),
    "torchscript": Format("underpaint.exporting.graphs:write_torchscript", "model.pt, of images in [0, 1]"),
    "safetensors": Format("underpaint.exporting.weights:write_own", "weights and their description alone"),
}
EXPORTED = "export.json"  # what an export says of itself, by which it is known


def require(to: str, out: Path) -> None:
    """Complain, before anything is imported, of what cannot be written.

    Raises:
        InputError: no such format, a package that is not installed, or a path that holds something else.
    """
    if to not in FORMATS:
        raise InputError(f"--to {to}: there are {', '.join(FORMATS)}")
    chosen = FORMATS[to]
    for package in chosen.packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"--to {to} needs the package {package}: pip install underpaint[{chosen.extra}]")
    if out.is_dir() and any(out.iterdir()) and not (out / EXPORTED).is_file():
        raise InputError(f"--out {out}: exists and is no export of underpaint; choose another path")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; an export is a folder")
    check_writable(out)


def writer(to: str) -> Any:
    """The function that writes a format: (subject, folder) -> Written."""
    module, _, name = FORMATS[to].write.partition(":")
    return getattr(importlib.import_module(module), name)
