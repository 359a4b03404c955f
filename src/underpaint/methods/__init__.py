"""The pretraining methods, by the name that `--method` takes."""

from underpaint.methods.energy import Energy
from underpaint.methods.mae import MAE
from underpaint.methods.method import Method, Objective

METHODS: dict[str, type[Method]] = {"energy": Energy, "mae": MAE}

__all__ = ["MAE", "METHODS", "Energy", "Method", "Objective"]
