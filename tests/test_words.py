"""Visual words: tokenizers, BEiT and CAE."""

import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from asking import pretrain
from conftest import write_pictures
from safetensors.torch import save_file
from torch import Tensor, nn

import underpaint
from underpaint import tokenizers
from underpaint.backbones import TokenBackbone
from underpaint.cli import main
from underpaint.config import Data
from underpaint.data import Crops, load_images, open_source, train_batches
from underpaint.draws import Draws
from underpaint.errors import InputError
from underpaint.evaluation.pyramid import Pyramid
from underpaint.inference import load_method
from underpaint.masking import Mask, block_mask
from underpaint.methods import CAE, BEiT
from underpaint.methods.cae import Regress
from underpaint.methods.words import frequency_losses
from underpaint.patches import Standardize, patchify, unpatchify
from underpaint.tokenize import Making, make_ready
from underpaint.tokenizers import (
    ConvTokenizer,
    DallE,
    KMeansPatches,
    Tokenizer,
    load_tokenizer,
    making_seconds,
    refuse_collapsed,
    save_tokenizer,
)
from underpaint.train.run_folder import Run
from underpaint.train.schedules import Duration


def photographs(count: int, size: int = 32, seed: int = 0) -> Tensor:
    """Smooth images in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, size // 4, size // 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)


def fitted(codebook_size: int = 32, stride: int = 8) -> KMeansPatches:
    tokenizer = KMeansPatches(codebook_size, stride)
    tokenizer.fit(patchify(photographs(64), (stride, stride)).flatten(0, 1))
    return tokenizer


def encoder(**settings: Any) -> TokenBackbone:
    torch.manual_seed(0)
    made: Any = underpaint.encoder(
        "vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, **settings
    )
    return made


def prepared(kind: type, tokenizer: Tokenizer | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    method = kind(encoder(), codebook_size=32, **settings)
    method.tokenizer = tokenizer or fitted()
    return method


# -- tokenizers --------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_kmeans_is_deterministic_and_near_scikit_learn() -> None:
    from sklearn.cluster import KMeans

    patches = patchify(photographs(100), (4, 4)).flatten(0, 1)
    one, two = KMeansPatches(64, 4), KMeansPatches(64, 4)
    one.fit(patches, seed=3)
    two.fit(patches, seed=3)
    assert torch.equal(one.centres, two.centres)

    def inertia(centres: Tensor) -> float:
        return float(torch.cdist(patches, centres).square().min(1).values.sum())

    reference: Any = KMeans(64, n_init=cast(Any, 1), max_iter=25, random_state=0).fit(patches.numpy())
    assert inertia(one.centres) < 1.05 * reference.inertia_


@pytest.mark.quick
def test_kmeans_leaves_no_word_empty() -> None:
    # two far clusters and one near-empty region: some start is bound to lose its patches
    generator = torch.Generator().manual_seed(0)
    patches = torch.cat([torch.rand(300, 12, generator=generator) * 0.01 + k for k in (0.0, 0.9)])
    tokenizer = KMeansPatches(16, 2)
    tokenizer.fit(patches)
    words = torch.cdist(patches, tokenizer.centres).argmin(1)
    assert len(words.unique()) == 16


@pytest.mark.quick
def test_a_start_that_no_patch_is_near_to_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = torch.rand(300, 12, generator=torch.Generator().manual_seed(0))
    starts = torch.cat([patches[:7], torch.full((1, 12), 50.0)])
    monkeypatch.setattr(tokenizers, "_plus_plus", lambda *_: starts)
    tokenizer = KMeansPatches(8, 2)
    tokenizer.fit(patches)
    assert len(torch.cdist(patches, tokenizer.centres).argmin(1).unique()) == 8


@pytest.mark.quick
def test_words_of_centres_are_themselves() -> None:
    tokenizer = fitted()
    words = torch.randperm(32)[:16].view(1, 16)
    assert torch.equal(tokenizer.encode(tokenizer.decode(words, (4, 4))), words)


@pytest.mark.quick
def test_a_word_belongs_to_its_patch() -> None:
    """Whatever crop or flip an image is: the words are those of the patches that the encoder gets."""
    tokenizer, images = fitted(), photographs(6, seed=5)
    for version in (images, images.flip(-1), images[:, :, 3:27, 5:29]):
        words = tokenizer.encode(version)
        patches = patchify(version, (8, 8))
        for place in range(words.shape[1]):
            alone = unpatchify(patches[:, place : place + 1], (8, 8), (1, 1))
            assert torch.equal(tokenizer.encode(alone)[:, 0], words[:, place])


@pytest.mark.quick
def test_quality_is_what_it_says() -> None:
    tokenizer, images = fitted(), photographs(40, seed=7)
    quality = tokenizer.judge(images.split(16))
    words = tokenizer.encode(images)
    restored = tokenizer.decode(words, (4, 4))
    assert quality["psnr"] == pytest.approx(-10 * math.log10(float((restored - images).square().mean())), abs=1e-4)
    share = np.bincount(words.flatten().numpy(), minlength=32) / words.numel()
    entropy = -float((share[share > 0] * np.log(share[share > 0])).sum())
    assert quality["unigram"] == pytest.approx(entropy)
    assert quality["perplexity"] == pytest.approx(math.exp(entropy))
    assert quality["used"] == pytest.approx((share > 0).mean())
    counts = np.bincount(words.flatten().numpy(), minlength=32)
    tokenizer.count(images.split(16))
    assert torch.allclose(tokenizer.shares, torch.from_numpy((counts + 1) / (counts.sum() + 32)).float())
    with pytest.raises(InputError, match=r"use 3\.0 % of the words"):
        refuse_collapsed({**quality, "used": 0.03}, "words")


def test_saying_words_by_frequency_gains_nothing_over_the_baseline(tmp_path: Path) -> None:
    """However few images there are: three of these 60 judge the tokenizer, which is 48 words."""
    source = open_source(write_pictures(tmp_path / "pictures", 60))
    images = load_images(source, range(60), size=(32, 32))
    tokenizer = KMeansPatches(64, 8)
    data = Data(image_size=(32, 32), crop_scale=(0.4, 1.0))
    cpu, length = torch.device("cpu"), Duration(1)
    make_ready(tokenizer, Making(images, data, 20, 0, cpu, tmp_path / "words", length))
    batches = train_batches(Crops(images, (32, 32), 60, 1, crop_scale=(0.4, 1.0)))
    with closing(batches):
        crops = [tokenizer.encode(next(batches).images).flatten() for _ in range(20)]
    learned = np.bincount(torch.cat(crops[:10]).numpy(), minlength=64) + 1
    words = torch.cat(crops[10:])
    best = float(-np.log(learned / learned.sum())[words.numpy()].mean())
    baseline = float(frequency_losses(words[None], tokenizer.shares).mean())
    assert best == pytest.approx(baseline, abs=0.02)


@pytest.mark.quick
def test_too_few_or_equal_patches_are_refused() -> None:
    with pytest.raises(InputError, match="needs 320 patches; there are 16"):
        KMeansPatches(32, 8).fit(patchify(photographs(1), (8, 8)).flatten(0, 1))
    with pytest.raises(InputError, match="only 1 different patches"):
        KMeansPatches(4, 2).fit(torch.full((100, 12), 0.5))


@pytest.mark.parametrize("kind", ["fsq", "vq"])
def test_convolutional_tokenizers_learn_and_come_back(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(kind, 64, 8, dim=32, blocks=1)
    images = photographs(64)
    optimiser = torch.optim.AdamW(tokenizer.parameters(), 1e-3)
    before = tokenizer.eval().judge([images])["psnr"]
    tokenizer.train()
    for step in range(150):
        optimiser.zero_grad()
        tokenizer.loss(images[step % 4 * 16 :][:16]).backward()
        optimiser.step()
    tokenizer.eval()
    quality = tokenizer.judge([images])
    assert quality["psnr"] > before + 3
    words = tokenizer.encode(images)
    assert words.shape == (64, 16)
    assert 0 <= int(words.min()) <= int(words.max()) < 64
    save_tokenizer(tokenizer, tmp_path / "words.safetensors", quality)
    again = load_tokenizer(tmp_path / "words.safetensors")
    assert again.ready
    assert torch.equal(again.encode(images), words)
    assert torch.equal(again.decode(words, (4, 4)), tokenizer.decode(words, (4, 4)))


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["fsq", "vq"])
def test_words_of_convolutions_stand_where_their_patches_do(kind: Any) -> None:
    """What changes above on the right changes words and pixels there, not below on the left, as in a transposed grid."""
    torch.manual_seed(0)
    tokenizer: Any = ConvTokenizer(kind, 64, 8, dim=32, blocks=1).eval()
    tokenizer.ready = True
    images = photographs(1, 64)
    changed = images.clone()
    changed[..., 0:16, 48:64] = 1 - changed[..., 0:16, 48:64]
    with torch.no_grad():
        codes = [tokenizer.narrow(tokenizer.down(2 * version - 1)).flatten(2) for version in (images, changed)]
        moved = (codes[0] - codes[1]).abs().sum(1).view(8, 8)
        assert moved[:4, 4:].sum() > 3 * moved[4:, :4].sum()
        words = tokenizer.encode(images)
        assert words.shape == (1, 64)
        other = words.clone()
        other[0, 8 * 1 + 6] = (other[0, 8 * 1 + 6] + 21) % 64
        before, after = (tokenizer.decode(version, (8, 8)) for version in (words, other))
        moved = patchify((before - after).abs(), (8, 8)).sum(-1).view(8, 8)
        assert moved[:4, 4:].sum() > 3 * moved[4:, :4].sum()


def test_dalle_has_the_published_layout(tmp_path: Path) -> None:
    """53.8 million numbers in the encoder, as the authors' has; and what is saved comes back (random weights)."""
    with torch.device("meta"):
        whole = DallE()
    parts = [whole.first, whole.encoder, whole.logits]
    assert sum(p.numel() for part in parts for p in part.parameters()) == pytest.approx(53.8e6, abs=0.05e6)
    small = DallE(shrink=2, width=16, codebook_size=32).eval()
    images = photographs(2)
    words = small.encode(images)
    assert words.shape == (2, 4)
    restored = small.decode(words, (2, 2))
    assert restored.shape == images.shape
    assert 0 <= float(restored.min()) <= float(restored.max()) <= 1
    save_tokenizer(small, tmp_path / "dalle.safetensors")
    again = load_tokenizer(tmp_path / "dalle.safetensors")
    assert torch.equal(again.encode(images), words)
    assert torch.equal(again.decode(words, (2, 2)), restored)


