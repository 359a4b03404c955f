import itertools
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage.data
import tifffile
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torch.nn import functional
from torchvision.transforms import RandomResizedCrop

import underpaint.data.crop as crop_module
import underpaint.data.images as images_module
import underpaint.data.loader as loader_module
import underpaint.data.parallel as parallel_module
from underpaint.data import (
    Batch,
    Crops,
    ImageSet,
    Unreadable,
    centre_boxes,
    crop_resize,
    draw_crops,
    eval_batches,
    load_images,
    open_source,
    pretraining_indices,
    steps_per_epoch,
    train_batches,
)
from underpaint.data.parallel import WorkerLost, ordered_map, reading_workers, within_memory
from underpaint.errors import InputError
from underpaint.signals import WATCHED

sys.path.insert(0, str(Path(__file__).parent))
from test_data_decode import write_broken

pytestmark = pytest.mark.quick
SIZE = (16, 16)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("UNDERPAINT_CACHE", str(folder))
    return folder


def write_images(folder: Path, count: int = 24, ragged: bool = True, kind: str = "png") -> Path:
    draws = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        height, width = draws.integers(12, 60, 2) if ragged else (20, 20)
        Image.fromarray(draws.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{n:03}.{kind}")
    return folder


def load(data: Path, **options) -> ImageSet:
    source = open_source(data)
    return load_images(source, pretraining_indices(source), **{"size": SIZE, **options})


def first(images: ImageSet, count: int = 5, **options) -> list[Batch]:
    reading = {name: options.pop(name) for name in ("first_batch", "workers", "on_skip", "device") if name in options}
    batches = train_batches(Crops(images, **{"size": SIZE, "batch_size": 8, "seed": 1, **options}), **reading)
    taken = list(itertools.islice(batches, count))
    batches.close()  # type: ignore[attr-defined]
    return taken


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.samples == b.samples
        assert torch.equal(a.images, b.images)


# Crops


@pytest.mark.parametrize("size", [(16, 16), (9, 31), (40, 50)])
def test_crop_resize_is_antialiased_interpolation_of_the_box(size):
    images = torch.rand(4, 3, 37, 45)
    boxes = torch.tensor([[0, 0, 37, 45], [5, 7, 20, 11], [36, 44, 1, 1], [3, 0, 30, 45]], dtype=torch.float32)
    flips = torch.tensor([False, True, False, True])
    result = crop_resize(images, boxes, flips, size)
    for n, (top, left, height, width) in enumerate(boxes.int().tolist()):
        cut = images[n : n + 1, :, top : top + height, left : left + width]
        expected = functional.interpolate(cut, size, mode="bilinear", antialias=True, align_corners=False)[0]
        torch.testing.assert_close(result[n], expected.flip(2) if flips[n] else expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_large_images_are_resized_one_by_one_to_the_same(dtype, monkeypatch):
    """By the products most operations are with zeros."""
    images = torch.randint(0, 256, (5, 3, 150, 200)).to(dtype)
    boxes, flips = (torch.from_numpy(each) for each in draw_crops(0, 0, range(5), [(150, 200)] * 5, target=(80, 90)))
    assert flips.any()
    found = []
    for dense in (2**40, 0):
        monkeypatch.setattr(crop_module, "DENSE", dense)
        found.append(crop_resize(images, boxes, flips, (80, 90)) / 255)
    torch.testing.assert_close(*found, atol=3e-5, rtol=0)
    monkeypatch.undo()
    monkeypatch.setattr(crop_module, "_resize_weights", None)
    assert torch.equal(crop_resize(images, boxes, flips, (80, 90)) / 255, found[1])


def test_crop_resize_never_reads_outside_the_box():
    images = torch.full((1, 1, 20, 20), math.inf)
    images[:, :, 4:10, 3:12] = 0.25
    images[images.isinf()] = 1e6
    result = crop_resize(images, torch.tensor([[4.0, 3.0, 6.0, 9.0]]), torch.tensor([False]), (8, 8))
    torch.testing.assert_close(result, torch.full((1, 1, 8, 8), 0.25))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_crop_resize_of_a_whole_image_is_the_image(dtype):
    images = torch.randint(0, 256, (2, 3, 8, 8)).to(dtype)
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]] * 2)
    result = crop_resize(images, boxes, torch.zeros(2, dtype=torch.bool), (8, 8))
    assert torch.equal(result, images.float())


