"""Probes that cannot flatter, each against a reference; floors; the rank."""

import math
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from skimage.feature import hog as skimage_hog
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from underpaint.errors import InputError
from underpaint.evaluation import features as features_module
from underpaint.evaluation.attentive import AttentiveProbe, attentive, heads_of, normalized
from underpaint.evaluation.baselines import hog, luma, majority, raw_pixels
from underpaint.evaluation.features import Features, extract
from underpaint.evaluation.knn import knn
from underpaint.evaluation.linear import linear
from underpaint.evaluation.outliers import separation
from underpaint.evaluation.probes import Labelled, probe_features
from underpaint.evaluation.rank import effective_rank
from underpaint.evaluation.results import Probe, means, paired_difference, redraw
from underpaint.evaluation.segment import confusion_of, measures
from underpaint.evaluation.splits import hold_out, stratified

Made = tuple[Tensor, np.ndarray, Tensor, np.ndarray]


def made(n: int = 600, m: int = 400, d: int = 16, classes: int = 4, signal: float = 1.0) -> Made:
    """Gaussian classes of different spread along the axes, with a large mean."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (n + m,), generator=generator)
    centres = signal * torch.randn(classes, d, generator=generator)
    x = (centres[y] + torch.randn(n + m, d, generator=generator)) * torch.logspace(0, -3, d) + 5
    return x[:n], y[:n].numpy(), x[n:], y[n:].numpy()


def made_tokens(n: int = 400, m: int = 300, tokens: int = 9, d: int = 24, classes: int = 3) -> Made:
    """One token, at any place, is marked by its first feature and carries the class; the others carry noise."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(classes, (n + m,), generator=generator)
    x = torch.randn(n + m, tokens, d, generator=generator)
    place = torch.randint(tokens, (n + m,), generator=generator)
    x[:, :, 0] = -1
    x[torch.arange(n + m), place, 0] = 4
    x[torch.arange(n + m), place, 1 : 1 + classes] = 3 * torch.eye(classes)[y]
    return x[:n], y[:n].numpy(), x[n:], y[n:].numpy()


def as_tokens(x: Tensor) -> Tensor:
    return x[:, None].expand(-1, 3, -1).contiguous()


def attentive_of_vectors(x: Tensor, y: Any, test_x: Tensor, test_y: Any, seed: int = 0) -> Probe:
    return attentive(as_tokens(x), y, as_tokens(test_x), test_y, epochs=4, seed=seed)


PROBES = [
    pytest.param(linear, id="linear"),
    pytest.param(knn, id="knn"),
    pytest.param(attentive_of_vectors, id="attentive"),
]


