"""What an encoder is worth: evaluations by one contract (`base`), run by one runner (`runner`); and the probes of a run.

Listed here without importing torch; a class is imported when it is asked for.
"""

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from underpaint.errors import InputError

if TYPE_CHECKING:
    from underpaint.evaluation.base import AnyEvaluation

# by the name that `--task` takes: the class, and what it says in a line
EVALUATIONS: dict[str, tuple[str, str]] = {
    "knn": ("underpaint.evaluation.frozen:NearestNeighbours", "classes of the nearest images by pooled features"),
    "linear": ("underpaint.evaluation.frozen:LinearProbe", "logistic regression on pooled features"),
    "attentive": (
        "underpaint.evaluation.frozen:AttentiveProbing",
        "one query over the patch tokens (arXiv 2202.03026)",
    ),
    "finetune": ("underpaint.evaluation.finetune:FineTune", "the whole network trained on class labels"),
    "segment": ("underpaint.evaluation.segment:Segment", "a linear head and UperNet on index masks"),
    "detect": ("underpaint.evaluation.detect:Detect", "Faster or Mask R-CNN on COCO boxes and masks of objects"),
    "regression": ("underpaint.evaluation.regression:Regression", "ridge regression of a number on pooled features"),
    "outliers": ("underpaint.evaluation.outliers:Outliers", "telling other images (--against) from those of the data"),
}


def known(tasks: Sequence[str]) -> None:
    """Complain of a task that does not exist, or of none.

    Raises:
        InputError: in one line, with those that there are.
    """
    unknown = [task for task in tasks if task not in EVALUATIONS]
    if unknown or not tasks:
        shown = f"'{unknown[0]}'" if unknown else "none"
        raise InputError(f"--task {shown}: there are {', '.join(EVALUATIONS)}")


def evaluation(name: str) -> "AnyEvaluation":
    """The class of an evaluation."""
    module, _, kind = EVALUATIONS[name][0].partition(":")
    return getattr(importlib.import_module(module), kind)