def test_crops_are_a_function_of_seed_epoch_and_sample_alone():
    samples, sizes = list(range(50)), [(30 + n, 70 - n) for n in range(50)]
    boxes, flips = draw_crops(3, 2, samples, sizes, target=SIZE)
    for n in (0, 7, 49):
        box, flip = draw_crops(3, 2, [n], [sizes[n]], target=SIZE)
        np.testing.assert_array_equal(box[0], boxes[n])
        assert flip[0] == flips[n]
    for seed, epoch in ((4, 2), (3, 1)):
        assert (draw_crops(seed, epoch, samples, sizes, target=SIZE)[0] != boxes).any(axis=1).mean() > 0.9


def test_crops_keep_to_their_ranges():
    sizes = [(100, 150)] * 4000
    boxes, flips = draw_crops(0, 0, range(4000), sizes, scale=(0.3, 0.6), target=(10, 20))
    area = boxes[:, 2] * boxes[:, 3] / 15_000
    aspect = boxes[:, 3] / boxes[:, 2] / 2
    assert area.min() > 0.28
    assert area.max() < 0.62
    assert aspect.min() > 0.72
    assert aspect.max() < 1.4
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= (100, 150)).all()
    assert (boxes == np.rint(boxes)).all()
    assert 0.45 < flips.mean() < 0.55
    assert not draw_crops(0, 0, [0, 1], sizes[:2], flip=False, target=SIZE)[1].any()
    long, _ = draw_crops(0, 0, range(200), [(10, 400)] * 200, scale=(0.9, 1.0), target=SIZE)
    assert (long[:, 2:] <= (10, 14)).all()
    assert len(np.unique(long[:, 1])) > 50  # a strip too long for the target is still cut at random places


def test_crops_are_distributed_as_torchvisions_where_its_tries_find_one():
    sizes, scale = [(100, 150)] * 2000, (0.2, 1.0)
    ours, _ = draw_crops(0, 0, range(2000), sizes, scale=scale, target=SIZE)
    torch.manual_seed(0)
    image = torch.zeros(3, 100, 150)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(2000)])
    for column in range(4):
        assert alike(ours[:, column], theirs[:, column])
    assert alike(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])