@pytest.mark.quick
@pytest.mark.parametrize("probe", PROBES)
class TestEveryProbe:
    def test_finds_what_is_there(self, probe: Callable[..., Probe]):
        x, y, test_x, test_y = made(signal=3.0)
        assert probe(x, y, test_x, test_y).accuracy > 0.9

    def test_shuffled_labels_give_chance(self, probe: Callable[..., Probe]):
        x, y, test_x, test_y = made(signal=3.0)
        shuffle = np.random.default_rng(0).permutation  # of both parts: else whole clusters hit or miss together
        found = probe(x, shuffle(y), test_x, shuffle(test_y))
        assert abs(found.accuracy - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(test_y))

    def test_chooses_nothing_on_test(self, probe: Callable[..., Probe]):
        """Predictions, recovered from the hits on constant labels, explain the hits on true and on permuted ones."""
        x, y, test_x, test_y = made()
        other = np.random.default_rng(1).permutation(test_y)
        hits = [probe(x, y, test_x, np.full(len(test_y), k)) for k in range(4)]
        predicted = np.argmax([found.correct for found in hits], axis=0)
        for labels in (test_y, other):
            found = probe(x, y, test_x, labels)
            assert found.chosen == hits[0].chosen
            np.testing.assert_array_equal(found.correct, predicted == labels)

    def test_test_images_do_not_see_each_other(self, probe: Callable[..., Probe]):
        """A test image of enormous values changes nothing for the others."""
        x, y, test_x, test_y = made()
        poison = torch.cat([test_x, torch.full_like(test_x[:1], 1e6)])
        found, poisoned = (
            probe(x, y, test_x, test_y),
            probe(x, y, poison, np.append(test_y, 0)),
        )
        assert found.chosen == poisoned.chosen
        np.testing.assert_array_equal(found.correct, poisoned.correct[:-1])

    def test_same_seed_same_result_and_no_global_randomness(self, probe: Callable[..., Probe]):
        data = made()
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
        first, second = probe(*data), probe(*data)
        assert torch.equal(torch_state, torch.get_rng_state())
        np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])  # type: ignore[index]
        np.testing.assert_array_equal(first.correct, second.correct)
        assert paired_difference(first, second) == (0.0, 0.0)
        assert first.chosen == second.chosen

    def test_standard_error_and_numbers(self, probe: Callable[..., Probe]):
        found = probe(*made())
        accuracy = found.correct.mean()
        assert found.accuracy == accuracy
        assert found.standard_error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 400))
        assert set(found.numbers()) == {"accuracy", "standard_error", "chosen"}

    def test_constant_features(self, probe: Callable[..., Probe]):
        _, y, _, test_y = made()
        x, test_x = torch.full((600, 16), 0.1), torch.full((400, 16), 0.1)
        assert abs(probe(x, y, test_x, test_y).accuracy - 0.25) < 0.1

    @pytest.mark.parametrize("labels", [[0, 1], [0, 0, 0, 0, 0, 1], [3, 3, 9, 9, 9, 9, 9, 9]])
    def test_few_images(self, probe: Callable[..., Probe], labels: list[int]):
        x = torch.eye(16)[torch.tensor(labels)] + 0.01 * torch.arange(16)
        found = probe(x, labels, x, labels)
        assert 0 <= found.accuracy <= 1

    def test_a_class_that_train_lacks_is_never_hit(self, probe: Callable[..., Probe]):
        x, y, test_x, test_y = made()
        found = probe(x[y != 2], y[y != 2], test_x, test_y)
        assert not found.correct[test_y == 2].any()
        assert found.correct[test_y != 2].any()

    def test_labels_need_not_start_at_zero(self, probe: Callable[..., Probe]):
        x, y, test_x, test_y = made()
        shifted = probe(x, torch.from_numpy(y * 7 - 3), test_x, torch.from_numpy(test_y * 7 - 3))
        np.testing.assert_array_equal(shifted.correct, probe(x, y, test_x, test_y).correct)

    def test_refusals(self, probe: Callable[..., Probe]):
        x, y, test_x, test_y = made()
        with pytest.raises(InputError, match="at least 2 classes in train; there is only 1"):
            probe(x, np.ones_like(y), test_x, test_y)
        with pytest.raises(InputError, match="train part has 600 images but 599 labels"):
            probe(x, y[1:], test_x, test_y)
        with pytest.raises(InputError, match="test part of the probe is empty"):
            probe(x, y, test_x[:0], test_y[:0])
        with pytest.raises(InputError, match="features of the test part are not all finite"):
            probe(x, y, torch.where(test_x == test_x[0, 0], torch.nan, test_x), test_y)
        with pytest.raises(InputError, match="one whole number an image"):
            probe(x, y / 2, test_x, test_y)


@pytest.mark.quick
def test_gain_is_paired():
    before = Probe.of(np.array([True, False, False, False]), {})
    after = Probe.of(np.array([True, True, True, False]), {})
    difference, error = paired_difference(after, before)
    assert difference == 0.5
    assert error == pytest.approx(stats.sem([0, 1, 1, 0]))
    with pytest.raises(InputError, match="after has 4, before 3"):
        paired_difference(after, Probe.of(np.array([True, False, True]), {}))


@pytest.mark.quick
@pytest.mark.parametrize("k", [1, 3, 10])
def test_knn_is_that_of_scikit_learn(k: int):
    x, y, test_x, test_y = made()
    x, test_x = x - 5, test_x - 5  # so that directions differ  # pyright: ignore[reportArgumentType]
    weights: Any = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731
    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights).fit(x.double().numpy(), y)
    expected = np.asarray(reference.predict(test_x.double().numpy())) == test_y
    found = knn(x, y, test_x, test_y, ks=(k,))
    np.testing.assert_array_equal(found.correct, expected)
    assert found.chosen == {"k": k}


@pytest.mark.quick
def test_knn_in_chunks(monkeypatch: pytest.MonkeyPatch):
    data = made()
    whole = knn(*data)
    monkeypatch.setattr(import_module("underpaint.evaluation.knn"), "CHUNK", 1000)
    np.testing.assert_array_equal(knn(*data).correct, whole.correct)


