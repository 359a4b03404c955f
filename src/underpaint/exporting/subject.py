"""What is exported: an encoder, or a network that an evaluation trained, with what it says of images, and images to try it on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from underpaint.data import Scaling, Source, Unreadable, open_source
from underpaint.demo_images import PHOTOGRAPHS, photograph
from underpaint.errors import InputError
from underpaint.evaluation.bundle import EncoderBundle, open_bundle
from underpaint.evaluation.keep import Saved
from underpaint.files import SOURCES
from underpaint.prediction import rebuilt
from underpaint.report.figures.pictures import spread
from underpaint.report.reading import read_yaml, text, text_of
from underpaint.transforms import Transform

TRIED = 8  # images that outputs are compared on
TRAINED = ("model.json", "*/model.json", "*/*/model.json")  # of a task's variant, a task, all
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """What is exported, on the CPU.

    Attributes:
        task: "encoder", or that of the evaluation: finetune, linear, attentive, regression, segment-linear, segment-upernet,
            detect.
        network: of standardised images.
        names: of what it says: pooled and patches; logits; number; boxes, labels, scores and masks of one image.
        scaling: how images come to lie in [0, 1].
        folder: where it is from, where that is one.
    """

    name: str
    task: str
    bundle: EncoderBundle
    network: nn.Module
    names: tuple[str, ...]
    classes: list[str]
    saved: Saved | None
    folder: Path | None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its images in pixels."""
        return self.bundle.size

    @property
    def mean(self) -> list[float]:
        return self.bundle.standardize.mean.flatten().tolist()

    @property
    def std(self) -> list[float]:
        return self.bundle.standardize.std.flatten().tolist()

    @property
    def scaling(self) -> Scaling:
        channels = self.bundle.encoder.channels
        plain = Scaling("uint8", ("uint8",), (0.0,) * channels, (255.0,) * channels, (0.5,) * channels)
        return self.bundle.scaling or plain

    @property
    def batched(self) -> bool:
        """Whether it takes several images at once."""
        return self.task != "detect"

    @torch.no_grad()
    def outputs(self, images: Tensor) -> Outputs:
        """Of images in [0, 1]."""
        return dict(zip(self.names, OnUnit(self)(images), strict=True))

    def refused(self, to: str, why: str, instead: str = "onnx, torchscript or safetensors") -> InputError:
        return InputError(f"--to {to}: {self.name}: {why}; --to {instead} would do")


class OnUnit(nn.Module):
    """A network as it is used elsewhere: of images in [0, 1], with its outputs as a tuple of tensors."""

    def __init__(self, subject: Subject):
        super().__init__()
        self.standardize, self.network, self.task = subject.bundle.standardize, subject.network, subject.task
        self.keys = subject.names

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        standard = self.standardize(images)
        if self.task == "detect":
            (found,) = self.network([standard[0]])
            return tuple(found[name] for name in self.keys)
        found = self.network(standard)
        return (found.pooled, found.patches) if self.task == "encoder" else (found,)


class Written(NamedTuple):
    """What a format made.

    Attributes:
        read: what the files say of images in [0, 1] when they are read back, by the names of the subject.
        usage: how they are used, in Python, with PATH for the folder.
        facts: what is to be known of them, as plain data.
        notes: what a reader must know, in sentences.
    """

    read: Callable[[Tensor], Outputs]
    usage: str
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()


def open_subject(text: str) -> Subject:
    """What ENCODER names (as for `evaluate`), or a folder of `evaluate`, or that of one of its tasks.

    Raises:
        InputError: neither.
    """
    path = Path(text)
    described = any((path / name).is_file() for name in ("encoder.json", "config.json"))
    if path.is_dir() and not described and any(file for depth in TRAINED for file in path.glob(depth)):
        return _trained(text)
    bundle = open_bundle(text)
    bundle.standardize.cpu()
    bundle.encoder.cpu().eval()
    return Subject(text, "encoder", bundle, bundle.encoder, ("pooled", "patches"), [], None, _folder(path))


def _trained(text: str) -> Subject:
    _, saved, bundle, network = rebuilt(text)
    bundle.standardize.cpu()
    task = saved["task"]
    names = ("logits",)
    if task == "detect":
        names = ("boxes", "labels", "scores", *(("masks",) if saved["masks"] else ()))
    elif task == "regression":
        names = ("number",)
    return Subject(text, task, bundle, network.cpu().eval(), names, list(saved["classes"]), saved, _folder(Path(text)))


def _folder(path: Path) -> Path | None:
    return path if path.is_dir() else path.parent if path.is_file() else None


def images_for(subject: Subject) -> tuple[Tensor, str]:
    """Images in [0, 1] to compare outputs on, and whose they are: the run's own data where they are still there, else the
    photographs of the demo."""
    transform = Transform(subject.scaling, tuple(subject.mean), tuple(subject.std), subject.size)
    data = None
    if subject.folder is not None:
        data = text(read_yaml(text_of(subject.folder / "recipe.yaml")), "data", "path")
    found = _own(data, transform) if data else []
    if found:
        return torch.cat(found), "images of its data"
    colour = Scaling("uint8", ("uint8",), (0.0,) * 3, (255.0,) * 3, (0.5,) * 3)
    shown = Transform(colour, (0.0,) * 3, (1.0,) * 3, subject.size).unit(
        [photograph(name) for name in list(PHOTOGRAPHS)[:TRIED]]
    )
    channels = len(subject.mean)
    if channels != 3:
        shown = shown.mean(1, keepdim=True).expand(-1, channels, -1, -1).contiguous()
    return shown, "photographs of the demo"


def _own(data: str, transform: Transform) -> list[Tensor]:
    """Some images of a run's data, none where they cannot be had at once."""
    if data.partition(":")[0] in SOURCES or not Path(data).exists():
        return []
    try:
        source: Source = open_source(data)
        chosen = spread(len(source.entries), TRIED)
    except InputError:
        return []
    made = []
    for number in chosen:
        try:
            made.append(transform.unit_of(source.read(number)))
        except (Unreadable, OSError):
            continue
    return made