def alike(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether two samples may be of one distribution."""
    found: Any = ks_2samp(ours, theirs)
    return found.pvalue > 1e-3


def test_of_a_strip_every_place_is_cut_where_torchvision_cuts_its_centre():
    """A documented difference: no share of the area of such an image has the aspect that is wanted."""
    ours, _ = draw_crops(0, 0, range(400), [(20, 400)] * 400, scale=(0.3, 1.0), target=SIZE)
    image = torch.zeros(3, 20, 400)
    theirs = {tuple(RandomResizedCrop.get_params(image, [0.3, 1.0], [3 / 4, 4 / 3])) for _ in range(20)}
    assert theirs == {(0, 186, 20, 27)}  # the widest box of an allowed aspect, always in the middle
    tall = ours[:, 2:].max(axis=0)
    assert tall.tolist() == [20, 27]  # no larger than that one,
    aspect = ours[:, 3] / ours[:, 2]
    assert 0.72 < aspect.min() < 0.8  # of any allowed aspect as large as fits,
    assert (ours[:, 2] == 20).all()
    assert alike(ours[:, 1] / (400 - ours[:, 3]), np.linspace(0, 1, 1000))  # anywhere


def test_whole_image_can_be_asked_for():
    boxes, _ = draw_crops(0, 0, range(9), [(32, 32)] * 9, scale=(1.0, 1.0), ratio=(1.0, 1.0), target=SIZE)
    assert (boxes == (0, 0, 32, 32)).all()


def test_centre_boxes():
    np.testing.assert_array_equal(centre_boxes([(20, 40), (40, 20)], (8, 8)), [[0, 10, 20, 20], [10, 0, 20, 20]])
    np.testing.assert_array_equal(centre_boxes([(30, 30)], (8, 16)), [[7, 0, 15, 30]])


# Image sets


def test_cache_holds_the_images(tmp_path, cache):
    images = load(write_images(tmp_path))
    assert images.cached
    assert len(images) == 24
    assert images.names[0] == "000.png"
    assert (images.scaling.low, images.scaling.high) == ((0,) * 3, (255,) * 3)
    for n in range(24):
        original = np.asarray(Image.open(tmp_path / images.names[n]))
        raw = images.raw(n)
        assert min(raw.shape[:2]) <= 32
        if min(original.shape[:2]) <= 32:
            np.testing.assert_array_equal(raw, original)
    assert len(images.mean) == len(images.std) == 3
    assert all(abs(m - 0.5) < 0.02 for m in images.mean)
    assert [p.name for p in cache.iterdir() if "." in p.name] == []


@pytest.mark.seconds
def test_cache_is_used_again_and_made_again(tmp_path, cache, monkeypatch):
    data = write_images(tmp_path / "data")
    write_broken(data)
    images = load(data)
    calls = []
    monkeypatch.setattr("underpaint.data.images.decode_known", lambda *a, **k: calls.append(1))
    again = load(data)
    assert calls == []
    assert (again.names, again.skipped, again.mean, again.std) == (
        images.names,
        images.skipped,
        images.mean,
        images.std,
    )
    expected = images.raw(3)
    np.testing.assert_array_equal(again.raw(3), expected)
    monkeypatch.undo()
    monkeypatch.setenv("UNDERPAINT_CACHE", str(cache))
    (folder,) = cache.iterdir()
    with (folder / "pixels.bin").open("r+b") as file:
        file.truncate(100)
    np.testing.assert_array_equal(load(data).raw(3), expected)
    (folder / "set.json").write_text("{")
    np.testing.assert_array_equal(load(data).raw(3), expected)
    os.utime(data / "000.png", (1, 1))
    load(data)
    assert len(list(cache.iterdir())) == 2  # a changed file makes another set


@pytest.mark.seconds
def test_workers_build_the_same_cache(tmp_path, monkeypatch):
    data, made = write_images(tmp_path / "data", 70), []
    for workers in (0, 2):
        monkeypatch.setenv("UNDERPAINT_CACHE", str(tmp_path / f"cache{workers}"))
        made.append(load(data, workers=workers))
    one, two = made
    assert all(np.array_equal(one.raw(n), two.raw(n)) for n in range(70))


def statistics_of(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation, each image counting the same, by the definition."""
    units = [array.reshape(-1, array.shape[2]) / 255 for array in arrays]
    mean = np.mean([unit.mean(axis=0) for unit in units], axis=0)
    return mean, np.sqrt(np.mean([(unit**2).mean(axis=0) for unit in units], axis=0) - mean**2)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("broken", [0, 5])
def test_statistics_are_those_of_evenly_spaced_images_that_can_be_read(broken, workers, tmp_path, monkeypatch):
    """They are measured while images are decoded; which ones count is known only when all have been tried."""
    monkeypatch.setattr(images_module, "SAMPLED_IMAGES", 7)
    data = write_images(tmp_path / "data", 40)
    for n in range(broken):
        (data / f"{n:03}.png").write_bytes(b"broken")
    images = load(data, workers=workers)
    assert images.pixels is not None
    chosen = np.linspace(0, 39 - broken, 7).round().astype(int).tolist()
    mean, std = statistics_of([images.raw(k) for k in chosen])
    np.testing.assert_allclose(images.mean, mean, rtol=1e-7)
    np.testing.assert_allclose(images.std, std, rtol=1e-7)
    others = statistics_of([images.raw(k) for k in range(7)])
    assert abs(others[0] - mean).max() > 1e-4  # so that it would be seen


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_moments_are_the_means_of_values_and_squares(channels):
    array = np.random.default_rng(0).integers(0, 256, (30, 41, channels), dtype=np.uint8)
    unit = (array.astype(np.float32) / 255).reshape(-1, channels)  # as they were measured before there were histograms
    for found, wanted in zip(images_module._moments(array[::-1]), (unit, unit**2), strict=True):
        np.testing.assert_allclose(found, wanted.mean(axis=0, dtype=np.float64), rtol=1e-13)


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_workers_measure_the_same_sample(kind, tmp_path, monkeypatch):
    """Of a set that is streamed, and of 16 bit, whose range is measured too."""
    draws = np.random.default_rng(0)
    data = write_images(tmp_path / "data", 12) if kind == "png" else tmp_path / "data"
    data.mkdir(exist_ok=True)
    for n in range(12 if kind == "tif" else 0):
        deep = draws.integers(1000, 5000, (20 + n, 30, 3), dtype=np.uint16)
        tifffile.imwrite(data / f"{n:03}.tif", deep, photometric="rgb")
    (data / f"003.{kind}").write_bytes(b"broken")
    made = []
    for workers in (0, 2):
        monkeypatch.setenv("UNDERPAINT_CACHE", str(tmp_path / f"cache{workers}"))
        made.append(load(data, workers=workers, cache_limit=0.0))
    one, two = ((images.mean, images.std, images.scaling, images.skipped, images.notes) for images in made)
    assert one == two
    assert [skip["path"] for skip in one[3]] == [f"003.{kind}"]


def test_large_images_have_a_process_for_each_core_and_small_ones_none(tmp_path, cache, monkeypatch):
    asked = []

    def counted(function: Any, keys: Any, workers: int, *rest: Any) -> Any:
        asked.append(workers)
        return ordered_map(function, keys, 0)

    monkeypatch.setattr(images_module, "ordered_map", counted)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(3), raising=False)
    data = write_images(tmp_path / "data", 24)
    load(data)
    monkeypatch.setattr(parallel_module, "MANY_PIXELS", 24 * 20 * 20)
    load(data, size=(8, 8))
    load(data, size=(8, 8), cache_limit=0.0)
    assert asked == [0, 3, 3]


