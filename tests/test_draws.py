"""Random numbers: fair, and functions of seed, step and image alone."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from scipy import stats
from test_methods import each_method, photographs, small
from test_swin import swin
from torch import Tensor

from underpaint.corruptions import AddNoise
from underpaint.draws import Draws, _bits, integers, normal, uniform
from underpaint.masking import block_mask, each_tensor
from underpaint.methods import MAE
from underpaint.patches import Standardize
from underpaint.prepare import stepper_for
from underpaint.recipes.recipe import checked

pytestmark = pytest.mark.quick
COUNT = 2**20


def fair(counts: np.ndarray) -> bool:
    """By the chi-square statistic of bins that are equally likely: neither too uneven nor too even."""
    expected = counts.sum() / len(counts)
    return bool(1e-4 < stats.chi2.cdf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1) < 1 - 1e-4)


def related(left: Tensor, right: Tensor) -> float:
    """How many standard deviations of chance two rows of numbers are correlated."""
    return abs(float(np.corrcoef(left.flatten(), right.flatten())[0, 1])) * left.numel() ** 0.5


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_bits_are_those_of_splitmix64() -> None:
    """The first five of the published generator from the state 1234567."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    found = _bits(torch.tensor([1234567]), 10).contiguous().view(torch.int64)
    assert [word % 2**64 for word in found[0].tolist()] == known


@pytest.mark.parametrize("shape", [(COUNT, 1), (1024, 1024), (1, COUNT)], ids=["images", "both", "places"])
def test_uniform_numbers_are_uniform(shape: tuple[int, int]) -> None:
    found = Draws.of(0, shape[0]).uniform(shape[1])
    assert found.dtype == torch.float32
    assert found.shape == shape
    assert 0 <= found.min() < 1e-5
    assert 1 - 1e-5 < found.max() < 1
    for bins in (2, 100, 4096):
        assert fair(np.histogram(found.double().numpy(), bins, (0, 1))[0]), bins
    low = (found.flatten().double() * 2**24).long() % 256  # the last bits, too
    assert fair(np.bincount(low.numpy(), minlength=256))
    pairs = (found.flatten()[::2] * 64).long() * 64 + (found.flatten()[1::2] * 64).long()
    assert fair(np.bincount(pairs.numpy(), minlength=4096))


def test_normal_numbers_are_normal() -> None:
    found = normal(Draws.of(1, 512).keys(), 3, 15, 15)
    assert found.shape == (512, 3, 15, 15)
    assert found.isfinite().all()
    numbers = found.flatten().double().numpy()
    assert stats.kstest(numbers, "norm").pvalue > 1e-3
    assert stats.kstest(numbers**2, stats.chi2(1).cdf).pvalue > 1e-3
    assert abs(stats.kurtosis(numbers)) < 0.03
    half = 3 * 15 * 15 // 2  # cosines and sines of the same angles and lengths
    rows = found.flatten(1)
    assert related(rows[:, :half], rows[:, -half:]) < 4
    assert related(rows[:, :half] ** 2, rows[:, -half:] ** 2) < 4


