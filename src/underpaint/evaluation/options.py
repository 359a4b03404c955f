"""What a call of `evaluate` may ask for; without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """Beside encoder, data, tasks and folder.

    Attributes:
        image_size: height and width in pixels; the encoder's own where None.
        untrained: judge the encoder with weights as before training.
        label_fraction: share of the training images of each class that is used, above 0 and at most 1.
        minutes: of training, for each network that a task trains; the task's own number of steps where None.
        seed: of everything random.
        ignore_index: of masks; that of classes.json, or 255, where None.
        against: other images, for outliers.
        groups: a regular expression; images of one group stay on one side of a hold-out. That of the run where None;
            "" for none.
        recipe: of fine-tuning; the one that suits encoder and image size where None.
        settings: of what the tasks train, by name.
    """

    image_size: tuple[int, int] | None = None
    untrained: bool = False
    label_fraction: float = 1.0
    minutes: float | None = None
    seed: int = 0
    ignore_index: int | None = None
    against: str | Path | None = None
    groups: str | None = None
    recipe: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
