"""`underpaint export`: write, read back, compare, and only then keep."""

from pathlib import Path

import torch
from torch import Tensor

from underpaint import __version__
from underpaint.console import say
from underpaint.errors import InputError, Stopped
from underpaint.exporting import EXPORTED, require, writer
from underpaint.exporting.card import card
from underpaint.exporting.subject import Outputs, Subject, Written, images_for, open_subject
from underpaint.files import replacing_folder, write_json, write_text

TOLERANCE = 1e-4  # of the largest value of an output: kernels of float32 differ by about 1e-6


def export(encoder: str | Path, to: str, out: str | Path) -> Path:
    """Write an encoder, or what an evaluation trained on it, for use elsewhere, with a model card.

    What was written is read back by the library that it is for, and compared with the original on real images before it is
    kept: those of the run where they are still there, else photographs that come with installed packages.

    Args:
        encoder: as for `evaluate`; or a folder of `evaluate`, or that of one of its tasks.
        to: "timm", "transformers", "onnx", "torchscript" or "safetensors".
        out: a folder; an export that is there is replaced.

    Returns:
        The folder.

    Raises:
        InputError: nothing to export there, or not to this format; a package is missing; `out` holds something else.
        Stopped: what was written says something else than the original; nothing is kept.
    """
    folder = Path(out)
    require(to, folder)
    subject = open_subject(str(encoder))
    write = writer(to)
    images, whose = images_for(subject)
    try:
        with replacing_folder(folder) as part, torch.no_grad():
            made: Written = write(subject, part)
            found = differences(subject, made, images)
            worst = max(found.values())
            if not worst <= TOLERANCE:
                told = ", ".join(f"{name} {value:.2g}" for name, value in found.items())
                raise Stopped(
                    f"--to {to}: what was written differs from the original ({told} of the largest value; at most "
                    f"{TOLERANCE:g} was expected), so nothing is kept; another format may serve"
                )
            facts = {"format": 1, "to": to, "task": subject.task, "differences": found, "tolerance": TOLERANCE}
            facts |= {"images": len(images), "compared_on": whose, **made.facts, "underpaint": __version__}
            write_json(part / EXPORTED, facts)
            write_text(part / "README.md", card(subject, to, made, facts))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror or error}") from error
    say(
        f"largest difference on {len(images)} {whose}: {worst:.1e} of the largest value (tolerance {TOLERANCE:g}): "
        + ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    )
    say(f"done: {folder}; {folder / 'README.md'} says how to use it and where it is from")
    return folder


def differences(subject: Subject, made: Written, images: Tensor) -> dict[str, float]:
    """The largest difference of each output, as a share of its largest value; infinite where shapes differ.

    A detector takes image by image.
    """
    batches = [images] if subject.batched else images.split(1)
    worst = dict.fromkeys(subject.names, 0.0)
    for batch in batches:
        wanted, found = subject.outputs(batch), made.read(batch)
        for name in subject.names:
            worst[name] = max(worst[name], difference(wanted, found, name))
    return worst


def difference(wanted: Outputs, found: Outputs, name: str) -> float:
    a, b = wanted[name].double(), found[name].double()
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    share = (a - b).abs().max() / a.abs().max().clamp_min(1e-12)
    return float("inf") if bool(share.isnan()) else float(share)