def test_each_block_of_the_cache_has_its_checksum(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(images_module, "BLOCK", 1000)
    data = write_images(tmp_path / "data")
    expected = load(data)
    assert load(data).notes == expected.notes  # nothing is damaged
    (folder,) = cache.iterdir()
    with (folder / "pixels.bin").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.tell()
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([value ^ 1]))
    damaged = load(data).notes
    assert f"another checksum from byte {last // 1000 * 1000:,} on" in damaged[0]


@pytest.mark.seconds
@pytest.mark.parametrize("cache_limit", [2.0, 0.0])
def test_broken_files_are_reported_and_never_fatal(tmp_path, cache_limit):
    data = write_images(tmp_path / "data")
    broken = write_broken(data)
    source = open_source(data)
    images = load_images(source, pretraining_indices(source), size=SIZE, cache_limit=cache_limit)
    reported = {skip["path"] for skip in source.skipped + images.skipped}
    assert reported == set(broken)
    assert all(skip["reason"] for skip in images.skipped)
    told: list[dict] = []
    for batch in first(images, 30, on_skip=told.append):
        assert batch.images.shape == (8, 3, 16, 16)
        assert not {images.names[s] for s in batch.samples} & reported
    assert len({skip["path"] for skip in told}) == len(told)
    assert ({skip["path"] for skip in told} == set()) == images.cached
    seen = [s for batch in eval_batches(images, size=SIZE, batch_size=5) for s in batch.samples]
    assert [images.names[s] for s in seen] == [f"{n:03}.png" for n in range(24)]


@pytest.mark.parametrize("cache_limit", [2.0, 0.0])
def test_no_readable_image_is_an_input_error(tmp_path, cache_limit):
    for n in range(3):
        (tmp_path / f"{n}.jpg").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"none of 3 images could be read, the first: 0\.jpg: not a JPEG"):
        load(tmp_path, cache_limit=cache_limit)


def test_unwritable_cache_falls_back_to_memory(tmp_path, cache, monkeypatch):
    data = write_images(tmp_path / "data")
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNDERPAINT_CACHE", str(tmp_path / "file" / "below"))
    images = load(data)
    assert images.cached
    assert "held in memory" in images.notes[0]
    streamed = load(data, cache_limit=0.0)
    assert "measures again" in streamed.notes[1]
    monkeypatch.setenv("UNDERPAINT_CACHE", str(cache))
    assert_same(first(images), first(load(data)))


def test_deep_and_float_images_are_scaled_once(tmp_path):
    draws = np.random.default_rng(0)
    for n in range(4):
        tifffile.imwrite(
            tmp_path / f"{n}.tif",
            draws.integers(1000, 5000, (20, 20, 5), dtype=np.uint16),
            photometric="minisblack",
            planarconfig="contig",
        )
    for limit in (2.0, 0.0):
        images = load(tmp_path, channels=5, cache_limit=limit)
        assert images.dtype == "uint16"
        assert all(low < 1050 for low in images.scaling.low)
        assert all(4950 < high < 5000 for high in images.scaling.high)
        assert all(abs(m - 0.5) < 0.05 for m in images.mean)
        (batch,) = first(images, 1, batch_size=4)
        assert batch.images.shape == (4, 5, 16, 16)
        assert 0 <= batch.images.min() < batch.images.max() <= 1
    real = tmp_path / "real"
    real.mkdir()
    tifffile.imwrite(real / "0.tif", draws.normal(20, 5, (20, 20)).astype(np.float32))
    images = load(real, channels=1)
    (batch,) = first(images, 1)
    assert images.dtype == "float32"
    assert 0 <= batch.images.min() < batch.images.max() <= 1


