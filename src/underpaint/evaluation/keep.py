"""What an evaluation trained, on disk: `model.safetensors`, and `model.json` with all that is needed to use it."""

from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor, nn

from underpaint.backbones.build import read_description, read_tensors, write_weights
from underpaint.errors import InputError
from underpaint.evaluation.bundle import EncoderBundle
from underpaint.files import write_json

FORMAT = 1


class Saved(TypedDict):
    """What `model.json` holds: of every model down to `classes`, then what is there where its task says it."""

    format: int
    task: str  # with its variant: "segment-linear"
    encoder: str  # as the user wrote it
    create_model: dict[str, Any]  # every argument of timm's
    mean: list[float]  # of the encoder's images
    std: list[float]
    scaling: dict[str, Any] | None
    image_size: list[int]  # pixels: height, width
    classes: list[str]
    labels: list[int]  # numbers of the classes in the data
    settings: dict[str, Any]
    masks: bool
    sizes: dict[str, Any]
    categories: list[int]


def keep(
    folder: Path, task: str, bundle: EncoderBundle, model: nn.Module, classes: list[str], facts: dict[str, object]
) -> None:
    """Write a trained model into a folder, the weights first."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / "model.safetensors", model.state_dict())
    described = {
        "format": FORMAT,
        "task": task,
        "encoder": bundle.name,
        "create_model": bundle.arguments,
        "mean": bundle.standardize.mean.flatten().tolist(),
        "std": bundle.standardize.std.flatten().tolist(),
        "scaling": None if bundle.scaling is None else bundle.scaling.stored(),
        "image_size": list(bundle.size),
        "classes": classes,
        **facts,
    }
    write_json(folder / "model.json", described)


def kept(folder: Path) -> tuple[Saved, dict[str, Tensor]]:
    """What `keep` wrote: the description and the weights.

    Raises:
        InputError: there is no such model, or its format is newer than this version knows.
    """
    file = folder / "model.json"
    if not file.is_file():
        trained = sorted({*folder.glob("*/model.json"), *folder.glob("*/*/model.json")})
        if len(trained) > 1:
            raise InputError(f"{folder}: holds several models; give one of {', '.join(str(f.parent) for f in trained)}")
        if not trained:
            raise InputError(
                f"{folder}: no model.json here; 'underpaint evaluate' writes one for each task that trains"
            )
        file = trained[0]
    described: Any = read_description(file, FORMAT)
    return described, read_tensors(file.parent / "model.safetensors")
