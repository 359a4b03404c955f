"""What a call of `evaluate` may ask for; without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from underpaint.config import MINUTES, SEEDS, SIDE, setting


@dataclass(frozen=True)
class Options:
    """Beside encoder, data, tasks and folder. `settings` are of what the tasks train, by name."""

    against: str | Path | None = setting(None, "other images, for outliers")
    untrained: bool = setting(False, "judge the encoder with weights as before training")
    image_size: tuple[int, int] | None = setting(
        None, "height and width, N or HxW", unit="pixels", unset="the encoder's own", low=4, high=SIDE
    )
    label_fraction: float | None = setting(
        None,
        "share of the training images of each class that is used",
        unset="all; with --beside 0.01, 0.1 and all",
        above=0,
        high=1,
    )
    minutes: float | None = setting(
        None,
        "of training, for each network that a task trains",
        unset="the task's own number of steps",
        above=0,
        high=MINUTES,
    )
    seed: int = setting(0, "of everything random", low=0, below=SEEDS)
    ignore_index: int | None = setting(None, "of masks", unset="that of classes.json, or 255")
    groups: str | None = setting(
        None,
        "regular expression; images of one group (patient, slide) stay on one side of a hold-out; '' for none",
        unset="that of the run",
    )
    recipe: str | None = setting(
        None,
        "of fine-tuning: mae-vit-base, localmim-swin-base, rsb-a3, small, ...",
        unset="the one that suits encoder and image size",
    )
    settings: Mapping[str, object] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)  # other encoders that the same is asked of