def test_converting_dalle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' names become ours, every one."""
    import importlib.util

    script = Path(__file__).parents[1] / "scripts" / "convert_dalle.py"
    spec = importlib.util.spec_from_file_location("convert_dalle", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def theirs(part: str) -> dict[str, Tensor]:
        names: dict[str, Tensor] = {}
        for end in ("w", "b"):
            names[f"blocks.input.{end}"] = torch.zeros(1)
            names[f"blocks.output.conv.{end}"] = torch.zeros(1)
            for group in range(1, 5):
                for block in (1, 2):
                    place = f"blocks.group_{group}.block_{block}"
                    for conv in range(1, 5):
                        names[f"{place}.res_path.conv_{conv}.{end}"] = torch.zeros(1)
                    if block == 1 and not (part == "encoder" and group == 1):
                        names[f"{place}.id_path.{end}"] = torch.zeros(1)
        return names

    with torch.device("meta"):
        wanted = set(DallE().state_dict())
    found = {**module.ours(theirs("encoder"), "encoder"), **module.ours(theirs("decoder"), "decoder")}
    assert {*found, "shares"} == wanted


@pytest.mark.quick
def test_broken_tokenizer_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'underpaint tokenizer' makes one"):
        load_tokenizer(tmp_path / "none.safetensors")
    save_tokenizer(fitted(), tmp_path / "words.safetensors")
    save_file({"centres": torch.zeros(2, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="no description of one"):
        load_tokenizer(tmp_path / "other.safetensors")
    (tmp_path / "words.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a tokenizer"):
        load_tokenizer(tmp_path / "words.safetensors")


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(("grid", "hidden"), [((14, 14), 98), ((14, 14), 75), ((4, 4), 8), ((2, 8), 8), ((8, 8), 63)])
def test_block_masks_hide_exactly_as_many(grid: tuple[int, int], hidden: int) -> None:
    mask = block_mask(200, grid, hidden, Draws.of(0, 200))
    assert mask.hidden.shape == (200, hidden)
    together = torch.cat([mask.visible, mask.hidden], dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(grid[0] * grid[1]).expand(200, -1))
    again = block_mask(200, grid, hidden, Draws.of(0, 200))
    assert torch.equal(mask.hidden, again.hidden)


def published_blocks(grid: tuple[int, int], hidden: int, smallest: int, rng: np.random.Generator) -> np.ndarray:
    """One mask by BEiT's algorithm 1 as its authors run it, which may end with fewer than `hidden` patches."""
    (rows, columns), mask = grid, np.zeros(grid, bool)
    while (left := hidden - mask.sum()) > 0:
        for _ in range(10):
            area = smallest + rng.random() * (left - smallest)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if tall >= rows or wide >= columns:
                continue
            top, first = rng.integers(0, rows - tall + 1), rng.integers(0, columns - wide + 1)
            block = mask[top : top + tall, first : first + wide]
            if 0 < block.size - block.sum() <= left:
                block[:] = True
                break
        else:
            return mask
    return mask


def shape_of(masks: np.ndarray) -> tuple[float, float, float]:
    """Sides between hidden and visible, and patches without a hidden neighbour, over the hidden patches; and how unevenly
    the positions are hidden."""
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1))).astype(int)
    beside = padded[:, 2:, 1:-1] + padded[:, :-2, 1:-1] + padded[:, 1:-1, 2:] + padded[:, 1:-1, :-2]
    count = masks.sum()
    return ((4 - beside) * masks).sum() / count, ((beside == 0) & masks).sum() / count, masks.mean(0).std()


