"""Numbers against references that are not ours: losses by hand, numpy, timm, torchvision, vector-quantize-pytorch."""

import importlib.util
import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import write_pictures
from PIL import Image
from safetensors.torch import load_file
from scenes import write_scenes
from test_methods import METHODS, SMALL, each_method, photographs, small
from test_swin import swin
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from underpaint.backbones import create_arguments, from_arguments, save_encoder
from underpaint.data import Crops, load_images, open_source, train_batches
from underpaint.data.annotations import Instances
from underpaint.draws import Draws
from underpaint.errors import InputError
from underpaint.evaluation.base import Context
from underpaint.evaluation.bundle import EncoderBundle, open_bundle
from underpaint.evaluation.detect import Detect, DetectConfig, detected, letterbox, mask_of
from underpaint.evaluation.finetune import FineTune, FineTuning, recipe_for
from underpaint.evaluation.options import Options
from underpaint.evaluation.runner import judge
from underpaint.evaluation.segment import VOID, Segment, crop_of, sliding_window_inference
from underpaint.evaluation.splits import Split
from underpaint.methods import LocalMIM
from underpaint.patches import Standardize
from underpaint.tokenizers import ConvTokenizer, DallE, KMeansPatches, _nearest
from underpaint.train.stepper import step_seed

# -- the baseline is the loss of the trivial prediction ----------------------------------------------------------------


def silent(layer: Any, says: Tensor | float = 0.0) -> None:
    """A linear layer that says the same whatever comes in."""
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.as_tensor(says))


def trivial_words(method: Any) -> None:
    """Words by frequency, from frequencies that are far from equal."""
    shares = getattr(method, "generator", method).tokenizer.shares
    shares.copy_(torch.arange(1.0, len(shares) + 1) / torch.arange(1.0, len(shares) + 1).sum())


def trivial_beit(**_: Any) -> tuple[Any, Tensor, Any]:
    method, images = small("beit"), photographs()
    trivial_words(method)
    silent(method.head, method.tokenizer.shares.log())
    return method, images, method.sample(4, 16, 16, Draws.of(0, 4))


def trivial_cae(**settings: Any) -> tuple[Any, Tensor, Any]:
    method, images = small("cae", **settings), photographs()
    trivial_words(method)
    mask = method.sample(4, 16, 16, Draws.of(0, 4))
    silent(method.head[1], method.tokenizer.shares.log() if method.target == "words" else 0.0)
    # the mean representation of hidden patches, whatever is seen
    silent(method.norm, method.aligned_to(method.encoder.embed(images), mask).mean((0, 1)))
    return method, images, mask


def trivial_cim(**settings: Any) -> tuple[Any, Tensor, Any]:
    method, images = small("cim", **settings), photographs()
    trivial_words(method)
    silent(method.generator.head, method.generator.tokenizer.shares.log())
    noise = method.sample(4, 16, 16, Draws.of(0, 4))
    share = method.corrupt(images, noise).replaced.float().mean()
    assert 0 < float(share) < 1
    silent(method.head, share.logit() if method.objective == "detect" else 0.0)
    return method, images, noise


def trivial_energy(name: str = "energy", **settings: Any) -> tuple[Any, Tensor, Any]:
    """An energy that is the same everywhere."""
    method, images = small(name, **settings), photographs()
    nn.init.zeros_(method.head.weight)
    return method, images, method.sample(4, 16, 16, Draws.of(0, 4))


def trivial_local(on: str = "vit", **settings: Any) -> tuple[Any, Tensor, Any]:
    """Each tap says the constant that is best over all hidden cells, found here by least squares."""
    if on == "swin":
        torch.manual_seed(0)
        method: Any = LocalMIM(swin(), images_per_mask=2, **settings)
        images = photographs(4, 3, 64, 64)
    else:
        method, images = (
            small("localmim", height=32, width=32, taps=[0, 1], scales=[4, 8], **settings),
            photographs(4, 3, 32, 32),
        )
    noise = method.sample(4, *images.shape[-2:], Draws.of(0, 4))
    for number, (tap, level) in enumerate(zip(method.decoders, method.levels(images), strict=True)):
        mask = method.walk.mask(noise, number)
        wanted = tap.target(level, mask).numpy()
        shares = tap.weights(mask)
        weights = np.ones(wanted.shape[:-1]) if shares is None else shares.numpy()
        best = np.average(wanted.reshape(-1, wanted.shape[-1]), axis=0, weights=weights.reshape(-1))
        silent(tap.predict, torch.from_numpy(best).float())
    return method, images, noise


