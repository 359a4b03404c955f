"""Which method for my images? Every method under the same wall-clock, judged alike."""

from underpaint.compare.compare import compare

__all__ = ["compare"]
