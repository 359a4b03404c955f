"""Pictures of what features see, on encoders and images whose answer is known."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import underpaint
from underpaint.backbones import Backbone
from underpaint.backbones.protocols import Features
from underpaint.data import ImageSet, Indices, Source, load_images, open_source, pretraining_indices
from underpaint.evaluation import visualizations
from underpaint.evaluation.probes import ProbeSuite
from underpaint.evaluation.visualizations import Colours, on_grid, plane, same_label, small, write_visualizations
from underpaint.patches import Standardize

STANDARDIZE = Standardize([0.5] * 3, [0.25] * 3)
COLOURS = ((220, 30, 30), (30, 200, 40), (40, 50, 230))
FILES = {"features.png", "neighbours.png", "map.png", "looks.json"}


class MeanColour(Backbone):
    """Features that are known: the mean colour of patches of 8 pixels, and of the image."""

    def __init__(self, kept: float = 1.0, dim: int = 3, value: float = 0.0):
        super().__init__()
        self.kept, self.dim, self.channels, self.value = kept, dim, 3, value

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 8, width // 8

    def forward(self, images: Tensor) -> Features:
        places = F.avg_pool2d(images, 8).flatten(2).transpose(1, 2)[..., : self.dim] * self.kept + self.value
        return Features(places.mean(1), places)


def write_coloured(folder: Path, count: int, size: tuple[int, int] = (32, 32), classes: int = 3) -> Path:
    """Plain images, each a little different, in a folder a colour."""
    rng = np.random.default_rng(0)
    for k in range(count):
        place = folder / f"class{k % classes}"
        place.mkdir(parents=True, exist_ok=True)
        colour = (np.array(COLOURS[k % classes]) + rng.integers(-20, 20, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(np.broadcast_to(colour, (*size, 3)).copy()).save(place / f"{k:03d}.png")
    return folder


def judge_of(folder: Path, size: tuple[int, int] = (32, 32), labels: bool = True, channels: int = 3) -> ProbeSuite:
    def load(source: Source, indices: Indices) -> ImageSet:
        return load_images(source, indices, size=size, channels=channels)

    source = open_source(folder)
    indices = pretraining_indices(source, all_images=not labels)
    pool = load(source, indices)
    return ProbeSuite.of(source, load, pool, indices, size, seed=0) if labels else ProbeSuite(pool, None, size, 0)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coloured(tmp_path_factory.mktemp("coloured"), 90)


def vit(**others: Any) -> Any:
    torch.manual_seed(0)
    size = others.pop("image_size", 32)
    return underpaint.encoder(
        "vit_tiny_patch16_224", image_size=size, patch_size=8, embed_dim=32, depth=1, num_heads=2, **others
    )


def known(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "looks.json").read_text())


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


def test_the_mean_colour_finds_its_own_colour(tmp_path: Path, coloured: Path) -> None:
    blind = MeanColour(kept=0.0, value=1.0)
    write_visualizations(MeanColour(), blind, judge_of(coloured), STANDARDIZE, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    found = known(tmp_path)
    assert found["images"] == 90
    assert found["queries"] == 18
    assert found["same_label"]["pretrained"] == 1.0
    assert found["same_label"]["pretrained_error"] == 0.0
    assert found["same_label"]["chance"] == pytest.approx(1 / 3)
    assert found["same_label"]["untrained"] < 0.7
    picture = pixels(tmp_path / "neighbours.png").astype(int)
    for row in range(8):
        y = 24 + row * 73 + 32
        query = picture[y, 4 + 32]
        for n in range(5):
            assert np.abs(picture[y, 88 + n * 68 + 32] - query).max() <= 40, "a neighbour has another colour"
            assert tuple(picture[y + 34, 88 + n * 68 + 32]) == visualizations.SAME_LABEL


def test_a_query_is_not_its_own_neighbour(coloured: Path) -> None:
    compared = visualizations._Compared.of(MeanColour(), MeanColour(), judge_of(coloured, labels=False), STANDARDIZE)
    found = compared.neighbours(compared.pretrained)
    assert found.shape == (90, 5)
    assert not (found == compared.queries[:, None]).any()
    assert all(len(set(row)) == 5 for row in found.tolist())
    labelled = visualizations._Compared.of(MeanColour(), MeanColour(), judge_of(coloured), STANDARDIZE)
    assert not set(labelled.queries.tolist()) & set(labelled.candidates.tolist())
    assert set(labelled.neighbours(labelled.pretrained).flatten().tolist()) <= set(labelled.candidates.tolist())


def test_shares_and_errors_are_those_of_the_neighbours() -> None:
    labels = np.array([0, 1, 0, 0, 1, 1])
    after, before = np.array([[2, 3], [4, 2]]), np.array([[4, 5], [4, 5]])
    found = same_label(labels, np.array([0, 1]), np.array([2, 3, 4, 5]), after, before)
    assert found["pretrained"] == 0.75  # 1 and 1/2
    assert found["pretrained_error"] == pytest.approx(0.25)
    assert found["untrained"] == 0.5  # 0 and 1
    assert found["difference"] == 0.25  # 1 and -1/2, of the same queries
    assert found["difference_error"] == pytest.approx(0.75)
    assert found["chance"] == 0.5
    assert math.isnan(same_label(labels, np.array([0]), np.array([2]), after[:1], before[:1])["pretrained_error"])


def test_equal_patches_have_equal_colours_and_others_do_not() -> None:
    torch.manual_seed(0)
    kinds = torch.randn(4, 16)
    which = torch.arange(400) % 4
    found = Colours.of(kinds[which])(kinds[which][None])[0]
    assert found.shape == (400, 3)
    assert found.min() >= 0
    assert found.max() <= 1
    for kind in range(4):
        assert (found[which == kind] == found[kind]).all()
        for other in range(kind):
            assert (found[kind] - found[other]).abs().max() > 0.2


def test_colours_do_not_depend_on_the_order_of_the_patches() -> None:
    torch.manual_seed(0)
    patches = torch.randn(500, 8) * torch.arange(1.0, 9.0)
    first = Colours.of(patches)(patches[None])
    second = Colours.of(patches.flip(0))(patches[None])
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("dim", [1, 2])
def test_few_dimensions_leave_colours_grey(dim: int) -> None:
    patches = torch.linspace(-1, 1, 50)[:, None].expand(50, dim).clone()
    found = Colours.of(patches)(patches[None])[0]
    assert (found[:, 1:] == 0.5).all()  # one direction differs, the others do not
    assert found[:, 0].std() > 0.2


def test_a_rare_patch_is_seen() -> None:
    patches = torch.zeros(200, 4)
    patches[7] = 1.0
    found = Colours.of(patches)(patches[None])[0]
    assert abs(float(found[7, 0] - found[0, 0])) == 1.0


def test_the_picture_of_patches_shows_the_grid(tmp_path: Path) -> None:
    folder = tmp_path / "halves"
    for k in range(12):
        place = folder / f"class{k % 2}"
        place.mkdir(parents=True, exist_ok=True)
        halves = np.zeros((32, 64, 3), dtype=np.uint8)
        halves[:, :32], halves[:, 32:] = COLOURS[0], COLOURS[2]
        Image.fromarray(halves).save(place / f"{k}.png")
    write_visualizations(MeanColour(), MeanColour(), judge_of(folder, (32, 64)), STANDARDIZE, tmp_path / "out")
    picture = pixels(tmp_path / "out" / "features.png")
    column = picture[22 : 22 + 96, 6 + 2 * (192 + 6) :][:, :192]  # 4 x 8 patches of 24 pixels
    left, right = column[0, 0], column[0, -1]
    assert (column[:, :96] == left).all()
    assert (column[:, 96:] == right).all()
    assert np.abs(left.astype(int) - right).max() > 200


def test_the_map_holds_every_image_once(coloured: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    for count in (10, 16, 37):
        cells = on_grid(torch.randn(count, 2).numpy())
        assert len(set(map(tuple, cells.tolist()))) == count
        assert cells.min() >= 0
        assert cells.max() < math.ceil(math.sqrt(count))
    whole = np.stack(np.divmod(np.random.default_rng(0).permutation(16), 4), axis=1)
    np.testing.assert_array_equal(on_grid(whole[:, ::-1].astype(float)), whole)  # points that are a grid stay there
    write_visualizations(MeanColour(), MeanColour(), judge_of(coloured), STANDARDIZE, tmp_path)
    picture = pixels(tmp_path / "map.png")
    tiles = picture.reshape(5, 32, 5, 32, 3).transpose(0, 2, 1, 3, 4).reshape(25, -1, 3)
    compared = visualizations._Compared.of(MeanColour(), MeanColour(), judge_of(coloured), STANDARDIZE)
    shown = sorted(tuple(tile[0].tolist()) for tile in tiles if (tile != 255).any())
    assert shown == sorted(tuple(compared.tiles[k][0, 0].tolist()) for k in compared.queries)


def test_like_features_lie_beside_each_other() -> None:
    rng = np.random.default_rng(0)
    kinds = np.repeat(np.arange(4), 16)
    x = 5 * np.eye(8)[kinds] + rng.normal(size=(64, 8))
    points = plane(x / np.linalg.norm(x, axis=1, keepdims=True), seed=0)
    assert points is not None
    grid = np.full((8, 8), -1)
    grid[tuple(on_grid(points).T)] = kinds
    beside = np.concatenate([(grid[1:] == grid[:-1]).ravel(), (grid[:, 1:] == grid[:, :-1]).ravel()])
    assert beside.mean() > 0.6  # a random order has 0.24


@pytest.mark.parametrize("labels", [True, False])
def test_constant_features_cost_only_the_map(tmp_path: Path, coloured: Path, labels: bool) -> None:
    blind = MeanColour(kept=0.0, value=3.0)
    write_visualizations(blind, blind, judge_of(coloured, labels=labels), STANDARDIZE, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"map.png"}
    assert (pixels(tmp_path / "features.png")[40:60, 6 + 102 : 6 + 102 + 90] == 128).all()


def test_zeros_and_images_of_two_kinds_do_not_warn(tmp_path: Path) -> None:
    nothing = MeanColour(kept=0.0)
    folder = tmp_path / "two"
    for k in range(60):
        place = folder / f"class{k % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), COLOURS[k % 2]).save(place / f"{k}.png")
    write_visualizations(MeanColour(), nothing, judge_of(folder), STANDARDIZE, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_features_that_are_not_finite_leave_the_pictures_out(tmp_path: Path, coloured: Path) -> None:
    judge = judge_of(coloured)
    write_visualizations(MeanColour(), MeanColour(), judge, STANDARDIZE, tmp_path)
    write_visualizations(MeanColour(value=math.nan), MeanColour(), judge, STANDARDIZE, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"looks.json"}  # nor do those of before stay
    assert known(tmp_path) == {"images": 90}


@pytest.mark.parametrize(
    ("count", "labels", "neighbours"), [(1, False, None), (3, False, 2), (6, False, 5), (6, True, 3)]
)
def test_few_images_are_enough(tmp_path: Path, count: int, labels: bool, neighbours: int | None) -> None:
    folder = write_coloured(tmp_path / "few", count)
    write_visualizations(vit(), vit(), judge_of(folder, labels=labels), STANDARDIZE, tmp_path / "out")
    assert (tmp_path / "out" / "features.png").exists()
    assert (tmp_path / "out" / "neighbours.png").exists() == (count > 1)
    assert not (tmp_path / "out" / "map.png").exists()
    assert known(tmp_path / "out").get("neighbours") == neighbours


@pytest.mark.parametrize(
    ("size", "channels", "name"), [((32, 48), 3, "vit"), ((32, 32), 1, "vit"), ((64, 40), 3, "resnet18")]
)
def test_any_grid_channels_and_encoder(tmp_path: Path, size: tuple[int, int], channels: int, name: str) -> None:
    folder = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for k in range(30):
        place = folder / f"class{k % 2}"
        place.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 255, (*size, 3) if channels == 3 else size, dtype=np.uint8)
        Image.fromarray(noise).save(place / f"{k}.png")
    encoder: Any = (
        vit(image_size=size, channels=channels)
        if name == "vit"
        else underpaint.encoder(name, image_size=size, channels=channels)
    )
    judge = judge_of(folder, size, labels=False, channels=channels)
    assert judge.pool.channels == channels
    write_visualizations(encoder, encoder, judge, Standardize([0.5] * channels, [0.25] * channels), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert pixels(tmp_path / "out" / "map.png").shape[:2] == (
        6 * round(32 * size[0] / max(size)),
        6 * round(32 * size[1] / max(size)),
    )


def test_the_same_bytes_again_whatever_the_random_state(tmp_path: Path, pictures: Path) -> None:
    encoder, untrained, judge = vit(), vit(), judge_of(pictures)
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        np.random.seed(seed)
        write_visualizations(encoder, untrained, judge, STANDARDIZE, tmp_path / name)
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_training_is_left_as_it_was(tmp_path: Path, pictures: Path) -> None:
    encoder, judge = vit(proj_drop_rate=0.5), judge_of(pictures)
    encoder.train()
    encoder.model.norm.eval()
    modes = [module.training for module in encoder.modules()]
    weights = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    state, others = torch.get_rng_state(), str(np.random.get_state())
    write_visualizations(encoder, encoder, judge, STANDARDIZE, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert str(np.random.get_state()) == others
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    same = known(tmp_path)["same_label"]
    assert same["difference"] == same["difference_error"] == 0.0  # the dropout was off


def test_small_keeps_the_shape_of_images() -> None:
    images = torch.rand(2, 3, 20, 40)
    assert small(images, 64)[0].shape == (32, 64, 3)
    exact = small(images, 80)[0]
    assert (exact[::2, ::2] == exact[1::2, 1::2]).all()
    assert small(torch.rand(1, 1, 200, 100), 64)[0].shape == (64, 32, 3)