TRIVIAL: list[tuple[Any, dict[str, Any]]] = [
    (trivial_beit, {}),
    (trivial_cae, {}),
    (trivial_cae, {"alignment": 0.0}),
    (trivial_cae, {"decoder": False}),
    (trivial_cae, {"target": "pixels"}),
    (trivial_cae, {"target": "pixels", "mask": "random", "alignment": 0.0}),
    (trivial_cim, {}),
    (trivial_cim, {"objective": "detect"}),
    (trivial_cim, {"paste": True}),
    (trivial_energy, {"corruption": "mask"}),
    (trivial_energy, {"corruption": "mask", "steps": 2}),
    (trivial_energy, {"name": "conditional-energy"}),
    (trivial_energy, {"corruption": "shuffle"}),
    (trivial_energy, {"corruption": "downsample", "gradient": "difference"}),
    (trivial_energy, {"corruption": "noise", "steps": 3}),
    (trivial_energy, {"corruption": "gray"}),
    (trivial_energy, {"corruption": "mixture", "steps": 2}),
    (trivial_local, {}),
    (trivial_local, {"target": "pixels"}),
    (trivial_local, {"on": "swin"}),
    (trivial_local, {"on": "swin", "target": "pixels"}),
]


@pytest.mark.quick
@pytest.mark.parametrize(("made", "settings"), TRIVIAL)
def test_a_network_that_says_the_trivial_thing_has_the_baseline_as_its_loss(
    made: Any, settings: dict[str, Any]
) -> None:
    method, images, noise = made(**settings)
    with torch.no_grad():
        objective = method(images, noise)
    assert float(objective.terms["baseline"]) > 0
    assert float(objective.loss) == pytest.approx(float(objective.terms["baseline"]), rel=1e-5)
    if made is trivial_local or settings.get("objective") == "detect":
        return  # there the best constant is that of these very masks
    for task, (left, before) in method.eval().held_out(images, Draws.of(3, len(images))).items():
        if task == "placed":  # a share of patches, beside 1
            continue
        torch.testing.assert_close(left, before, rtol=1e-5, atol=1e-6)


@pytest.mark.quick
def test_the_best_constant_of_pooled_cells_is_that_of_hidden_ones() -> None:
    """Cells of two patches count by the share of them that is hidden, in the constant too."""
    method, images = small("localmim", height=32, width=32, taps=[0, 1], scales=[4, 8]), photographs(4, 3, 32, 32)
    noise = method.sample(4, 32, 32, Draws.of(0, 4))
    tap, level = method.decoders[1], method.levels(images)[1]
    wanted = level.flatten(2).transpose(1, 2)
    hidden = torch.zeros(4, 64).scatter(1, noise.hidden, 1.0).view(4, 1, 8, 8)
    share = F.avg_pool2d(hidden, 2).flatten(1).double().numpy()
    best = np.average(wanted.reshape(-1, 27), axis=0, weights=share.reshape(-1))
    squares = ((wanted.double().numpy() - best) ** 2).mean(-1)
    tokens = method.every_tap(images, noise)[1]
    found = method.errors_at(1, tokens, level, noise)[1]
    np.testing.assert_allclose(found.detach().numpy(), np.average(squares, axis=1, weights=share), rtol=1e-5)
    assert tap.factor == 0


@pytest.mark.quick
@pytest.mark.parametrize("name", [*sorted(METHODS), "localmim on a Swin"])
def test_each_held_out_image_has_a_draw_of_its_own(name: str) -> None:
    """The same image eight times: were the draw shared, so would be what is left to restore."""
    if name in METHODS:
        method, images = small(name).eval(), photographs(1)
    else:
        torch.manual_seed(0)
        method, images = LocalMIM(swin(), images_per_mask=64).eval(), photographs(1, 3, 64, 64)
    found = method.held_out(images.expand(8, -1, -1, -1).contiguous(), Draws.of(0, 8))
    for left, _ in found.values():
        assert len(left.unique()) > 1


