"""Pretrain vision backbones on unlabelled images by corrupting and restoring them, and judge what came out."""

from underpaint.backbones import encoder, load_encoder, standardize_for
from underpaint.errors import InputError, NotFinite
from underpaint.methods import CAE, CIM, MAE, METHODS, BEiT, Energy, LocalMIM, Method, Objective, SimMIM

__version__ = "0.1.0"
__all__ = [
    "CAE",
    "CIM",
    "MAE",
    "METHODS",
    "BEiT",
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
