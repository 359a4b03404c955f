"""The corrupted-image method: sampling, targets, both objectives on both families."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import pretrain
from conftest import write_pictures
from lightning_fabric import Fabric
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import Tensor

import underpaint
from underpaint.backbones.norms import settled
from underpaint.cli import main
from underpaint.data import Batch
from underpaint.draws import Draws
from underpaint.inference import load_method
from underpaint.methods import CIM
from underpaint.methods.cim import Corruption, auroc
from underpaint.patches import Standardize, patchify
from underpaint.prepare import stepper_for
from underpaint.recipes.recipe import checked
from underpaint.targets import sliding_window, window_moments
from underpaint.tokenizers import ConvTokenizer

ENCODERS: dict[str, Any] = {
    "vit": lambda: underpaint.encoder(
        "vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2
    ),
    "resnet": lambda: underpaint.encoder("resnet10t"),
}
each_family = pytest.mark.parametrize("family", list(ENCODERS))


def photographs(count: int = 8, seed: int = 0) -> Tensor:
    """Smooth standardised images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 1) * 4 - 2


def made(family: str = "vit", **settings: Any) -> CIM:
    torch.manual_seed(0)
    method = CIM(ENCODERS[family](), codebook_size=64, generator_dim=32, image_size=(32, 32), **settings)
    tokenizer = ConvTokenizer("fsq", 64, method.word, dim=32, blocks=1)
    tokenizer.ready = True
    method.generator.tokenizer = tokenizer.requires_grad_(False).eval()
    method.standardize.mean.fill_(0.5)
    method.standardize.std.fill_(0.25)
    return method


def drawn(method: CIM, count: int = 8, seed: int = 0) -> Corruption:
    return method.sample(count, 32, 32, Draws.of(seed, count))


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("side", [3, 4, 8, 9])
def test_sliding_window_is_the_naive_loop(side: int) -> None:
    images = torch.rand(2, 3, 12, 10, dtype=torch.float64).float()
    before, after = side // 2, (side - 1) // 2
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (before, after), (before, after)), mode="reflect")
    found = sliding_window(images, side, 1e-4).numpy()
    for row in range(12):
        for column in range(10):
            window = padded[:, :, row : row + side, column : column + side].astype(np.float64)
            mean, variance = window.mean((2, 3)), window.var((2, 3))
            wanted = (images[:, :, row, column].numpy() - mean) / np.sqrt(variance + 1e-4)
            assert np.allclose(found[:, :, row, column], wanted, atol=1e-4)
    assert np.abs(found).max() <= np.sqrt(side * side - 1)


@pytest.mark.quick
def test_flat_images_have_flat_targets() -> None:
    assert float(sliding_window(torch.full((1, 3, 16, 16), 0.97), 8, 1e-4).abs().max()) < 1e-3
    bright = 1 - 1e-4 * torch.rand(4, 3, 32, 32)
    assert float(window_moments(bright, 8)[1].min()) >= 0


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_draws_follow_the_distribution() -> None:
    method = made()
    logits = torch.randn(1, 1, 64).expand(1, 200_000, -1)
    uniform = torch.rand(1, 200_000, generator=torch.Generator().manual_seed(0))
    words = method.sample_tokens(logits, torch.zeros(1, 200_000, dtype=torch.long), uniform)
    share = torch.bincount(words.flatten(), minlength=64) / 200_000
    wanted = logits[0, 0].softmax(0)
    assert torch.allclose(share, wanted, atol=4e-3)
    # the ends of the interval are the first and the last possible word
    sure = torch.full((1, 2, 64), -200.0)
    sure[..., 5] = 50
    assert method.sample_tokens(
        sure, torch.zeros(1, 2, dtype=torch.long), torch.tensor([[0.0, 0.999999]])
    ).tolist() == [[5, 5]]