@pytest.mark.quick
@pytest.mark.parametrize(("grid", "hidden"), [((14, 14), 75), ((8, 8), 32), ((4, 4), 8)])
def test_block_masks_are_cut_as_published(grid: tuple[int, int], hidden: int) -> None:
    """As many sides, single patches and hidden borders as the official generator makes, where it hides all that it should;
    blocks that are cut at random have a tenth more sides, and ten times as many single patches."""
    rng, count = np.random.default_rng(0), 2000
    theirs = np.stack(
        [published_blocks(grid, hidden, max(2, round(0.08 * grid[0] * grid[1])), rng) for _ in range(count)]
    )
    mask = block_mask(count, grid, hidden, Draws.of(0, count))
    ours = torch.zeros(count, grid[0] * grid[1]).scatter(1, mask.hidden, 1.0).view(count, *grid).bool().numpy()
    sides, single, uneven = shape_of(ours)
    wanted = shape_of(theirs)
    assert sides == pytest.approx(wanted[0], rel=0.03)
    assert single == pytest.approx(wanted[1], rel=0.5)
    assert uneven == pytest.approx(wanted[2], rel=0.1)


# -- methods -----------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("kind", [BEiT, CAE])
def test_the_baseline_is_that_of_frequencies(kind: type) -> None:
    method, images = prepared(kind), photographs(16) * 2 - 1
    method.tokenizer.count([photographs(64, seed=1)])  # of other images: a batch's own would know its answers
    mask = method.sample(16, 32, 32, Draws.of(0, 16))
    words = method.targets(images, mask)
    counts = np.bincount(method.tokenizer.encode(photographs(64, seed=1)).flatten().numpy(), minlength=32) + 1
    wanted = float(np.mean([-math.log(counts[word] / counts.sum()) for word in words.flatten().tolist()]))
    assert float(frequency_losses(words, method.tokenizer.shares).mean()) == pytest.approx(wanted, rel=1e-5)
    terms = method(images, mask).terms
    assert 0 <= float(terms["accuracy"]) <= 1
    if kind is BEiT:
        assert float(terms["baseline"]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.quick
def test_words_are_those_of_the_images_before_standardisation() -> None:
    method = prepared(BEiT)
    standardize = Standardize([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    method.standardize.load_state_dict(standardize.state_dict())
    images = photographs(4)
    assert torch.equal(method.words(standardize(images)), method.tokenizer.encode(images))


@pytest.mark.quick
def test_an_unfitted_tokenizer_is_not_used() -> None:
    with pytest.raises(RuntimeError, match="not fitted yet"):
        BEiT(encoder(), codebook_size=32)(photographs(2))


@pytest.mark.quick
def test_alignment_target_is_the_encoder_without_gradient() -> None:
    method, images = prepared(CAE), photographs(4) * 2 - 1
    mask = method.sample(4, 32, 32, Draws.of(0, 4))
    tokens = method.encoder.embed(images)
    target = method.aligned_to(tokens, mask)
    assert not target.requires_grad
    assert torch.equal(target, method.encode(tokens, mask.hidden))
    with torch.no_grad():
        method.encoder.model.blocks[0].mlp.fc1.weight.add_(0.1)
    assert not torch.allclose(method.aligned_to(tokens, mask), target)
    # no gradient passes through the target: pixels of hidden patches, which only it sees, get none
    pixels = images.clone().requires_grad_(True)
    method(pixels, mask).loss.backward()
    assert pixels.grad is not None
    moved = patchify(pixels.grad, (8, 8)).abs().sum(-1)
    assert float(moved.gather(1, mask.hidden).max()) == 0
    assert float(moved.gather(1, mask.visible).min()) > 0
    # the loss is what its parts say
    objective = method(images, mask)
    assert objective.loss.item() == pytest.approx(
        float(objective.terms["words"] + 2 * objective.terms["alignment"]), rel=1e-5
    )


@pytest.mark.quick
def test_alignment_target_has_no_drop_path() -> None:
    method: Any = CAE(encoder(drop_path_rate=0.8), codebook_size=32)
    method.train()
    mask = method.sample(4, 32, 32, Draws.of(0, 4))
    tokens = method.encoder.embed(photographs(4))
    one, two = (method.aligned_to(tokens, mask) for _ in range(2))
    assert torch.equal(one, two)
    assert method.encoder.training
    assert not torch.equal(method.encode(tokens, mask.hidden), method.encode(tokens, mask.hidden))


@pytest.mark.quick
def test_regressor_ignores_the_order_of_visible_patches_and_leaves_them_alone() -> None:
    method, images = prepared(CAE), photographs(4) * 2 - 1
    mask = method.sample(4, 32, 32, Draws.of(0, 4))
    order = torch.randperm(mask.visible.shape[1])
    shuffled = Mask(mask.visible[:, order], mask.hidden)
    assert torch.allclose(method.predict(images, mask), method.predict(images, shuffled), atol=1e-5)
    visible = method.encode(method.encoder.embed(images), mask.visible)
    before = visible.clone()
    method.regress(visible, mask)
    assert torch.equal(visible, before)


@pytest.mark.quick
def test_regressor_is_the_slow_loop() -> None:
    """Head by head, image by image, query by query; the second residual starts from the normalised stream."""
    torch.manual_seed(0)
    block = Regress(8, 2, 0.3)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    hidden, visible, hidden_places, visible_places = (
        torch.randn(2, 3, 8),
        torch.randn(2, 5, 8),
        torch.randn(2, 3, 8),
        torch.randn(2, 5, 8),
    )
    found = block(hidden, visible, hidden_places, visible_places)
    for image in range(2):
        everything = torch.cat([visible[image], hidden[image]])
        places = torch.cat([visible_places[image], hidden_places[image]])
        keys = block.key(block.norm_key(everything + places))
        values = block.value(block.norm_value(everything))
        for place in range(3):
            query = block.query(block.norm_query(hidden[image, place] + hidden_places[image, place]))
            heads = []
            for part in (slice(0, 4), slice(4, 8)):
                weights = (keys[:, part] @ query[part] / math.sqrt(4)).softmax(0)
                heads.append(weights @ values[:, part])
            stream = block.norm(hidden[image, place] + block.gamma1 * block.out(torch.cat(heads)))
            wanted = stream + block.gamma2 * block.mlp(stream)
            assert torch.allclose(found[image, place], wanted, atol=1e-5)


@pytest.mark.quick
def test_settings_reach_the_modules() -> None:
    method = prepared(
        CAE, regressor_depth=3, decoder_depth=1, gamma=0.02, alignment=0.5, mask="random", mask_ratio=0.25
    )
    assert (len(method.regressor), len(method.blocks)) == (3, 1)
    for block in method.regressor:
        assert block.heads == 1  # 32 wide
        assert torch.equal(block.gamma1, torch.full((32,), 0.02))
        assert torch.equal(block.gamma2, torch.full((32,), 0.02))
    refused: list[tuple[dict[str, Any], str]] = [
        ({"regressor_depth": 0}, "regressor_depth is 0"),
        ({"decoder_depth": -1}, "decoder_depth is -1"),
        ({"gamma": 0.0}, "gamma is 0"),
    ]
    for settings, said in refused:
        with pytest.raises(ValueError, match=said):
            CAE(encoder(), codebook_size=32, **settings)
    assert torch.equal(method.blocks[0].ls1.gamma, torch.full((32,), 0.02))
    assert method.head[1].out_features == 32
    assert method.sample(2, 32, 32).hidden.shape == (2, 4)
    objective = method(photographs(4) * 2 - 1)
    assert objective.loss.item() == pytest.approx(
        float(objective.terms["words"] + 0.5 * objective.terms["alignment"]), rel=1e-5
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    "settings", [{"decoder": False}, {"alignment": 0.0}, {"decoder": False, "alignment": 0.0}, {"target": "pixels"}]
)
def test_the_controls_run(settings: dict[str, Any]) -> None:
    method = prepared(CAE, **settings)
    images = photographs(4) * 2 - 1
    objective = method(images)
    objective.loss.backward()
    silent = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []
    assert ("alignment" in objective.terms) == (settings.get("alignment", 2.0) > 0)
    frames = method.restore(images)
    assert all(frame.shape == images.shape for frame in frames.values())
    assert method.score(images).shape == (4,)


@pytest.mark.quick
def test_beit_on_timms_beit_with_relative_positions() -> None:
    torch.manual_seed(0)
    relative: Any = underpaint.encoder(
        "beit_base_patch16_224", image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2
    )
    method = BEiT(relative, codebook_size=32)
    method.tokenizer = fitted()
    images = photographs(4) * 2 - 1
    method(images).loss.backward()
    table = relative.model.blocks[0].attn.relative_position_bias_table
    assert table.grad is not None
    assert bool(table.grad.any())
    with torch.no_grad():
        assert torch.allclose(relative(images).pooled, relative.model(images), atol=1e-5)
        shapes = [tuple(level.shape) for level in Pyramid(relative, 16, depths=True)(images)]
    assert shapes == [(4, 16, 8, 8), (4, 16, 4, 4), (4, 16, 2, 2), (4, 16, 1, 1)]


@pytest.mark.unhooked  # the hook would refuse the argument before the method's own sentence
def test_cae_refuses_encoders_that_need_all_patches() -> None:
    for name in ("swin_tiny_patch4_window7_224", "resnet18"):
        other: Any = underpaint.encoder(name)
        with pytest.raises(TypeError, match=r"CAE needs a plain transformer"):
            CAE(other, codebook_size=32)


# -- runs --------------------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {"encoder.embed_dim": 32, "encoder.depth": 2, "encoder.num_heads": 2, "method.codebook_size": 32}


def test_a_run_makes_and_keeps_its_tokenizer(tmp_path: Path, capsys: Any) -> None:
    pictures = write_pictures(tmp_path / "pictures", 90)
    arguments: dict[str, Any] = {
        "method": "cae",
        "encoder": "vit_tiny_patch16_224",
        "image_size": (32, 32),
        "patch_size": 8,
        "batch_size": 16,
        "settings": TINY,
        "checkpoint_every": 2,
    }
    pretrain(pictures, tmp_path / "run", steps=2, stop_at=1e9, **arguments)
    run = Run(tmp_path / "run")
    made = run.recipe().measured["tokenizer"]
    assert made["kind"] == "kmeans"
    assert made["quality"]["psnr"] > 10
    stored: Any = load_tokenizer(run.tokenizer)
    method, standardize, _ = load_method(tmp_path / "run")
    kept: Any = method
    assert torch.equal(kept.tokenizer.centres, stored.centres)
    assert torch.equal(kept.standardize.mean, standardize.mean)
    before = run.tokenizer.read_bytes()
    pretrain(pictures, tmp_path / "run", steps=4, stop_at=1e9, **arguments)
    assert run.tokenizer.read_bytes() == before
    assert [line["step"] for line in run.lines("metrics.jsonl")][-1] == 4
    # another run with these words says the same of them
    pretrain(
        pictures,
        tmp_path / "other",
        steps=1,
        stop_at=1e9,
        **{
            **arguments,
            "method": "beit",
            "settings": {**TINY, "method.codebook_size": 32, "method.tokenizer": str(run.tokenizer)},
        },
    )
    other = Run(tmp_path / "other").recipe().measured["tokenizer"]
    assert not other["made"]
    assert other["quality"]["psnr"] == pytest.approx(made["quality"]["psnr"])
    assert made["made"]
    assert made["seconds"] > 0
    assert other["seconds"] == made["seconds"]  # that making them took, not that of judging them again
    run.tokenizer.with_suffix(".json").write_text('{"quality": null}')  # from before it told the time
    assert making_seconds(run.tokenizer) is None


@pytest.mark.parametrize("kind", ["fsq", "vq"])
def test_a_learned_tokenizer_stays_as_it_was_given(kind: Any, tmp_path: Path) -> None:
    """Batch norm and codebooks would go on changing in train mode, into which pictures and probes put a method back."""
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(kind, 64, 8, dim=16, blocks=1)
    tokenizer.loss(photographs(64)).backward()
    file = tmp_path / "words.safetensors"
    save_tokenizer(tokenizer.eval(), file)
    pictures = write_pictures(
        tmp_path / "pictures", 150
    )  # of which enough judge to be seen to use a tenth of the words
    pretrain(
        pictures,
        tmp_path / "run",
        method="beit",
        encoder="vit_tiny_patch16_224",
        image_size=(32, 32),
        patch_size=8,
        batch_size=16,
        steps=3,
        probe_every=1,
        settings={"encoder.embed_dim": 32, "encoder.depth": 2, "encoder.num_heads": 2, "method.tokenizer": str(file)},
    )
    found = Run(tmp_path / "run").load()
    assert found is not None
    for name, value in load_tokenizer(file).state_dict().items():
        if name != "shares":  # counted on this run's images
            assert torch.equal(found[0][f"method.tokenizer.{name}"], value), name


def test_repeating_a_run_makes_its_own_words_again(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 90)
    first = pretrain(
        pictures,
        tmp_path / "first",
        method="cae",
        encoder="vit_tiny_patch16_224",
        image_size=(32, 32),
        patch_size=8,
        batch_size=16,
        steps=2,
        settings=TINY,
    )
    again = pretrain(pictures, tmp_path / "again", recipe=str(first.path / "recipe.yaml"))
    assert again.tokenizer.read_bytes() == first.tokenizer.read_bytes()
    assert again.lines("metrics.jsonl")[-1]["loss"] == first.lines("metrics.jsonl")[-1]["loss"]


def test_the_command(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = write_pictures(tmp_path / "pictures", 90)
    out = tmp_path / "words.safetensors"
    shared = ["tokenizer", str(pictures), "--image-size", "32", "--stride", "8", "--out", str(out)]
    assert main([*shared, "--codebook-size", "32"]) == 0
    assert "PSNR" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 1000
    assert load_tokenizer(out).codebook_size == 32
    fsq = [*shared, "--kind", "fsq", "--codebook-size", "64"]
    monkeypatch.setattr("underpaint.tokenizers.LEAST_USE", 1.01)
    before = out.read_bytes()
    assert main([*fsq, "--minutes", "0.02"]) == 2
    assert "of the words; at least 101 % are needed" in capsys.readouterr().err
    assert out.read_bytes() == before
    monkeypatch.setattr("underpaint.tokenizers.LEAST_USE", 0.0)
    assert main([*fsq, "--minutes", "0.04"]) == 0
    assert "going on from step" in capsys.readouterr().out
    assert load_tokenizer(out).kind == "fsq"
    # all 0.04 minutes of training, of which the call that was refused had 0.02
    assert json.loads(out.with_suffix(".json").read_text())["seconds"] >= 2.4
    for wrong, said in (
        (["--kind", "none"], "there are kmeans, fsq, vq"),
        (["--stride", "5"], "does not divide images of 32x32"),
        (["--stride", "0"], "does not divide images of 32x32"),
        (["--kind", "fsq", "--minutes", "0"], "must be above 0"),
        (["--codebook-size", "-5"], "at least 2"),
        (["--kind", "fsq", "--codebook-size", "7"], "an FSQ tokenizer has 64, 256"),
        (["--codebook-size", "100000"], "k-means has 2 to 8192 words"),
    ):
        assert main([*shared, *wrong]) == 2
        assert said in capsys.readouterr().err
