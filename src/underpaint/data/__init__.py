"""Images from disk to batches: sources, decoding, the cache, crops, loading."""

from underpaint.data.changes import keep, listing
from underpaint.data.check import check, format_check
from underpaint.data.copies import copies, same_place
from underpaint.data.crop import centre_boxes, crop_resize, draw_crops
from underpaint.data.decode import Unreadable, decode, read_header
from underpaint.data.images import ImageSet, load_images, measure_scaling, settle_scaling
from underpaint.data.loader import Batch, Crops, eval_batches, fair_batches, steps_per_epoch, train_batches
from underpaint.data.open import open_source
from underpaint.data.scaling import Scaling, stored_scaling
from underpaint.data.sources.base import Entry, Source
from underpaint.data.sources.index import Indices
from underpaint.data.splits import labelled_indices, labels_judge, pretraining_indices, split_indices

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
    "fair_batches",
    "format_check",
    "keep",
    "labelled_indices",
    "labels_judge",
    "listing",
    "load_images",
    "measure_scaling",
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