@pytest.mark.quick
@each_family
def test_corruption_stays_where_it_belongs(family: str) -> None:
    method, images = made(family), photographs()
    noise = drawn(method)
    found = method.corrupt(images, noise)
    assert torch.equal(found.words.gather(1, noise.mask.visible), found.golden.gather(1, noise.mask.visible))
    assert bool(found.replaced.gather(1, noise.mask.hidden).any())
    # all of it is the codec's: untouched places too are what the whole grid decodes to, not the photograph's pixels
    assert torch.equal(found.images, method.generator.spoken(images, found.words))
    size = (method.word, method.word)
    index = noise.mask.visible.unsqueeze(-1).expand(-1, -1, 3 * method.word**2)
    kept, own = (patchify(version, size).gather(1, index) for version in (found.images, images))
    assert float((kept - own).abs().mean()) > 0.05
    assert float(method.standardize.inverse(found.images).min()) >= 0
    assert float(method.standardize.inverse(found.images).max()) <= 1
    assert torch.equal(method.corrupt(images, noise).words, found.words)
    other = drawn(method, seed=1)
    assert not torch.equal(method.corrupt(images, other).words, found.words)


@pytest.mark.quick
def test_a_replaced_word_shows_beyond_its_cell() -> None:
    method = made()
    words = method.generator.words(photographs(1))
    changed = words.clone()
    changed[0, 5] = (changed[0, 5] + 17) % 64
    difference = (
        method.generator.spoken(photographs(1), words) - method.generator.spoken(photographs(1), changed)
    ).abs()
    inside = torch.zeros(1, 1, 32, 32)
    inside[..., 8:16, 8:16] = 1
    assert float((difference * (1 - inside)).max()) > 1e-4


@pytest.mark.quick
def test_pasting_keeps_the_photograph() -> None:
    method, images = made(paste=True), photographs()
    noise = drawn(method)
    found = patchify(method.corrupt(images, noise).images, (8, 8))
    wanted = patchify(images, (8, 8))
    index = noise.mask.visible.unsqueeze(-1).expand(-1, -1, wanted.shape[-1])
    assert torch.equal(found.gather(1, index), wanted.gather(1, index))


# -- objectives --------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@each_family
@pytest.mark.parametrize("objective", ["pixels", "detect"])
def test_shapes_and_gradients(family: str, objective: Any) -> None:
    method, images = made(family, objective=objective), photographs()
    noise = drawn(method)
    corrupted = method.corrupt(images, noise)
    answer = method.enhance(corrupted.images)
    assert answer.shape == ((8, 3, 32, 32) if objective == "pixels" else (8, 1, *method.masking.grid(32, 32)))
    left, _, _ = method.losses(images, corrupted)
    left.mean().backward()
    # the enhancer's loss ends at the corrupted image
    assert all(parameter.grad is None for parameter in method.generator.parameters())
    assert any(parameter.grad is not None for parameter in method.encoder.parameters())
    method.zero_grad()
    objective_ = method(images, noise)
    objective_.loss.backward()
    assert all(parameter.grad is None for parameter in method.generator.tokenizer.parameters())
    assert all(p.grad is not None for p in method.generator.parameters() if p.requires_grad)
    for frame in method.restore(images).values():
        assert frame.shape == images.shape
    assert method.score(images).shape == (8,)


@pytest.mark.quick
def test_places_of_a_network_hold_their_words_in_order() -> None:
    """A place of 32 px holds 4 x 4 words of 8 px, row by row."""
    method = made("resnet", objective="detect")
    assert (method.place, method.word, method.masking.grid(32, 32)) == (32, 8, (4, 4))
    with torch.no_grad():
        method.head.weight.zero_()
        method.head.bias.copy_(torch.arange(16.0))
    method.eval()
    assert torch.equal(method.enhance(photographs(1))[0, 0], torch.arange(16.0).view(4, 4))


@pytest.mark.quick
def test_golden_draws_are_no_replacements() -> None:
    method, images = made(objective="detect", sampler="none"), photographs()
    corrupted = method.corrupt(images, drawn(method))
    assert not bool(corrupted.replaced.any())
    terms = method(images, drawn(method)).terms
    assert float(terms["auroc"]) == 0.5
    assert float(terms["hits"]) == 1
    assert float(terms["majority"]) == 1


