"""Pretrain vision backbones on unlabelled images by corrupting and restoring them, and judge what came out."""

import importlib
from typing import TYPE_CHECKING, Any

from underpaint.errors import InputError, NotFinite
from underpaint.methods import METHODS

if TYPE_CHECKING:
    from underpaint.backbones import encoder, load_encoder, standardize_for
    from underpaint.methods import CAE, CIM, MAE, BEiT, ConditionalEnergy, Energy, LocalMIM, Method, Objective, SimMIM

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
    "SimMIM",
    "encoder",
    "load_encoder",
    "standardize_for",
]


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for (PEP 562): help and complaints need none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "backbones" if name in ("encoder", "load_encoder", "standardize_for") else "methods"
    return getattr(importlib.import_module(f"underpaint.{room}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
