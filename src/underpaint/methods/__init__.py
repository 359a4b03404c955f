"""The pretraining methods, by the name that `--method` takes."""

from underpaint.methods.beit import BEiT
from underpaint.methods.cae import CAE
from underpaint.methods.cim import CIM
from underpaint.methods.energy import Energy
from underpaint.methods.localmim import LocalMIM
from underpaint.methods.mae import MAE
from underpaint.methods.method import Method, Objective
from underpaint.methods.simmim import SimMIM

METHODS: dict[str, type[Method]] = {
    "beit": BEiT,
    "cae": CAE,
    "cim": CIM,
    "energy": Energy,
    "localmim": LocalMIM,
    "mae": MAE,
    "simmim": SimMIM,
}

__all__ = ["CAE", "CIM", "MAE", "METHODS", "BEiT", "Energy", "LocalMIM", "Method", "Objective", "SimMIM"]
