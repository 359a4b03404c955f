"""Images from disk to batches: sources, decoding, the cache, crops, loading."""

import importlib
from typing import TYPE_CHECKING, Any

from underpaint.data.alike import near_copies
from underpaint.data.changes import keep, listing
from underpaint.data.check import check, examine, format_check, format_found
from underpaint.data.copies import copies, same_place
from underpaint.data.decode import Unreadable, decode, read_header
from underpaint.data.open import open_source
from underpaint.data.sources.base import Entry, Source
from underpaint.data.sources.index import Indices
from underpaint.data.splits import labelled_indices, labels_judge, pretraining_indices, split_indices

if TYPE_CHECKING:
    from underpaint.data.crop import centre_boxes, crop_resize, draw_crops
    from underpaint.data.images import ImageSet, load_images, measure_scaling, settle_scaling
    from underpaint.data.loader import Batch, Crops, eval_batches, fair_batches, steps_per_epoch, train_batches
    from underpaint.data.scaling import Scaling, stored_scaling

# what needs torch, and where it lies: imported when it is asked for (PEP 562), which `underpaint check` never does
ROOMS = {
    **dict.fromkeys(("centre_boxes", "crop_resize", "draw_crops"), "crop"),
    **dict.fromkeys(("ImageSet", "load_images", "measure_scaling", "settle_scaling"), "images"),
    **dict.fromkeys(("Batch", "Crops", "eval_batches", "fair_batches", "steps_per_epoch", "train_batches"), "loader"),
    **dict.fromkeys(("Scaling", "stored_scaling"), "scaling"),
}


def __getattr__(name: str) -> Any:
    if name not in ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"underpaint.data.{ROOMS[name]}"), name)


__all__ = [
    "Batch",
    "Crops",
    "Entry",
    "ImageSet",
    "Indices",
    "Scaling",
    "Source",
    "Unreadable",
    "centre_boxes",
    "check",
    "copies",
    "crop_resize",
    "decode",
    "draw_crops",
    "eval_batches",
    "examine",
    "fair_batches",
    "format_check",
    "format_found",
    "keep",
    "labelled_indices",
    "labels_judge",
    "listing",
    "load_images",
    "measure_scaling",
    "near_copies",
    "open_source",
    "pretraining_indices",
    "read_header",
    "same_place",
    "settle_scaling",
    "split_indices",
    "steps_per_epoch",
    "stored_scaling",
    "train_batches",
]