@pytest.mark.quick
@pytest.mark.parametrize(("n", "d", "signal"), [(2000, 16, 0.5), (2000, 64, 0.2), (200, 300, 0.1)])
def test_linear_is_that_of_scikit_learn(n: int, d: int, signal: float):
    """At the same C, with as many images as features or fewer."""
    x, y, test_x, test_y = made(n, 2000, d, signal=signal)
    found = linear(x, y, test_x, test_y)
    mean, scale = x.mean(0), x.std(0, correction=0)
    reference = LogisticRegression(C=found.chosen["C"], max_iter=5000, tol=1e-6)
    reference.fit(((x - mean) / scale).double().numpy(), y)
    expected = reference.score(((test_x - mean) / scale).double().numpy(), test_y)
    assert abs(found.accuracy - expected) < 0.002
    assert 0.3 < found.accuracy < 0.98


@pytest.mark.quick
def test_linear_ignores_scale_and_shift_of_features():
    x, y, test_x, test_y = made()
    other = linear(x * 1e-4 - 3e-3, y, test_x * 1e-4 - 3e-3, test_y)
    assert abs(other.accuracy - linear(x, y, test_x, test_y).accuracy) < 0.01


@pytest.mark.quick
def test_attentive_is_cross_attention():
    """Against PyTorch's multi-head attention with the norm and the projection of the query written out."""
    generator = torch.Generator().manual_seed(3)
    dim, heads = 128, 2
    probe = AttentiveProbe(dim, 5, generator).eval()
    assert probe.heads == heads
    for parameter in probe.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    tokens = torch.randn(6, 10, dim, generator=generator) * 3 + 1
    reference = nn.MultiheadAttention(dim, heads, batch_first=True)
    reference.in_proj_weight.data = torch.cat([torch.eye(dim), probe.key, probe.value])
    reference.in_proj_bias.data = torch.cat([torch.zeros(2 * dim), probe.value_bias])
    reference.out_proj.weight.data = probe.output.data
    reference.out_proj.bias.data.zero_()
    keys, values = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
    keys.weight.data, values.weight.data = probe.key_scale.data, probe.value_scale.data
    keys.bias.data = torch.randn(dim, generator=generator)  # moves nothing
    values.bias.data = probe.value_shift.data
    seen = reference(probe.query.expand(6, 1, dim), keys(tokens), values(tokens))[0][:, 0]
    expected = probe.norm(seen) @ probe.classify.T + probe.classify_bias
    torch.testing.assert_close(probe(normalized(tokens)), expected, rtol=1e-4, atol=1e-4)


def test_attentive_looks_at_the_token_that_matters():
    x, y, test_x, test_y = made_tokens()
    found = attentive(x, y, test_x, test_y)
    pooled = linear(x.mean(1), y, test_x.mean(1), test_y)
    difference, error = paired_difference(found, pooled)
    assert found.accuracy > 0.95
    assert difference > 4 * error


def test_attentive_does_not_depend_on_the_evaluation_batch(monkeypatch: pytest.MonkeyPatch):
    x, y, test_x, test_y = made_tokens()
    whole = attentive(x, y, test_x, test_y, epochs=3)
    # one image at a time
    monkeypatch.setattr(import_module("underpaint.evaluation.attentive"), "EVALUATION_TOKENS", 1)
    single = attentive(x, y, test_x, test_y, epochs=3)
    np.testing.assert_array_equal(whole.correct, single.correct)
    assert whole.chosen == single.chosen


def test_attentive_takes_half_precision():
    x, y, test_x, test_y = made_tokens()
    full, half = attentive(x, y, test_x, test_y), attentive(x.half(), y, test_x.half(), test_y)
    assert abs(full.accuracy - half.accuracy) < 0.02
    with pytest.raises(InputError, match="needs patch tokens"):
        attentive(x[:, :0], y, test_x[:, :0], test_y)


@pytest.mark.quick
@pytest.mark.parametrize(("dim", "heads"), [(24, 1), (64, 1), (128, 2), (192, 3), (200, 2), (768, 12)])
def test_heads(dim: int, heads: int):
    assert heads_of(dim) == heads


