"""Pretrain vision backbones on unlabelled images by corrupting and restoring them, and judge what came out."""

import importlib
from typing import TYPE_CHECKING, Any

from underpaint.config import Recipe
from underpaint.errors import InputError, NotFinite
from underpaint.methods import METHODS

if TYPE_CHECKING:
    from underpaint.backbones import encoder, load_encoder, standardize_for
    from underpaint.comparison.run import compare
    from underpaint.evaluation.options import Options
    from underpaint.evaluation.runner import evaluate
    from underpaint.exploring import explore
    from underpaint.exporting.export import export
    from underpaint.inference import restore, score
    from underpaint.methods import CAE, CIM, MAE, BEiT, ConditionalEnergy, Energy, LocalMIM, Method, Objective, SimMIM
    from underpaint.prediction import embed, predict
    from underpaint.pretraining import pretrain
    from underpaint.recipes.request import named as recipe
    from underpaint.suggesting import suggest

__version__ = "0.1.0"
__all__ = [
    "CAE",
    "CIM",
    "MAE",
    "METHODS",
    "BEiT",
    "ConditionalEnergy",
    "Energy",
    "InputError",
    "LocalMIM",
    "Method",
    "NotFinite",
    "Objective",
    "Options",
    "Recipe",
    "SimMIM",
    "compare",
    "embed",
    "encoder",
    "evaluate",
    "explore",
    "export",
    "load_encoder",
    "predict",
    "pretrain",
    "recipe",
    "restore",
    "score",
    "standardize_for",
    "suggest",
]
# where what is imported lazily lies; all else are methods
ROOMS = {
    **dict.fromkeys(("encoder", "load_encoder", "standardize_for"), "backbones"),
    **dict.fromkeys(("restore", "score"), "inference"),
    **dict.fromkeys(("embed", "predict"), "prediction"),
    "compare": "comparison.run",
    "evaluate": "evaluation.runner",
    "explore": "exploring",
    "export": "exporting.export",
    "suggest": "suggesting",
    "Options": "evaluation.options",
    "pretrain": "pretraining",
    "recipe": "recipes.request",
}


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for (PEP 562): help and complaints need none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = importlib.import_module(f"underpaint.{ROOMS.get(name, 'methods')}")
    return getattr(room, "named" if name == "recipe" else name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