@pytest.mark.parametrize("below", [1, 2, 7, 256, 2**31 - 1])
def test_whole_numbers_are_fair(below: int) -> None:
    found = Draws.of(2, 1000).integers(below, 200)
    assert found.min() >= 0
    assert found.max() < below
    if below > 1:
        bins = min(below, 256)
        assert fair(np.bincount((found * bins // below).flatten().numpy(), minlength=bins))


def test_neighbours_have_nothing_in_common() -> None:
    """Images, places, calls, seeds and steps side by side."""
    draws = Draws.of(0, 600)
    first, second = draws.uniform(600), draws.uniform(600)
    beside = Draws.of(1, 600).uniform(600)
    moved = Draws.of(0, 600, first=1).uniform(600)
    pairs = [(first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first, second), (first, beside)]
    pairs += [(first[::2], first[1::2]), (first, draws.apart().uniform(600)), (first, draws.alike(1).uniform(600))]
    for number, (left, right) in enumerate(pairs):
        assert related(left, right) < 4, number
    assert torch.equal(first[1:], moved[:-1])
    assert related(first, moved) < 4


def test_no_key_comes_twice() -> None:
    keys = []
    for seed in (0, 1, 2, 2**62):
        draws = Draws.of(seed, 20_000)
        keys += [draws.keys() for _ in range(5)] + [draws.apart().keys(), draws.alike(1).keys()]
    found = torch.cat([*keys, _bits(keys[0][:100], 4000).contiguous().view(torch.int64).flatten()])
    assert len(found.unique()) == len(found)


# -- whose they are ----------------------------------------------------------------------------------------------------


def parts_of(noise: Any) -> list[Tensor]:
    found: list[Tensor] = []
    each_tensor(noise, lambda value: found.append(value) or value)
    return found


@each_method
@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_process_draws_what_one_would(name: str, world: int) -> None:
    settings: dict[str, Any] = {"corruption": "mixture"} if name == "energy" else {}
    method, each = small(name, **settings), 8 // world
    whole = parts_of(method.sample(8, 16, 16, Draws.of(5, 8)))
    ranks = [parts_of(method.sample(each, 16, 16, Draws.of(5, each, rank * each))) for rank in range(world)]
    for wanted, *found in zip(whole, *ranks, strict=True):
        assert torch.equal(wanted, torch.cat(found))
    other = parts_of(method.sample(8, 16, 16, Draws.of(6, 8)))
    assert not all(torch.equal(a, b) for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("mask", ["random", "block"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_stepper_draws_for_its_own_images(mask: str, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = checked({"method": {"name": "mae", "mask": mask}, "optimiser": {"batch_size": 16}})
    recipe.measured["precision"] = "32"
    stepper = stepper_for(Fabric(accelerator="cpu"), recipe, small("mae", mask=mask), Standardize([0.0] * 3, [1.0] * 3))
    whole = stepper.noise(photographs(16), 3)
    drawn: list[int] = []
    keys = Draws.keys
    monkeypatch.setattr(Draws, "keys", lambda draws: drawn.append(len(draws)) or keys(draws))
    found = []
    for rank in range(world):
        place: Any = SimpleNamespace(global_rank=rank, world_size=world, device=torch.device("cpu"))
        monkeypatch.setattr(stepper, "fabric", place)
        found.append(stepper.noise(photographs(16 // world), 3))
    assert torch.equal(torch.cat([noise.hidden for noise in found]), whole.hidden)
    assert max(drawn) == 16 // world  # and for nobody else's
    assert not torch.equal(stepper.noise(photographs(16 // world), 4).hidden, found[-1].hidden)


def test_the_block_masks_of_others_change_nothing() -> None:
    """Some images need more tries than others."""
    whole = block_mask(64, (14, 14), 75, Draws.of(0, 64))
    for rows in (slice(3, 4), slice(10, 40), torch.tensor([63, 5, 17])):
        draws = Draws.of(0, 64).some(rows)
        assert torch.equal(block_mask(len(draws), (14, 14), 75, draws).hidden, whole.hidden[rows])


@pytest.mark.parametrize(("batch", "share", "groups"), [(8, 2, 4), (8, 8, 1), (8, 64, 1), (12, 8, 3), (8, 3, 8)])
def test_images_that_share_a_mask_share_it_over_processes(batch: int, share: int, groups: int) -> None:
    method = MAE(swin(), images_per_mask=share)
    whole: Any = method.sample(batch, 64, 64, Draws.of(0, batch))
    assert whole.groups == groups
    runs = [set(whole.choice[k : k + share].tolist()) for k in range(0, batch, share)]
    assert all(len(run) == 1 for run in runs)
    assert torch.equal(whole.choice, whole.choice.view(groups, -1)[:, :1].expand(-1, batch // groups).flatten())
    for world in (2, 4):
        each = batch // world
        for rank in range(world):
            found: Any = method.sample(each, 64, 64, Draws.of(0, each, rank * each))
            assert torch.equal(found.choice, whole.choice[rank * each : (rank + 1) * each])
            rows = whole.rows(slice(rank * each, (rank + 1) * each))
            assert not rows.choice.view(rows.groups, -1).diff().any()


@each_method
def test_a_held_out_image_is_corrupted_alike_in_every_batch(name: str) -> None:
    method, images = small(name).eval(), photographs(4)
    together = method.held_out(images, Draws.of(3, 4))
    alone = method.held_out(images[2:3], Draws(3, torch.tensor([2])))
    for task, (left, _) in alone.items():
        torch.testing.assert_close(left, together[task][0][2:3], rtol=1e-4, atol=1e-5)


def test_how_often_others_draw_changes_nothing() -> None:
    found = []
    for times in (0, 3):
        draws = Draws.of(0, 4)
        trying = draws.apart()
        for _ in range(times):
            trying.uniform(5)
        found.append(draws.uniform(5))
    assert torch.equal(*found)


def test_noise_is_made_where_the_images_are() -> None:
    """What travels to the device is two numbers an image."""
    corruption, images = AddNoise(), photographs(6)
    noise = corruption.sample(6, 16, 16, Draws.of(0, 6))
    assert sum(part.numel() for part in noise) == 12
    corrupted = corruption.apply(images, noise)
    assert torch.equal(corrupted, corruption.apply(images, noise))
    some = tuple(part[2:4] for part in noise)
    assert torch.equal(corruption.apply(images[2:4], some), corrupted[2:4])


def test_without_draws_torch_seeds_them() -> None:
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        method = small("energy", corruption="mixture")
        torch.manual_seed(seed)
        found.append([parts_of(method.sample(3, 16, 16)) for _ in range(2)])
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b, strict=True))  # noqa: E731
    assert same(found[0][0], found[1][0])
    assert not same(found[0][0], found[0][1])
    assert not same(found[0][0], found[2][0])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_numbers() -> None:
    keys = Draws.of(0, 256).keys()
    assert torch.equal(uniform(keys.cuda(), 3, 100).cpu(), uniform(keys, 3, 100))
    assert torch.equal(integers(keys.cuda(), 1000, 100).cpu(), integers(keys, 1000, 100))
    torch.testing.assert_close(normal(keys.cuda(), 3, 100).cpu(), normal(keys, 3, 100), rtol=1e-5, atol=1e-5)


@pytest.mark.unhooked
def test_noise_is_made_in_a_compiled_region() -> None:
    """Whole, without a break: what a compiled step does to noisy images."""
    keys = Draws.of(0, 4).keys()
    compiled = torch.compile(normal, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(keys, 3, 5, 7), normal(keys, 3, 5, 7))
