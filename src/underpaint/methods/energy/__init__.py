"""Methods that restore by the gradient of an energy: the published one, and our form given the visible patches."""

from underpaint.methods.energy.conditional import ConditionalEnergy
from underpaint.methods.energy.energy import CORRUPTIONS, Energy

__all__ = ["CORRUPTIONS", "ConditionalEnergy", "Energy"]