@pytest.mark.quick
@each_method
def test_scores_do_not_depend_on_the_batch(name: str) -> None:
    method, images = small(name).eval(), photographs(5)
    images = torch.cat([images, 3 * torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))])
    alone = torch.cat([method.score(image[None]) for image in images])
    torch.testing.assert_close(method.score(images), alone, rtol=1e-4, atol=1e-5)


# -- tokenizers --------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_equal_patches_make_no_two_words() -> None:
    generator = torch.Generator().manual_seed(0)
    different = torch.rand(20, 192, generator=generator)
    with pytest.raises(InputError, match="only 20 different patches"):
        KMeansPatches(32, 8).fit(different.repeat(40, 1)[torch.randperm(800, generator=generator)])


@pytest.mark.quick
def test_the_nearest_centre_is_that_of_numpy() -> None:
    rng = np.random.default_rng(0)
    centres = rng.uniform(0.6, 0.7, (40, 48))  # close together and far from 0, where products alone lose digits
    patches = rng.uniform(0.6, 0.7, (500, 48))
    word, distance = _nearest(torch.from_numpy(patches).float(), torch.from_numpy(centres).float())
    squares = ((patches[:, None] - centres) ** 2).sum(-1)
    assert np.array_equal(word.numpy(), squares.argmin(1))
    np.testing.assert_allclose(distance.numpy(), squares.min(1), rtol=1e-4)


