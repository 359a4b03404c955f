"""Pretrain vision backbones on unlabelled images by corrupting and restoring them, and judge what came out."""

from underpaint.backbones import encoder, load_encoder, standardize_for
from underpaint.errors import InputError, NotFinite
from underpaint.methods import MAE, METHODS, Energy, Method, Objective

__version__ = "0.1.0"
__all__ = [
    "MAE",
    "METHODS",
    "Energy",
    "InputError",
    "Method",
    "NotFinite",
    "Objective",
    "encoder",
    "load_encoder",
    "standardize_for",
]
