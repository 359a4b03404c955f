"""Probes that cannot flatter, as a run asks for them."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_pictures
from PIL import Image

import underpaint
from underpaint.data import ImageSet, Indices, Source, load_images, open_source, pretraining_indices
from underpaint.evaluation import probes as probes_module
from underpaint.evaluation.probes import ProbeSuite
from underpaint.evaluation.visualizations import write_visualizations
from underpaint.patches import Standardize

SIZE = (16, 16)


def judge_of(folder: Path) -> ProbeSuite:
    def load(source: Source, indices: Indices) -> ImageSet:
        return load_images(source, indices, size=SIZE)

    source = open_source(folder)
    indices = pretraining_indices(source)
    return ProbeSuite.of(source, load, load(source, indices), indices, SIZE, seed=0)


@pytest.fixture
def encoder() -> Any:
    torch.manual_seed(0)
    return underpaint.encoder("vit_tiny_patch16_224", image_size=SIZE, patch_size=4, embed_dim=32, depth=2, num_heads=2)


STANDARDIZE = Standardize([0.5] * 3, [0.25] * 3)


def test_a_copy_of_the_untrained_weights_gains_exactly_nothing(pictures: Path, encoder: Any) -> None:
    judge = judge_of(pictures)
    found = judge.final(judge.see(encoder, STANDARDIZE), judge.see(copy.deepcopy(encoder), STANDARDIZE), STANDARDIZE)
    for gain in found["gain"].values():
        assert gain == {"difference": 0.0, "standard_error": 0.0}
    assert found["encoder"] == found["untrained"]
    assert found["train"] + found["test"] == 90


def test_shuffled_labels_give_chance(tmp_path: Path, encoder: Any) -> None:
    folder = write_pictures(tmp_path / "pictures", 600)
    judge = judge_of(folder)
    assert judge.splits is not None
    known = judge.quick(encoder, STANDARDIZE)
    assert known["linear"] > 0.6  # stripes of three directions are easy
    shuffled = np.random.default_rng(0).permutation(np.array([0, 1, 2] * 200))
    for part in judge.splits:
        part.images.labels[:] = [int(label) for label in shuffled[: len(part.images)]]
        shuffled = shuffled[len(part.images) :]
    guessed = judge.quick(encoder, STANDARDIZE)
    for kind in ("linear", "attentive", "knn"):
        assert abs(guessed[kind] - 1 / 3) < 4 * guessed[f"{kind}_error"], kind


def test_the_test_part_is_neither_trained_on_nor_chosen_by(pictures: Path, encoder: Any) -> None:
    judge = judge_of(pictures)
    assert judge.splits is not None
    train, test = judge.splits
    assert not {train.images.names[k] for k in train.indices} & {test.images.names[k] for k in test.indices}
    seen = judge.see(encoder, STANDARDIZE)
    before = judge.final(seen, seen, STANDARDIZE)
    test.images.labels[:] = list(reversed(test.images.labels))
    seen = judge.see(encoder, STANDARDIZE)
    after = judge.final(seen, seen, STANDARDIZE)
    for kind in ("linear", "attentive", "knn"):
        assert after["encoder"][kind]["chosen"] == before["encoder"][kind]["chosen"]


def test_probes_leave_training_as_it_was(pictures: Path, encoder: Any) -> None:
    encoder.train()
    state = torch.get_rng_state()
    judge_of(pictures).quick(encoder, STANDARDIZE)
    assert torch.equal(torch.get_rng_state(), state)
    assert encoder.training
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_images_of_one_patient_are_judged_as_one(tmp_path: Path, encoder: Any) -> None:
    folder = write_pictures(tmp_path / "pictures", 90)

    def load(source: Source, indices: Indices) -> ImageSet:
        return load_images(source, indices, size=SIZE)

    source = open_source(folder, groups=r"(\d)\.\w+$")
    indices = pretraining_indices(source)
    judge = ProbeSuite.of(source, load, load(source, indices), indices, SIZE, seed=0)
    assert judge.splits is not None
    names = [re.findall(r"(\d)\.\w+$", name)[0] for name in judge.splits[1].images.names]
    assert judge.splits[1].images.groups == names
    worths = {"encoder": judge.worth(encoder, STANDARDIZE, 1), **judge.baselines(1)}
    for worth in worths.values():
        for probes in worth.probes.values():
            assert (probes[0].groups == np.unique(names, return_inverse=True)[1]).all()
    assert judge_of(folder).pool.groups is None


def test_the_last_probe_the_judgement_and_the_pictures_share_one_pass(
    tmp_path: Path, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_pictures(tmp_path / "pictures", 120)
    judge = judge_of(folder)
    judge.quick_sizes = (40, 15)
    monkeypatch.setattr(probes_module, "ATTENTIVE_TRAIN", 60)
    alone = judge.quick(encoder, STANDARDIZE), judge.worth(encoder, STANDARDIZE)
    counts: list[int] = []
    encoder.register_forward_hook(lambda module, given, made: counts.append(len(given[0])))
    seen = judge.see(encoder, STANDARDIZE)
    shared = judge.quick(encoder, STANDARDIZE, seen), judge.worth(encoder, STANDARDIZE, seen=seen)
    assert sum(counts) == 120
    assert shared[0] == pytest.approx(alone[0], abs=1e-3)  # other batches, other rounding
    assert shared[1].counts == alone[1].counts
    for name, (probe,) in alone[1].probes.items():
        assert (shared[1].probes[name][0].correct != probe.correct).mean() < 0.05, name
    known = seen.known(judge)
    write_visualizations(encoder, encoder, judge, STANDARDIZE, tmp_path / "out", known=(known, known))
    assert sum(counts) - 120 == 2 * (96 + 6)  # the colours of patches alone: the attentive probe has tokens of 60 of 96
    looks = (tmp_path / "out" / "looks.json").read_text()
    write_visualizations(encoder, encoder, judge, STANDARDIZE, tmp_path / "again")
    assert (tmp_path / "again" / "looks.json").read_text() == looks


def test_what_was_glanced_at_is_extended_and_no_probe_is_fitted_twice(
    tmp_path: Path, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = judge_of(write_pictures(tmp_path / "pictures", 120))
    assert judge.splits is not None
    judge.quick_sizes = (40, 2_000)
    monkeypatch.setattr(probes_module, "ATTENTIVE_TRAIN", 60)
    whole = judge.see(encoder, STANDARDIZE)
    glance = judge.glance(encoder, STANDARDIZE)
    glanced = judge.quick(encoder, STANDARDIZE, glance)
    counts: list[int] = []
    encoder.register_forward_hook(lambda module, given, made: counts.append(len(given[0])))
    seen = judge.see(encoder, STANDARDIZE, glance)
    assert sum(counts) == 96 - 40  # the test part was known, and 40 of those to train on
    assert glance.bytes == 4 * 32 * (40 + 24) * (1 + 16)
    for one, other in ((seen.sides, whole.sides), (seen.tokens, whole.tokens)):
        assert one is not None
        assert other is not None
        for side, expected in zip(one, other, strict=True):
            assert (side.features.samples == expected.features.samples).all()
            torch.testing.assert_close(side.features.pooled, expected.features.pooled, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(side.features.patches, expected.features.patches, rtol=1e-5, atol=1e-5)
    fitted: list[int] = []
    plain = probes_module.probe_features
    monkeypatch.setattr(
        probes_module, "probe_features", lambda *given, **more: fitted.append(1) or plain(*given, **more)
    )
    assert judge.quick(encoder, STANDARDIZE, seen) == glanced  # found already
    assert not fitted
    judge.worth(encoder, STANDARDIZE, seen=seen)
    judge.worth(encoder, STANDARDIZE, seen=seen)
    assert len(fitted) == 3


def test_pictures_of_what_is_known_need_no_encoder(tmp_path: Path, encoder: Any) -> None:
    judge = judge_of(write_pictures(tmp_path / "pictures", 120))
    known = judge.see(encoder, STANDARDIZE).known(judge)
    write_visualizations(encoder, encoder, judge, STANDARDIZE, tmp_path / "plain")
    encoder.register_forward_hook(lambda *given: pytest.fail("extracted again"))
    write_visualizations(encoder, encoder, judge, STANDARDIZE, tmp_path / "out", known=(known, known))
    for name in ("features.png", "neighbours.png"):
        made, plain = (np.asarray(Image.open(tmp_path / at / name), int) for at in ("out", "plain"))
        assert np.abs(made - plain).max() <= 1, name  # other batches, other rounding


def test_without_labels_the_rank_and_the_pictures_share_one_pass(tmp_path: Path, encoder: Any) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in sorted(write_pictures(tmp_path / "made", 60).rglob("*.png")):
        path.rename(folder / path.name)
    judge = judge_of(folder)
    assert judge.splits is None
    counts: list[int] = []
    encoder.register_forward_hook(lambda module, given, made: counts.append(len(given[0])))
    seen = judge.see(encoder, STANDARDIZE, judge.glance(encoder, STANDARDIZE))
    known = seen.known(judge)
    assert judge.worth(encoder, STANDARDIZE, seen=seen).rank == judge.quick(encoder, STANDARDIZE, seen)["rank"]
    write_visualizations(encoder, encoder, judge, STANDARDIZE, tmp_path / "out", known=(known, known))
    assert sum(counts) == 60 + 2 * (60 + 6)  # the colours of patches alone