@pytest.mark.quick
def test_fsq_words_are_digits_of_their_levels() -> None:
    """By hand, as in the paper: tanh, to the nearest of each coordinate's levels; the word counts them in mixed radix; the
    gradient is that of tanh, straight through the rounding."""
    torch.manual_seed(0)
    tokenizer = ConvTokenizer("fsq", 1000, 8, dim=16, blocks=1).eval()
    levels = np.array([8, 5, 5, 5])
    z = torch.randn(3, 7, 4, requires_grad=True)
    codes, words = tokenizer.quantize(z)
    half = (levels - 1) * 1.001 / 2
    offset = np.where(levels % 2 == 0, 0.5, 0.0)
    moved = z.detach().numpy().astype(float) + np.arctanh(offset / half)
    digits = np.round(np.tanh(moved) * half - offset) + levels // 2
    np.testing.assert_array_equal(words.numpy(), (digits * np.cumprod([1, 8, 5, 5])).sum(-1))
    np.testing.assert_allclose(codes.detach().numpy(), digits / (levels // 2) - 1, atol=1e-6)
    np.testing.assert_allclose(tokenizer.quantize.indices_to_codes(words).numpy(), codes.detach().numpy(), atol=1e-6)
    codes.sum().backward()
    assert z.grad is not None
    np.testing.assert_allclose(z.grad.numpy(), half * (1 - np.tanh(moved) ** 2) / (levels // 2), rtol=1e-4)


@pytest.mark.quick
def test_vq_words_are_the_nearest_of_the_codebook() -> None:
    torch.manual_seed(0)
    tokenizer: Any = ConvTokenizer("vq", 64, 8, dim=16, blocks=1)
    images = torch.rand(16, 3, 32, 32)
    tokenizer.loss(images).backward()  # its first batch fills the codebook
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in tokenizer.down.parameters())
    assert any(bool(p.grad.any()) for p in tokenizer.down.parameters())  # through the quantisation
    tokenizer.eval()
    with torch.no_grad():
        z = tokenizer.narrow(tokenizer.down(2 * images - 1)).flatten(2).transpose(1, 2).numpy()
        book = tokenizer.quantize.codebook.numpy()
        words = tokenizer.encode(images)
        squares = ((z[:, :, None].astype(float) - book) ** 2).sum(-1)
        np.testing.assert_array_equal(words.numpy(), squares.argmin(-1))
        codes = torch.from_numpy(book[words.numpy()])
        wanted = tokenizer.up(tokenizer.widen(codes.transpose(1, 2).unflatten(2, (4, 4)))) * 0.5 + 0.5
        torch.testing.assert_close(tokenizer.decode(words, (4, 4)), wanted.clamp(0, 1))


class Theirs:
    """openai/DALL-E's encoder and decoder, written from its published source as functions of a state of its names."""

    def __init__(self, width: int, codebook_size: int):
        generator = torch.Generator().manual_seed(0)
        self.encoder: dict[str, Tensor] = {}
        self.decoder: dict[str, Tensor] = {}

        def conv(state: dict[str, Tensor], name: str, before: int, after: int, side: int) -> None:
            state[f"{name}.w"] = torch.randn(after, before, side, side, generator=generator) / (before * side**2) ** 0.5
            state[f"{name}.b"] = 0.1 * torch.randn(after, generator=generator)

        conv(self.encoder, "blocks.input", 3, width, 7)
        conv(self.encoder, "blocks.output.conv", 8 * width, codebook_size, 1)
        conv(self.decoder, "blocks.input", codebook_size, width // 2, 1)
        conv(self.decoder, "blocks.output.conv", width, 6, 1)
        plans = (
            (self.encoder, (width, width, 2 * width, 4 * width, 8 * width), (3, 3, 3, 1)),
            (self.decoder, (width // 2, 8 * width, 4 * width, 2 * width, width), (1, 3, 3, 3)),
        )
        for state, widths, sides in plans:
            for group in range(4):
                for block in range(2):
                    before, after = widths[group] if block == 0 else widths[group + 1], widths[group + 1]
                    place = f"blocks.group_{group + 1}.block_{block + 1}"
                    if before != after:
                        conv(state, f"{place}.id_path", before, after, 1)
                    inner = [before, after // 4, after // 4, after // 4, after]
                    for k in range(4):
                        conv(state, f"{place}.res_path.conv_{k + 1}", inner[k], inner[k + 1], sides[k])

    @staticmethod
    def conv(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.w"]
        return F.conv2d(x, weight, state[f"{name}.b"], padding=(weight.shape[-1] - 1) // 2)

    def blocks(self, state: dict[str, Tensor], x: Tensor, between: Any) -> Tensor:
        x = self.conv(state, "blocks.input", x)
        for group in range(1, 5):
            for block in (1, 2):
                place = f"blocks.group_{group}.block_{block}"
                found = x
                for k in range(1, 5):
                    found = self.conv(state, f"{place}.res_path.conv_{k}", F.relu(found))
                same = self.conv(state, f"{place}.id_path", x) if f"{place}.id_path.w" in state else x
                x = same + found / 64
            x = between(x) if group < 4 else x
        return self.conv(state, "blocks.output.conv", F.relu(x))

    def words(self, images: Tensor) -> Tensor:
        return self.blocks(self.encoder, 0.8 * images + 0.1, lambda x: F.max_pool2d(x, 2)).argmax(1)

    def images(self, words: Tensor, codebook_size: int) -> Tensor:
        z = F.one_hot(words, codebook_size).permute(0, 3, 1, 2).float()
        found = self.blocks(self.decoder, z, lambda x: F.interpolate(x, scale_factor=2, mode="nearest"))
        return ((torch.sigmoid(found[:, :3]) - 0.1) / 0.8).clamp(0, 1)


@pytest.mark.quick
def test_dalle_converted_is_dalle() -> None:
    script = Path(__file__).parents[1] / "scripts" / "convert_dalle.py"
    spec = importlib.util.spec_from_file_location("convert_dalle", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = Theirs(16, 40)
    ours = DallE(shrink=1, width=16, codebook_size=40).eval()
    weights = {**module.ours(theirs.encoder, "encoder"), **module.ours(theirs.decoder, "decoder")}
    ours.load_state_dict({**weights, "shares": ours.shares})
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    words = ours.encode(images)
    assert len(words.unique()) > 1
    assert torch.equal(words.view(2, 4, 4), theirs.words(images))
    torch.testing.assert_close(ours.decode(words, (4, 4)), theirs.images(words.view(2, 4, 4), 40))


# -- fine-tuning -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[EncoderBundle, Split]:
    """A tiny ViT, and 12 pictures of three classes."""
    folder = tmp_path_factory.mktemp("tuned")
    arguments = create_arguments("vit_tiny_patch16_224", image_size=(32, 32), patch_size=8, **SMALL)
    torch.manual_seed(0)
    save_encoder(folder, from_arguments(arguments), arguments, Standardize([0.5] * 3, [0.25] * 3))
    bundle = open_bundle(str(folder), untrained=True)
    images = load_images(open_source(write_pictures(folder / "pictures", 12)), range(12), size=(32, 32))
    return bundle, Split(images, list(range(12)))


def fine_tuned(tuned: tuple[EncoderBundle, Split], recipe: FineTuning, folder: Path) -> dict[str, Any]:
    """How the training went; the images are trained on and judged by."""
    bundle, split = tuned
    source = split.images._source
    found: Any = judge(FineTune("finetune", Context(bundle, source, Options(), folder), (split, split), recipe))
    return found["trained"]["encoder"]


def mixed_by_hand(x: Tensor, y: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """As in the papers, with draws in timm's order; y is one-hot with smoothing of 0.1."""
    np.random.seed(step_seed(0, 0, 0) % 2**32)
    np.random.rand()  # whether to mix at all: always
    if not mixup and not cutmix:
        return x, y
    share = np.random.beta(mixup or cutmix, mixup or cutmix)
    other = x.flip(0)
    if mixup:
        return share * x + (1 - share) * other, share * y + (1 - share) * y.flip(0)
    side = int(32 * math.sqrt(1 - share))
    middle_y, middle_x = np.random.randint(0, 32), np.random.randint(0, 32)
    top, bottom = np.clip([middle_y - side // 2, middle_y + (side + 1) // 2], 0, 32)
    left, right = np.clip([middle_x - side // 2, middle_x + (side + 1) // 2], 0, 32)
    pasted = x.clone()
    pasted[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / 32**2
    return pasted, share * y + (1 - share) * y.flip(0)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_the_first_loss_of_fine_tuning_is_that_by_hand(
    tuned: tuple[EncoderBundle, Split], tmp_path: Path, mixup: float, cutmix: float
) -> None:
    bundle, part = tuned
    recipe = FineTuning(
        epochs=1.0, batch_size=12, mixup=mixup, cutmix=cutmix, erasing=0.0, augment=None, head_scale=0.9, drop_path=0.0
    )
    found = [fine_tuned(tuned, recipe, tmp_path / str(k)) for k in (0, 1)]
    assert found[0]["steps"] == 1
    assert found[0]["loss"] == found[1]["loss"]
    torch.manual_seed(0)
    model: Any = timm.create_model(**{**bundle.arguments, "num_classes": 3})
    model.load_state_dict(bundle.weights(), strict=False)
    with torch.no_grad():
        model.head.weight.normal_(std=0.9)
        model.head.bias.zero_()
    with closing(train_batches(Crops(part.images, (32, 32), 12, 0, crop_scale=(0.08, 1.0)))) as batches:
        batch = next(batches)
    y = F.one_hot(torch.from_numpy(part.labels_of(batch.samples)), 3) * 0.9 + 0.1 / 3
    x, y = mixed_by_hand((batch.images - 0.5) / 0.25, y, mixup, cutmix)
    with torch.no_grad():
        wanted = -(y * model(x).log_softmax(1)).sum(1).mean()
    assert found[0]["loss"] == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("size", "said"), [(0, "batch_size: 0; it must be at least 1"), (7, "batch_size=7: an even number")]
)
def test_a_batch_that_cannot_be_mixed_is_refused(tuned: tuple[EncoderBundle, Split], size: int, said: str) -> None:
    with pytest.raises(InputError, match=f"--set {said}"):
        recipe_for(tuned[0], "mae-vit-base", {"batch_size": size})


def test_an_odd_batch_is_trained_on_where_nothing_is_mixed(tuned: tuple[EncoderBundle, Split], tmp_path: Path) -> None:
    recipe = FineTuning(epochs=1.0, batch_size=7, augment=None, mixup=0.0, cutmix=0.0)
    assert fine_tuned(tuned, recipe, tmp_path)["steps"] == 2


def test_the_average_that_is_judged_is_that_of_timm(tuned: tuple[EncoderBundle, Split], tmp_path: Path) -> None:
    """Two steps, of which the first has a rate of 0: the decay warms up as 1 - (1 + step) ** (-2 / 3)."""
    bundle, _ = tuned
    kept: list[dict[str, Tensor]] = []
    for average in (0.0, 0.9):
        recipe = FineTuning(epochs=1.0, batch_size=6, augment=None, ema_decay=average, head_scale=0.9, lr=1e-2)
        fine_tuned(tuned, recipe, tmp_path / str(average))
        kept.append(load_file(tmp_path / str(average) / "finetune" / "model.safetensors"))
    decay = 1 - 2 ** (-2 / 3)
    for name, before in bundle.weights().items():
        wanted = decay * before + (1 - decay) * kept[0][name]
        torch.testing.assert_close(kept[1][name], wanted, atol=1e-6, rtol=1e-5)
    assert not torch.equal(kept[0]["patch_embed.proj.weight"], kept[1]["patch_embed.proj.weight"])


# -- segmentation ------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_crops_of_masks_are_those_of_torchvision() -> None:
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 5, (6, 9)).repeat(9, 0).repeat(7, 1).astype(np.int64)
    mask[:3] = VOID
    image = torch.from_numpy(rng.random((3, *mask.shape))).float()
    fill = torch.tensor([0.2, 0.4, 0.6])
    flipped, padded = 0, 0
    for seed in range(24):
        found, labels = crop_of((image, mask), (40, 48), (0.5, 2.0), np.random.default_rng(seed), fill)
        drawn = np.random.default_rng(seed)
        factor = float(np.exp(drawn.uniform(math.log(0.5), math.log(2.0))))
        tall, wide = min(54, round(40 / factor)), min(63, round(48 / factor))
        top, left = int(drawn.integers(0, 54 - tall + 1)), int(drawn.integers(0, 63 - wide + 1))
        target = [min(40, round(tall * factor)), min(48, round(wide * factor))]
        steps = [v2.Resize(target, antialias=True), v2.RandomHorizontalFlip(float(drawn.random() < 0.5))]
        flipped += steps[1].p == 1
        pair = v2.functional.crop(tv_tensors.Image(image), top, left, tall, wide)
        truth = v2.functional.crop(tv_tensors.Image(torch.from_numpy(mask)), top, left, tall, wide)
        # as an image: its masks are resized by a nearest neighbour that is half a pixel off
        truth = v2.functional.resize(truth, target, InterpolationMode.NEAREST_EXACT)
        pair, truth = v2.Compose(steps)(pair, tv_tensors.Mask(truth))
        torch.testing.assert_close(found[:, : target[0], : target[1]], pair.as_subclass(Tensor), atol=1e-5, rtol=1e-4)
        assert torch.equal(labels[: target[0], : target[1]], truth.as_subclass(Tensor)[0])
        outside = torch.ones(40, 48, dtype=torch.bool)
        outside[: target[0], : target[1]] = False
        padded += bool(outside.any())
        assert bool((labels[outside] == VOID).all())
        assert bool((found[:, outside] == fill.view(3, 1)).all())
    assert flipped > 3
    assert padded > 3


class Placed(nn.Module):
    """Scores that depend on where in the window a pixel is, and on all of the window."""

    def forward(self, images: Tensor) -> Tensor:
        down = torch.linspace(0, 2, images.shape[-2]).view(1, -1, 1)
        right = torch.linspace(0, 1, images.shape[-1]).view(1, 1, -1)
        mean = images.mean((1, 2, 3)).view(-1, 1, 1)
        first = images[:, 0] * (1 + down)
        return torch.stack([first, mean + right.expand_as(first), right * images[:, 1]], dim=1)


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(37, 53), (16, 24), (9, 11), (7, 130), (131, 5), (17, 25)])
def test_windows_are_averaged_as_by_hand(shape: tuple[int, int]) -> None:
    image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    found = sliding_window_inference(Placed(), image, (16, 24), 3, 1 / 3, most=3)
    tall, wide = max(shape[0], 16), max(shape[1], 24)
    whole = np.zeros((3, tall, wide), np.float32)
    whole[:, : shape[0], : shape[1]] = image.numpy()
    # a window every two thirds, and a last one at the end
    tops = sorted({min(k * 11, tall - 16) for k in range(-(-tall // 11))})
    lefts = sorted({min(k * 16, wide - 24) for k in range(-(-wide // 16))})
    total, times = np.zeros((3, tall, wide)), np.zeros((tall, wide))
    for top in tops:
        for left in lefts:
            piece = torch.from_numpy(whole[None, :, top : top + 16, left : left + 24])
            total[:, top : top + 16, left : left + 24] += Placed()(piece).softmax(1)[0].numpy()
            times[top : top + 16, left : left + 24] += 1
    assert times.min() >= 1
    np.testing.assert_allclose(found.numpy(), (total / times)[:, : shape[0], : shape[1]], atol=1e-5)
    np.testing.assert_allclose(found.sum(0).numpy(), 1, atol=1e-5)


@pytest.mark.quick
def test_more_classes_than_masks_of_bytes_tell_apart_are_refused(
    tuned: tuple[EncoderBundle, Split], tmp_path: Path
) -> None:
    """Class 255 would be taken for what is ignored."""
    rng = np.random.default_rng(0)
    for number, split in enumerate(("train", "train", "val", "val")):
        for kind, array in (
            ("images", rng.integers(0, 256, (8, 40, 3)).astype(np.uint8)),
            ("masks", np.arange(320).reshape(8, 40).astype(np.uint16)),
        ):
            folder = tmp_path / kind / split
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / f"{number}.png")
    with pytest.raises(InputError, match="masks of 320 classes; segmentation takes up to 255"):
        Segment.load(Context(tuned[0], open_source(tmp_path), Options(ignore_index=65535), tmp_path))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"overlap": 1.0}, "overlap: 1; it must be at least 0 and below 1"),
        ({"overlap": -0.5}, "overlap: -0.5; it must be at least 0 and below 1"),
        ({"scale": [0.0, 2.0]}, "scale: 0; it must be above 0"),
    ],
)
def test_windows_with_gaps_and_scales_of_nothing_are_refused(
    tuned: tuple[EncoderBundle, Split], tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    folder = write_scenes(tmp_path / "scenes", 2, 1, (32, 96))
    context = Context(tuned[0], open_source(folder), Options(settings=settings), tmp_path)
    with pytest.raises(InputError, match=f"--set {said}"):
        Segment.configure(context)


# -- detection ---------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_objects_move_as_in_torchvision() -> None:
    rng = np.random.default_rng(0)
    height, width, size = 60, 90, (48, 48)
    cut = mirrored = 0
    for seed in range(16):
        image = torch.from_numpy(rng.random((3, height, width))).float()
        corners = rng.uniform(0, 1, (5, 2)) * [width - 24, height - 24]
        boxes = np.concatenate([corners, corners + rng.uniform(8, 24, (5, 2))], 1).round()
        drawn = torch.zeros(5, height, width, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(drawn, boxes.astype(int), strict=True):
            mask[top:bottom, left:right] = 1
        polygons: list[Any] = [[[a, b, c, b, c, d, a, d]] for a, b, c, d in boxes.tolist()]
        given = Instances(boxes, np.arange(1, 6), np.array([False] * 4 + [True]), polygons)
        found, target, _ = letterbox(image, given, size, True, np.random.default_rng(seed))
        draws = np.random.default_rng(seed)
        low = 48 / 90
        scale = float(np.exp(draws.uniform(math.log(low), math.log(min(1.0, 2 * low)))))
        flip = bool(draws.random() < 0.5)
        scaled = (round(height * scale), round(width * scale))
        top, left = (int(draws.integers(0, max(0, side - 48) + 1)) for side in scaled)
        kept = (min(48, scaled[0]), min(48, scaled[1]))
        named = {
            "image": tv_tensors.Image(image),
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),  # pyright: ignore
        }
        moved: dict[str, Any] = v2.Resize(list(scaled), antialias=True)(named)
        # as an image: its masks are resized by a nearest neighbour that is half a pixel off
        masks = v2.functional.resize(tv_tensors.Image(drawn), list(scaled), InterpolationMode.NEAREST_EXACT)
        moved["masks"] = tv_tensors.Mask(masks)
        moved = {name: v2.functional.crop(value, top, left, *kept) for name, value in moved.items()}
        if flip:
            moved = {name: v2.functional.horizontal_flip(value) for name, value in moved.items()}
        moved = v2.Pad([0, 0, 48 - kept[1], 48 - kept[0]])(moved)
        torch.testing.assert_close(found, moved["image"].as_subclass(Tensor), atol=1e-5, rtol=1e-4)
        inside = moved["boxes"].as_subclass(Tensor)
        area = (inside[:, 2:] - inside[:, :2]).clamp_min(0).prod(1)
        full = torch.from_numpy((boxes[:, 2:] - boxes[:, :2]).prod(1)) * scaled[0] / height * scaled[1] / width
        # no crowd, and of what a crop cuts only what a third of is left
        wanted = [k for k in range(4) if area[k] > full[k] / 3 and bool((inside[k, 2:] - inside[k, :2] > 1).all())]
        assert target["labels"].tolist() == [k + 1 for k in wanted]
        torch.testing.assert_close(target["boxes"], inside[wanted].float(), atol=1e-3, rtol=0)
        assert torch.equal(target["masks"], moved["masks"].as_subclass(Tensor)[wanted])
        cut += len(wanted) < 4
        mirrored += flip
    assert cut > 2
    assert mirrored > 2


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(24, 40), (96, 64), (20, 128)])
def test_detections_come_back_into_the_images_own_pixels(
    tuned: tuple[EncoderBundle, Split], shape: tuple[int, int]
) -> None:
    height, width = shape
    scale = min(1.0, 32 / height, 32 / width)
    tall, wide = round(height * scale), round(width * scale)

    class Found(nn.Module):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            masks = torch.zeros(3, 1, 32, 32)
            masks[0, 0, 2 : tall - 2, 2 : wide - 2] = 1
            masks[1] = 1
            boxes = [[2, 2, wide - 2, tall - 2], [0, 0, 32, 32], [30.0, 30, 32, 32]]
            found = {"boxes": torch.tensor(boxes).float(), "masks": masks, "labels": torch.tensor([1, 2, 2])}
            return [{**found, "scores": torch.tensor([0.9, 0.8, 0.7])}]

    found = detected(Found(), tuned[0], torch.rand(3, height, width), 7, {1: 40, 2: 60}, True)
    assert [one["category_id"] for one in found] == [40, 60]  # the third lies in what was padded
    fx, fy = width / wide, height / tall
    np.testing.assert_allclose(found[0]["bbox"], [2 * fx, 2 * fy, (wide - 4) * fx, (tall - 4) * fy], rtol=1e-5)
    np.testing.assert_allclose(found[1]["bbox"], [0, 0, width, height], rtol=1e-5)
    for one in found:
        left, top, across, down = one["bbox"]
        mask = mask_of(one.get("segmentation", []), height, width)
        assert mask.shape == shape
        assert mask.sum() == pytest.approx(across * down, rel=0.25)
        rows, columns = np.nonzero(mask)
        assert abs(rows.min() - top) <= 2 * fy
        assert abs(columns.max() + 1 - left - across) <= 2 * fx


def test_objects_without_masks_among_others_leave_boxes_alone(
    tuned: tuple[EncoderBundle, Split], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_scenes(tmp_path / "scenes", 2, 2, (32, 32))
    file = folder / "annotations" / "val.json"
    coco = json.loads(file.read_text())
    del coco["annotations"][0]["segmentation"]
    file.write_text(json.dumps(coco))
    context = Context(tuned[0], open_source(folder), Options(), tmp_path / "out")
    settings = DetectConfig(steps=2, batch_size=2, channels=16, regions=8)
    found = judge(Detect("detect", context, Detect.load(context), settings))
    assert [name for name in found["rows"]["encoder"] if name.endswith("ap50")] == ["box_ap50"]
    assert "1 of" in capsys.readouterr().out
