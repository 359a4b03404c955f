"""The pretraining methods, by the name that `--method` takes. A class is imported when it is asked for."""

import importlib
from collections import UserDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from underpaint.methods.beit import BEiT
    from underpaint.methods.cae import CAE
    from underpaint.methods.cim import CIM
    from underpaint.methods.energy import ConditionalEnergy, Energy
    from underpaint.methods.localmim import LocalMIM
    from underpaint.methods.mae import MAE
    from underpaint.methods.method import Method, Objective, Restores
    from underpaint.methods.simmim import SimMIM

# where the class is, and what it does in a line, with its paper
LISTED = {
    "beit": ("beit:BEiT", "mask tokens in the encoder, a linear map to hidden visual words (BEiT, arXiv 2106.08254)"),
    "cae": (
        "cae:CAE",
        "predict the encoder's own representation of hidden patches, then their words (CAE, arXiv 2202.03026)",
    ),
    "cim": ("cim:CIM", "a small BEiT makes up parts, the encoder restores or finds them (CIM, arXiv 2202.03382)"),
    "conditional-energy": (
        "energy:ConditionalEnergy",
        "the gradient of an energy given visible patches restores the hidden ones (ours, after arXiv 2302.01384)",
    ),
    "energy": ("energy:Energy", "one network: forward an energy, its input gradient restores (arXiv 2302.01384)"),
    "localmim": (
        "localmim:LocalMIM",
        "several depths predict hidden patches at several scales (LocalMIM, arXiv 2303.05251)",
    ),
    "mae": ("mae:MAE", "hide most patches, predict their pixels from the rest (MAE, arXiv 2111.06377)"),
    "simmim": (
        "simmim:SimMIM",
        "mask tokens in the encoder, a linear map to the hidden pixels (SimMIM, arXiv 2111.09886)",
    ),
}


class Classes(UserDict[str, "type[Method] | None"]):
    """The classes by name: to list the names, or to look one up, imports no more than that."""

    def __getitem__(self, name: str) -> "type[Method]":
        found = self.data[name]
        return _class(name) if found is None else found


def _class(name: str) -> Any:
    module, _, kind = LISTED[name][0].partition(":")
    return getattr(importlib.import_module(f"underpaint.methods.{module}"), kind)


METHODS = Classes(dict.fromkeys(LISTED))


def __getattr__(name: str) -> Any:
    """The classes as attributes of this module (PEP 562)."""
    if name in ("Method", "Objective", "Restores"):
        return getattr(importlib.import_module("underpaint.methods.method"), name)
    for method, (place, _) in LISTED.items():
        if place.endswith(f":{name}"):
            return _class(method)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CAE",
    "CIM",
    "LISTED",
    "MAE",
    "METHODS",
    "BEiT",
    "ConditionalEnergy",
    "Energy",
    "LocalMIM",
    "Method",
    "Objective",
    "Restores",
    "SimMIM",
]