def test_8_and_16_bit_in_one_set_meet_at_full_scale(tmp_path):
    white = np.full((20, 20), 255, np.uint8)
    Image.fromarray(white).save(tmp_path / "0.png")
    tifffile.imwrite(tmp_path / "1.tif", white.astype(np.uint16))
    images = load(tmp_path, channels=1)
    assert images.raw(0).max() == 65535
    assert images.raw(1).max() == 255


def test_alpha_is_composed_on_the_mean_of_the_set(tmp_path):
    red = np.zeros((20, 20, 4), np.uint8)
    red[:10, :, 0], red[:10, :, 3] = 200, 255
    Image.fromarray(red).save(tmp_path / "0.png")
    raw = load(tmp_path).raw(0)
    np.testing.assert_allclose(raw[15, 15], [200, 0, 0], atol=1)


# Batches


@pytest.fixture(params=["uniform", "ragged", "streamed", "streamed jpeg"])
def images(request, tmp_path) -> ImageSet:
    kind = request.param
    data = write_images(tmp_path / "data", ragged=kind != "uniform", kind="jpeg" if "jpeg" in kind else "png")
    if kind == "streamed":
        write_broken(data)
    return load(data, cache_limit=0.0 if "streamed" in kind else 2.0)


def test_batches_are_in_range_and_of_the_right_shape(images):
    for batch in first(images):
        assert batch.images.shape == (8, 3, 16, 16)
        assert batch.images.dtype == torch.float32
        assert batch.images.min() >= 0
        assert batch.images.max() <= 1
        assert len(batch.samples) == 8


@pytest.mark.parametrize("number", WATCHED)
def test_a_signal_to_the_group_leaves_workers_to_the_main_process(number):
    def disposition(_: int) -> bool:
        return signal.getsignal(number) == signal.SIG_IGN

    assert list(ordered_map(disposition, range(4), 2)) == [True] * 4


@pytest.mark.seconds
def test_workers_do_not_change_batches(images):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    ours = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    one, two = (first(images, 7, workers=w) for w in (0, 2))
    assert_same(one, two)
    assert torch.equal(state, torch.get_rng_state())
    assert ours == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert multiprocessing.active_children() == []


@pytest.mark.seconds
def test_resumed_batches_are_the_unbroken_ones(images):
    unbroken = first(images, 9)
    assert_same(unbroken[5:], first(images, 4, first_batch=5))


@pytest.mark.seconds
def test_ranks_rows_make_up_the_batch(images):
    whole = first(images, 4)
    parts = [first(images, 4, rank=rank, world=2) for rank in range(2)]
    for batch, left, right in zip(whole, *parts, strict=True):
        assert batch.samples == left.samples + right.samples
        torch.testing.assert_close(batch.images, torch.cat([left.images, right.images]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="batch_size 8"):
        Crops(images, size=SIZE, batch_size=8, seed=0, world=3)


@pytest.mark.seconds
def test_a_pickled_set_gives_the_same(images):
    assert_same(first(images), first(pickle.loads(pickle.dumps(images))))


def test_epochs_are_permutations(tmp_path):
    images = load(write_images(tmp_path, 24))
    assert steps_per_epoch(images, 8) == 3
    batches = first(images, 6)
    epochs = [[s for batch in batches[e : e + 3] for s in batch.samples] for e in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24))
    assert epochs[0] != epochs[1]
    seeds = [first(images, 1, seed=seed)[0].samples for seed in (1, 2)]
    assert seeds[0] != seeds[1]


def test_a_set_smaller_than_the_batch_repeats(tmp_path):
    images = load(write_images(tmp_path, 3))
    assert steps_per_epoch(images, 8) == 1
    batches = first(images, 3)
    samples = [s for batch in batches for s in batch.samples]
    for epoch in range(8):
        assert sorted(samples[3 * epoch : 3 * epoch + 3]) == [0, 1, 2]
    assert not torch.equal(batches[0].images[0], batches[0].images[samples[3:6].index(samples[0]) + 3])