@pytest.mark.quick
@pytest.mark.parametrize("sampler", ["argmax", "uniform", "unigram", "none"])
def test_the_controls_run(sampler: Any) -> None:
    objective = made(sampler=sampler)(photographs())
    assert torch.isfinite(objective.loss)


@pytest.mark.quick
def test_auroc_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    scores, truth = rng.normal(size=500), rng.integers(0, 2, 500)
    found = auroc(torch.from_numpy(scores).float(), torch.from_numpy(truth).float())
    assert float(found) == pytest.approx(roc_auc_score(truth, scores), abs=1e-5)


@pytest.mark.quick
def test_the_draws_do_not_depend_on_the_enhancer() -> None:
    one, two = made(objective="pixels"), made("resnet", objective="detect", window=5)
    assert torch.equal(drawn(one).uniform, drawn(two).uniform)


@pytest.mark.quick
def test_words_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="whole number of words"):
        CIM(ENCODERS["vit"](), stride=16)


@pytest.mark.quick
def test_two_clips_share_nothing() -> None:
    method = made()
    generator, enhancer = method.clip_groups()
    assert not {id(p) for p in generator} & {id(p) for p in enhancer}
    everything = {id(p) for p in method.parameters() if p.requires_grad}
    assert {id(p) for p in [*generator, *enhancer]} == everything


@pytest.mark.quick
def test_the_weight_of_one_loss_does_not_reach_the_other() -> None:
    """Through a step of the loop: an enhancer's loss a thousand times as large leaves the generator's step as it is."""
    recipe = checked({"method": {"name": "cim"}, "optimiser": {"batch_size": 8, "clip": 0.1, "lr": 0.32}})
    found: list[dict[str, Tensor]] = []
    for factor in (1.0, 1000.0):
        method: Any = made()
        plain = method.losses

        def louder(images: Tensor, corrupted: Any, plain: Any = plain, factor: float = factor) -> Any:
            left, trivial, answer = plain(images, corrupted)
            return factor * left, trivial, answer

        method.losses = louder
        current = stepper_for(Fabric(accelerator="cpu", devices=1), recipe, method, Standardize([0.5] * 3, [0.25] * 3))
        images = photographs() * 0.25 + 0.5
        _, bad = current.step(Batch(images, list(range(8))), 0, 1.0)
        assert float(bad) == 0
        found.append({name: p.detach().clone() for name, p in method.named_parameters()})
    one, two = found
    assert all(torch.equal(one[name], two[name]) for name in one if name.startswith("generator."))


@pytest.mark.parametrize("objective", ["pixels", "detect"])
def test_overfits_one_batch(objective: Any) -> None:
    # draws that do not follow the generator, or it would learn to make nothing that can be found
    method, images = made(objective=objective, sampler="uniform"), photographs()
    noise = drawn(method)
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 3e-3, weight_decay=0.0)
    with torch.no_grad():
        first = float(method.losses(images, method.corrupt(images, noise))[0].mean())
    for _ in range(150):
        optimiser.zero_grad()
        method(images, noise).loss.backward()
        optimiser.step()
    terms = method(images, noise).terms
    assert float(terms["generator"]) < 0.5 * math.log(64)
    assert float(terms["enhancer"]) < 0.5 * first
    if objective == "detect":
        assert float(terms["auroc"]) > 0.95
        assert float(terms["majority"]) < 0.7


# -- batch norm --------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_batch_norms_settle_on_clean_images() -> None:
    """On one batch that is all there is, the copy in eval mode does what train mode does; the encoder stays as it was."""
    encoder = ENCODERS["resnet"]()
    encoder.train()
    encoder(10 * photographs())
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    images = photographs(32)
    copy, other = settled(encoder, lambda: [images]), settled(encoder, lambda: [3 * images + 1])
    assert not copy.training
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in before.items())
    with torch.no_grad():
        wanted, found, shifted = (network(images).patches for network in (encoder, copy, other))
    # running variances are unbiased, those of a batch are not: a map of one place and 32 images is 1/31 apart
    assert float((found - wanted).abs().mean()) < 0.05 * float(wanted.abs().mean())
    assert float((shifted - wanted).abs().mean()) > 0.2 * float(wanted.abs().mean())
    vit = ENCODERS["vit"]()
    assert settled(vit, lambda: [images]) is vit


