"""Several probes of the same features."""

from collections.abc import Sequence

from underpaint.errors import InputError
from underpaint.evaluate.attentive import attentive
from underpaint.evaluate.features import Features
from underpaint.evaluate.knn import knn
from underpaint.evaluate.linear import linear
from underpaint.evaluate.result import Probe
from underpaint.evaluate.splits import Labels, as_labels, stratified

KINDS = ("linear", "attentive", "knn")


def probe_features(
    train: Features,
    train_y: Labels,
    test: Features,
    test_y: Labels,
    *,
    attentive_limit: int = 20_000,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
) -> dict[str, Probe]:
    """The probes `kinds` by name; each keeps the order of the test images, so `gain` can pair two encoders.

    The attentive probe trains on a stratified subset of at most `attentive_limit` images.
    Raises InputError for a kind that does not exist, and what the probes raise.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise InputError(f"no probe '{unknown[0]}'; there are: {', '.join(KINDS)}")
    found = {}
    for kind in kinds:
        if kind == "attentive":
            labels = as_labels(train_y)
            few = stratified(labels, attentive_limit, seed)
            tokens = train.patches if len(few) == len(labels) else train.patches[few]
            found[kind] = attentive(tokens, labels[few], test.patches, test_y, seed=seed)
        else:
            probe = {"linear": linear, "knn": knn}[kind]
            found[kind] = probe(train.pooled, train_y, test.pooled, test_y, seed=seed)
    return found
