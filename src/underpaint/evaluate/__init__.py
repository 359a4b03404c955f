"""What features are worth: probes of a frozen encoder, floors without any network, and the rank of the features."""

from underpaint.evaluate.attentive import attentive
from underpaint.evaluate.baselines import hog, majority, raw_pixels
from underpaint.evaluate.features import Features, extract
from underpaint.evaluate.knn import knn
from underpaint.evaluate.linear import linear
from underpaint.evaluate.probe import probe_features
from underpaint.evaluate.rank import effective_rank
from underpaint.evaluate.result import Probe, gain
from underpaint.evaluate.splits import evenly, shots, stratified

__all__ = [
    "Features",
    "Probe",
    "attentive",
    "effective_rank",
    "evenly",
    "extract",
    "gain",
    "hog",
    "knn",
    "linear",
    "majority",
    "probe_features",
    "raw_pixels",
    "shots",
    "stratified",
]