@pytest.mark.quick
@pytest.mark.parametrize(("size", "patch", "hidden"), [(224, 16, 110), (64, 8, 36)])
def test_the_hidden_count_is_fixed(size: int, patch: int, hidden: int) -> None:
    encoder: Any = underpaint.encoder(
        "vit_tiny_patch16_224", image_size=size, patch_size=patch, embed_dim=32, depth=1, num_heads=1
    )
    noise = CIM(encoder, codebook_size=64).sample(5, size, size)
    assert noise.mask.hidden.shape == noise.uniform.shape == (5, hidden)


@pytest.mark.quick
def test_settings_that_cannot_be_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"temperature": 0.0}, "temperature is 0"),
        ({"window": 64}, "window is 64 px"),
    ]
    for settings, said in cases:
        with pytest.raises(ValueError, match=said):
            CIM(ENCODERS["vit"](), **settings)


OTHERS: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 32]},
    "swin_tiny_patch4_window7_224": {
        "image_size": 64,
        "embed_dim": 24,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 1, 1],
        "window_size": 2,
    },
    "swinv2_tiny_window8_256": {
        "image_size": 64,
        "embed_dim": 24,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 1, 1],
        "window_size": 2,
    },
    "hiera_tiny_224": {"image_size": 64, "embed_dim": 16, "stages": [1, 1, 1, 1]},
}


@pytest.mark.parametrize("name", list(OTHERS))
@pytest.mark.parametrize("objective", ["pixels", "detect"])
def test_enhancers_of_other_families(name: str, objective: Any) -> None:
    size = OTHERS[name].get("image_size", 32)
    encoder = underpaint.encoder(name, **OTHERS[name])
    method = CIM(encoder, objective=objective, codebook_size=64, generator_dim=32, image_size=(size, size))
    method.generator.tokenizer.ready = True
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    method(images).loss.backward()
    silent = [key for key, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []  # several processes would wait for its gradient
    assert all(frame.shape == images.shape for frame in method.restore(images).values())


def test_a_run_of_a_resnet(tmp_path: Path) -> None:
    """With a tokenizer of its own; batch norms of clean images in the file, those of corrupted ones in the method."""
    pictures = write_pictures(tmp_path / "pictures", 90)
    run = pretrain(
        pictures,
        tmp_path / "run",
        method="cim",
        encoder="resnet10t",
        image_size=(32, 32),
        batch_size=16,
        steps=40,
        checkpoint_every=20,
        settings={
            "encoder.output_stride": 8,
            "encoder.channels": [8, 16, 16, 32],
            "encoder.stem_width": 8,
            "method.codebook_size": 64,
            "method.generator_dim": 32,
            "method.generator_depth": 1,
        },
    )
    made = run.recipe().measured["tokenizer"]
    assert (made["kind"], made["made"]) == ("fsq", True)
    assert not (run.path / "tokenizer.training").exists()
    found = run.load()
    assert found is not None
    written = load_file(run.path / "encoder.safetensors")
    assert torch.equal(written["bn1.weight"], found[0]["method.encoder.model.bn1.weight"])
    name = "bn1.running_mean"
    assert not torch.allclose(written[name], found[0][f"method.encoder.model.{name}"], atol=1e-4)
    method, _, _ = load_method(run.path)  # what restores is what was trained
    for key, value in method.encoder.model.state_dict().items():
        assert torch.equal(value, found[0][f"method.encoder.model.{key}"])
    picture = str(pictures / "class0" / "0000.png")
    assert main(["restore", str(run.path), picture, "--out", str(tmp_path / "x.png")]) == 0
    assert main(["score", str(run.path), str(pictures), "--out", str(tmp_path / "x.csv")]) == 0