@pytest.mark.seconds
def test_eval_batches_resize_and_crop_the_centre(images):
    batches = list(eval_batches(images, size=SIZE, batch_size=7))
    samples = [s for batch in batches for s in batch.samples]
    assert samples == [n for n in range(len(images)) if images.names[n][:3].isdigit()]
    assert_same(batches, list(eval_batches(images, size=SIZE, batch_size=7, workers=2)))
    (batch,) = eval_batches(images, size=SIZE, indices=samples[3:5])
    assert batch.samples == samples[3:5]
    raw = torch.from_numpy(images.raw(samples[3])).permute(2, 0, 1)[None].float() / 255
    top, left, height, width = centre_boxes([(raw.shape[2], raw.shape[3])], SIZE)[0].astype(int).tolist()
    cut = raw[:, :, top : top + height, left : left + width]
    expected = functional.interpolate(cut, SIZE, mode="bilinear", antialias=True)[0]
    assert (batch.images[0] - expected).abs().mean() < (0.01 if images.cached else 0.03)


def test_streamed_large_jpegs_are_reduced_to_the_same_picture(tmp_path):
    y, x = np.mgrid[:600, :800]
    smooth = np.stack([127 + 120 * np.sin(x / 60), 127 + 120 * np.cos(y / 50), (x + y) / 6], axis=2).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "0.jpg", quality=95)
    streamed = load(tmp_path, cache_limit=0.0)
    (batch,) = eval_batches(streamed, size=(32, 32))
    cut = torch.from_numpy(smooth[:, 100:700]).permute(2, 0, 1)[None].float() / 255
    expected = functional.interpolate(cut, (32, 32), mode="bilinear", antialias=True)
    assert (batch.images - expected).abs().max() < 0.05


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("kind", "cache_limit", "least"), [("png", 2.0, 0.94), ("png", 0.0, 0.94), ("jpeg", 2.0, 0.92), ("jpeg", 0.0, 0.94)]
)
def test_contrast_of_fine_detail_outlives_the_second_resize(kind, cache_limit, least, tmp_path):
    """Squared differences of neighbours, over those of one resize from the file by Pillow."""
    for name in ("astronaut", "coffee"):
        Image.fromarray(getattr(skimage.data, name)()).save(tmp_path / f"{name}.{kind}", quality=95)
    images = load(tmp_path, size=(64, 64), cache_limit=cache_limit)
    found = wanted = squares = 0.0
    batches = first(images, 8, size=(64, 64), batch_size=2, seed=0)
    for epoch, batch in enumerate(batches):
        for got, sample in zip(batch.images, batch.samples, strict=True):
            whole = Image.open(tmp_path / images.names[sample])
            shape = np.array(whole.size[::-1]) if images.pixels is None else images.pixels.shapes[sample, :2]
            boxes, flips = draw_crops(0, epoch, [sample], shape[None], target=(64, 64))
            top, left, height, width = (
                boxes[0] * np.tile([whole.height / shape[0], whole.width / shape[1]], 2)
            ).tolist()
            once = whole.resize((64, 64), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
            expected = np.asarray(once)[:, ::-1] if flips[0] else np.asarray(once)
            expected = torch.from_numpy(expected.copy()).permute(2, 0, 1) / 255
            found, wanted = found + gradient_energy(got), wanted + gradient_energy(expected)
            squares += float((got - expected).square().mean()) / 16
    assert least < found / wanted < 1.02
    assert squares**0.5 < (0.016 if kind == "jpeg" else 0.008)


def gradient_energy(image: torch.Tensor) -> float:
    return float(image.diff(dim=1).square().mean() + image.diff(dim=2).square().mean())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_reducing_stays_within_the_range_of_the_image(dtype, tmp_path):
    """Bicubic overshoots at edges; what is below 0 would wrap around to white."""
    edges = np.kron(np.random.default_rng(0).integers(0, 2, (20, 20)), np.ones((10, 10))).astype(dtype)
    edges = edges * np.iinfo(dtype).max if dtype != np.float32 else edges
    tifffile.imwrite(tmp_path / "0.tif", edges)
    (batch,) = eval_batches(load(tmp_path, channels=1, size=(50, 50)), size=(50, 50))
    expected = Image.fromarray((edges > 0).astype(np.float32)).resize((50, 50), Image.Resampling.BILINEAR)
    assert np.abs(batch.images[0, 0].numpy() - np.asarray(expected)).max() < 0.15


@pytest.mark.seconds
def test_another_sample_stands_in_for_a_broken_one_in_each_epoch(tmp_path):
    data = write_images(tmp_path, 24)
    (data / "000.png").write_bytes(b"broken")
    images = load(data, cache_limit=0.0)
    batches = first(images, 24, indices=range(24), batch_size=12)  # 12 epochs

    def stand_ins(found: list[Batch]) -> list[int]:
        """Who is there twice."""
        epochs = [[s for batch in found[k : k + 2] for s in batch.samples] for k in range(0, len(found), 2)]
        return [next(s for s in epoch if epoch.count(s) == 2) for epoch in epochs]

    who = stand_ins(batches)
    assert len(set(who)) > 6
    assert who == stand_ins(first(images, 24, indices=range(24), batch_size=12, workers=2))
    assert who != stand_ins(first(images, 24, indices=range(24), batch_size=12, seed=2))
    assert_same(batches[7:9], first(images, 2, indices=range(24), batch_size=12, first_batch=7))


def test_what_cannot_be_streamed_raises_in_raw(tmp_path):
    data = write_images(tmp_path / "data")
    (data / "text.png").write_bytes(b"text")
    images = load(data, cache_limit=0.0)
    assert images.raw(0).ndim == 3
    with pytest.raises(Unreadable):
        images.raw(images.names.index("text.png"))
    assert json.loads(json.dumps(images.skipped)) == images.skipped


# Reading ahead


def small_parts(monkeypatch: pytest.MonkeyPatch, rows: int, in_flight: int | None = None) -> int:
    """Cut-outs are handed over `rows` at a time; returns the bytes of so many of 16 px, at most."""
    part = rows * 3 * 44 * 44
    monkeypatch.setattr(loader_module, "PART", part)
    if in_flight is not None:
        monkeypatch.setattr(parallel_module, "IN_FLIGHT", in_flight * part)
    return part


@pytest.mark.seconds
def test_batches_in_parts_are_the_same_batches(images, monkeypatch):
    whole = first(images, 3)
    judged = list(eval_batches(images, size=SIZE, batch_size=7))
    small_parts(monkeypatch, 3)
    parts = first(images, 3)
    for found, wanted in zip([*parts, *eval_batches(images, size=SIZE, batch_size=7)], [*whole, *judged], strict=True):
        assert found.samples == wanted.samples
        torch.testing.assert_close(found.images, wanted.images, atol=1e-5, rtol=0)
    assert_same(parts, first(images, 3, workers=2))
    assert_same(parts[2:], first(images, 1, workers=1, first_batch=2))
    assert_same(*(list(eval_batches(images, size=SIZE, batch_size=7, workers=w)) for w in (0, 2)))


@pytest.mark.seconds
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than cores
@pytest.mark.parametrize("bounded", [True, False])
def test_bytes_in_flight_are_bounded(bounded, tmp_path, monkeypatch):
    images = load(write_images(tmp_path, 24), cache_limit=0.0)
    part = small_parts(monkeypatch, 4, in_flight=6)
    bound = 6 * part
    if not bounded:
        monkeypatch.setattr(loader_module, "PART", 2**25)
        monkeypatch.setattr(parallel_module, "IN_FLIGHT", 2**30)
    made, used, most = multiprocessing.get_context("fork").Value("q", 0), 0, 0
    cut, crop = Crops.__call__, crop_resize

    def making(crops: Crops, batch: int, rows: slice) -> Any:
        cutouts = cut(crops, batch, rows)
        with made.get_lock():
            made.value += cutouts.pixels.nbytes
        return cutouts

    def using(pixels: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal used, most
        before = -1
        while before != made.value:  # the workers get as far ahead as they may
            before = made.value
            time.sleep(0.1)
        most = max(most, made.value - used)
        used += pixels.nbytes
        return crop(pixels, *rest)

    monkeypatch.setattr(Crops, "__call__", making)
    monkeypatch.setattr(loader_module, "crop_resize", using)
    first(images, 4, workers=8, batch_size=16)
    assert (most <= bound) is bounded
    assert most > part


@pytest.mark.seconds
def test_no_cutout_is_larger_than_is_said(tmp_path):
    draws = np.random.default_rng(0)
    for n, (height, width) in enumerate([(10, 900), (900, 10), (300, 300), (8, 8)]):
        Image.fromarray(draws.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
    for limit in (0.0, 2.0):
        images = load(tmp_path, cache_limit=limit)
        for size in ((16, 16), (8, 64), (64, 8)):
            for batch in range(20):
                pixels = Crops(images, size, 4, 0)(batch).pixels
                assert pixels.shape[1] <= 2.75 * size[0]
                assert pixels.shape[2] <= 2.75 * size[1]
                assert pixels.nbytes <= 4 * loader_module.cutout_bytes(images, size)


@pytest.mark.parametrize(
    ("device", "cached", "results", "environment", "workers"),
    [
        ("cuda", True, None, {}, 8),
        ("cuda", False, None, {"LOCAL_WORLD_SIZE": "4"}, 3),
        ("cuda", False, None, {"LOCAL_WORLD_SIZE": "16"}, 1),
        ("cuda", False, None, {"SLURM_CPUS_PER_TASK": "6"}, 5),
        ("cuda", False, None, {"SLURM_CPUS_PER_TASK": "16", "LOCAL_WORLD_SIZE": "8"}, 1),  # torchrun below SLURM
        ("cuda", False, 11, {}, 2),  # what is soon over
        ("cuda", True, 3, {}, 0),
        ("cpu", True, None, {}, 0),
        ("cpu", False, None, {"LOCAL_WORLD_SIZE": "4"}, 2),
        ("cpu", False, None, {"LOCAL_WORLD_SIZE": "16"}, 0),
    ],
)
def test_workers_are_chosen_from_the_cores(device, cached, results, environment, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK", "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert reading_workers(device, cached, results) == workers


@pytest.mark.parametrize(
    ("shared", "processes", "size", "found"),
    [
        (64, 1, 32, (0, 1)),  # MiB: a container's default
        (1024, 1, 32, (6, 1)),
        (2**20, 1, 32, (8, 2)),
        (2**20, 1, 100, (8, 1)),
        (2**20, 1, 600, (0, 1)),
        (8 * 1024, 8, 32, (6, 1)),
    ],
)
def test_what_is_ahead_fits_into_shared_memory(shared, processes, size, found, monkeypatch, caplog):
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_frsize=2**20, f_blocks=shared))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert within_memory(8, size * 2**20) == found
    assert within_memory(0, size * 2**20) == (0, 1)
    assert ("--shm-size" in caplog.text) is (found[0] == 0)
    workers, prefetch = found
    if workers:  # one more is used, and one is being pinned
        assert (workers * prefetch + 2) * size <= min(1024, shared // 4 // processes)


@pytest.mark.seconds
def test_an_input_error_of_a_worker_is_one_line(tmp_path):
    images = load(write_images(tmp_path, 8), cache_limit=0.0)
    for file in tmp_path.iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"^\d+\.png and 100 images drawn in its place cannot be read$"):
        first(images, 1, workers=2)
    assert multiprocessing.active_children() == []


def test_want_of_shared_memory_is_one_line(monkeypatch):
    def no_room(tensor: torch.Tensor) -> None:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)
    with pytest.raises(WorkerLost, match=r"^a process that .* for want of shared memory \(/dev/shm\); fewer --workers"):
        list(ordered_map(torch.zeros, [(2,), (3,)], 1))
    assert multiprocessing.active_children() == []


@pytest.mark.seconds
def test_workers_leave_the_gpu_alone(images, monkeypatch):
    """They are forked, and a forked process that touches it fails."""
    expected = first(images, 3)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: os._exit(3))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os._exit(3))
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: os._exit(3), raising=False)
    assert_same(first(images, 3, workers=2), expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_are_those_of_the_cpu(images):
    torch.zeros(1, device="cuda")  # workers are forked afterwards
    expected = first(images, 5)
    for workers in (None, 0, 2):
        for found, wanted in zip(first(images, 5, workers=workers, device="cuda"), expected, strict=True):
            assert found.samples == wanted.samples
            assert found.images.is_cuda
            torch.testing.assert_close(found.images.cpu(), wanted.images, atol=1e-3, rtol=0)


@pytest.mark.quick
def test_a_long_path_of_temporary_files_is_said(tmp_path, monkeypatch):
    """Sockets below it could not be made, and the results of workers would never come."""
    for length in (75, 76):
        (folder := Path("/tmp") / ("u" * (length - 5))).mkdir(exist_ok=True)
        monkeypatch.setattr(parallel_module.tempfile, "tempdir", str(folder))
        try:
            found = ordered_map(lambda k: torch.full((3,), k), range(4), 2)
            if length == 75:
                assert [int(value[0]) for value in found] == [0, 1, 2, 3]
            else:
                with pytest.raises(InputError, match=r"^TMPDIR: /tmp/u+ is too long a path .* at most 75 bytes serve"):
                    next(found)
        finally:
            shutil.rmtree(folder)