@pytest.mark.quick
def test_effective_rank():
    generator = torch.Generator().manual_seed(0)
    isotropic = torch.randn(20_000, 24, generator=generator)
    assert effective_rank(isotropic) == pytest.approx(24, rel=0.01)
    assert effective_rank(isotropic[:10]) == pytest.approx(10, rel=0.1)
    line = torch.randn(500, 1, generator=generator) @ torch.randn(1, 24, generator=generator)
    assert effective_rank(line) == pytest.approx(1, abs=0.01)
    assert effective_rank(torch.zeros(5, 3)) == 0.0
    singular = np.linalg.svd(isotropic[:50].double().numpy(), compute_uv=False)
    share = singular / singular.sum()
    assert effective_rank(isotropic[:50]) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("channels", "height", "width", "cell"),
    [(3, 32, 32, (4, 4)), (1, 37, 50, (5, 7)), (5, 64, 33, (8, 5)), (3, 7, 9, (4, 4)), (3, 4, 224, (4, 28))],
)
def test_hog_is_that_of_scikit_image(channels: int, height: int, width: int, cell: tuple[int, int]):
    images = torch.rand(3, channels, height, width, generator=torch.Generator().manual_seed(0))
    images[1] = (images[1, :1] * 4).round() / 4  # ties and gradients along the axes
    images[2] = 0.5
    found = hog(images)
    block = (min(2, height // cell[0]), min(2, width // cell[1]))
    for image, row in zip(luma(images).numpy(), found.numpy(), strict=True):
        expected = skimage_hog(image, pixels_per_cell=cell, cells_per_block=block)
        np.testing.assert_allclose(row, expected, atol=1e-5)


@pytest.mark.quick
def test_raw_pixels():
    images = torch.rand(2, 3, 32, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(raw_pixels(images), images.flatten(1))
    large = raw_pixels(images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3))
    assert large.shape == (2, 3 * 32 * 20)
    assert raw_pixels(torch.rand(1, 1, 500, 3)).shape == (1, 32)
    stripes = torch.tensor([0.0, 1.0]).repeat(64).expand(1, 1, 128, 128)
    assert (raw_pixels(stripes) - 0.5).abs().max() < 0.1  # antialiased: grey, not black or white
    with pytest.raises(InputError, match="at least 4 x 4 pixels; got 3 x 8"):
        hog(torch.rand(1, 3, 3, 8))


@pytest.mark.quick
def test_majority():
    assert majority([2, 2, 1, 1, 0], [1, 1, 1, 2]).accuracy == 0.75
    with pytest.raises(InputError, match="train has 0, test has 1"):
        majority([], [1])


@pytest.mark.quick
def test_stratified_keeps_shares_and_every_class():
    labels = np.array([0] * 700 + [1] * 290 + [2] * 10)
    chosen = stratified(labels, 100, seed=3)
    assert np.array_equal(chosen, np.unique(chosen))
    assert np.abs(np.bincount(labels[chosen]) - [70, 29, 1]).max() <= 1
    assert set(labels[stratified(labels, 3, seed=0)]) == {0, 1, 2}
    assert np.array_equal(chosen, stratified(labels, 100, seed=3))
    assert not np.array_equal(chosen, stratified(labels, 100, seed=4))
    assert np.array_equal(stratified(labels, 5000, seed=0), np.arange(1000))


@pytest.mark.quick
def test_hold_out_splits_and_keeps_every_class_to_fit_on():
    labels = np.array([0] * 50 + [1] * 5 + [2] * 2 + [3])
    fit, held = hold_out(labels, seed=0)
    assert sorted([*fit, *held]) == list(range(58))
    assert np.array_equal(np.bincount(labels[held], minlength=4), [10, 1, 0, 0])


class Tiny(nn.Module):
    """An encoder whose dropout would show if it were left training."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(3).eval()

    def forward(self, images: Tensor) -> Any:
        assert not torch.is_grad_enabled()
        patches = self.drop(images.flatten(2).transpose(1, 2))
        return SimpleNamespace(pooled=patches.mean(1), patches=patches)


@pytest.mark.quick
def test_extract_restores_what_it_touches():
    images = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    encoder = Tiny().train()
    encoder.frozen.eval()

    def batches() -> Any:
        for part in images.split(4):
            torch.rand(1)  # as a loader draws a seed for its workers
            yield SimpleNamespace(images=part)

    state = torch.get_rng_state()
    found = extract(encoder, batches(), transform=lambda x: 2 * x)
    assert torch.equal(state, torch.get_rng_state())
    assert encoder.training
    assert encoder.drop.training
    assert not encoder.frozen.training
    torch.testing.assert_close(found.patches, 2 * images.flatten(2).transpose(1, 2))
    torch.testing.assert_close(found.pooled, found.patches.mean(1))
    assert extract(encoder, batches(), with_patches=False).patches.shape == (10, 0, 3)
    with pytest.raises(InputError, match="no images"):
        extract(encoder, [])


@pytest.mark.quick
def test_extract_goes_to_half_precision_when_tokens_are_many(monkeypatch: pytest.MonkeyPatch):
    batches: Any = [SimpleNamespace(images=torch.full((4, 3, 4, 4), value)) for value in (1.0, 1e6, 2.0)]
    monkeypatch.setattr(features_module, "FULL_PRECISION_BYTES", 1000)
    found = extract(Tiny(), batches)
    assert found.patches.dtype == torch.float16
    assert found.pooled.dtype == torch.float32
    assert torch.equal(found.patches[::4, 0, 0], torch.tensor([1.0, 65504.0, 2.0]).half())


def test_probe_features():
    x, y, test_x, test_y = made_tokens()
    train, test = (
        Labelled(Features(tokens.mean(1), tokens, np.arange(len(labels))), labels)
        for tokens, labels in ((x, y), (test_x, test_y))
    )
    found = probe_features(train, test)
    assert list(found) == ["linear", "attentive", "knn"]
    np.testing.assert_array_equal(found["knn"].correct, knn(x.mean(1), y, test_x.mean(1), test_y).correct)
    np.testing.assert_array_equal(found["attentive"].correct, attentive(x, y, test_x, test_y).correct)
    patients = [str(k // 2) for k in range(len(test_y))]
    grouped = probe_features(train, test._replace(groups=patients), kinds=["linear"])["linear"]
    assert grouped.accuracy == found["linear"].accuracy
    assert grouped.standard_error != found["linear"].standard_error
    with pytest.raises(InputError, match="no probe 'lineal'; there are: linear, attentive, knn"):
        probe_features(train, test, kinds=["lineal"])


@pytest.mark.quick
def test_the_error_of_a_mean_and_of_a_paired_difference_is_that_of_its_images():
    rng = np.random.default_rng(0)
    after, before = rng.random(50), rng.random(50)
    found = means({"mae": after}).numbers()
    assert found == {"mae": pytest.approx(after.mean()), "mae_error": pytest.approx(stats.sem(after))}
    gain = means({"mae": after}).above(means({"mae": before}))
    assert gain["mae_error"] == pytest.approx(stats.sem(after - before))
    hits = rng.random(50) < 0.3
    share = hits.mean()
    assert means({"accuracy": hits}).numbers()["accuracy_error"] == pytest.approx(math.sqrt(share * (1 - share) / 50))


def test_a_bootstrap_redraws_whole_groups():
    rng = np.random.default_rng(0)
    scores = np.repeat(rng.normal(size=25), 16)  # 16 equal images of each of 25 patients
    patients = [f"patient {k // 16}" for k in range(400)]
    places = redraw(400, patients, np.random.default_rng(1))
    assert set(np.unique(places // 16, return_counts=True)[1] % 16) == {0}
    strange = rng.normal(1.0, size=800)
    by_image, by_patient = (separation(scores, strange, 0, groups).numbers() for groups in (None, patients))
    once = separation(scores[::16], strange).numbers()  # what 25 images give
    assert by_patient["auroc"] == by_image["auroc"]
    assert by_patient["auroc_error"] == pytest.approx(once["auroc_error"], rel=0.2)
    assert by_patient["auroc_error"] > 2.5 * by_image["auroc_error"]


@pytest.mark.quick
def test_the_error_of_miou_is_that_of_the_groups():
    rng = np.random.default_rng(0)
    each = []
    for hit in np.repeat(rng.random(25), 16):
        truth = rng.integers(0, 2, (8, 8))
        each.append(confusion_of(truth, np.where(rng.random((8, 8)) < hit, truth, 1 - truth), 2))
    confusions, patients = np.stack(each), [str(k // 16) for k in range(400)]
    by_image, by_patient = (measures(confusions, groups).numbers() for groups in (None, patients))
    shares = np.array([np.trace(counts) / counts.sum() for counts in confusions]).reshape(25, 16).mean(1)
    assert by_patient["pixel_accuracy_error"] == pytest.approx(stats.sem(shares), rel=0.2)
    assert by_patient["pixel_accuracy_error"] > 2.5 * by_image["pixel_accuracy_error"]
