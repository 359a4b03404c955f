"""The promises that every method keeps, over METHODS. One that is not kept is named here with its reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from torch import Tensor, nn

import underpaint
from underpaint.backbones import Backbone, create_arguments, from_arguments, load_encoder, save_encoder, standardize_for
from underpaint.data import Batch
from underpaint.draws import Draws
from underpaint.masking import MASKS, Mask, hidden_map, hide_highest
from underpaint.methods import METHODS
from underpaint.methods.masked import MaskedMethod
from underpaint.patches import Standardize, patchify, take
from underpaint.prepare import stepper_for
from underpaint.recipes.recipe import checked
from underpaint.train.meter import Meter

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
# weights that no gradient reaches, with the reason
WITHOUT_GRADIENT: dict[str, dict[str, str]] = {}
# what a method predicts of hidden pixels, from the clean images and the mask
PREDICTIONS: dict[str, Callable[[Any, Tensor, Any], Tensor]] = {
    "mae": lambda method, images, mask: method.predict(images, mask),
    "energy": lambda method, images, noise: method.step(method.corrupt(images, noise), noise)[0],
    # without the visible patches, which stay as they are: a change of those must change the hidden ones
    "conditional-energy": lambda method, images, noise: take(
        patchify(method.step(method.corrupt(images, noise), noise)[0], (4, 4)), noise.hidden
    ),
    "localmim": lambda method, images, mask: torch.cat(
        [
            tap(tokens, mask).flatten(1)
            for tap, tokens in zip(method.decoders, method.every_tap(images, mask), strict=True)
        ],
        1,
    ),
    "simmim": lambda method, images, mask: method.predict(images, mask),
    "beit": lambda method, images, mask: method.predict(images, mask),
    "cae": lambda method, images, mask: method.predict(images, mask),
    # the enhancer sees words of hidden patches on purpose; what must not see them is the generator
    "cim": lambda method, images, noise: method.generator.predict(images, noise.mask),
}
WORDS = ("beit", "cae")  # predict words, which come from the images
each_method = pytest.mark.parametrize("name", sorted(METHODS))


def small(name: str, height: int = 16, width: int = 16, channels: int = 3, **settings: Any) -> Any:
    torch.manual_seed(0)
    arguments = create_arguments(
        "vit_tiny_patch16_224", image_size=(height, width), patch_size=4, in_chans=channels, **SMALL
    )
    if name in WORDS:
        settings = {"codebook_size": 16, **settings}
    if name == "cim":
        settings = {"codebook_size": 64, **settings}
    method: Any = METHODS[name](from_arguments(arguments), **settings)  # pyright: ignore[reportCallIssue]
    if name in WORDS:
        images = photographs(64, channels, height, width).clamp(-2, 2) / 4 + 0.5
        method.tokenizer.fit(patchify(images, (4, 4)).flatten(0, 1))
        method.standardize = Standardize([0.5] * channels, [0.25] * channels)
    if name == "cim":
        method.generator.tokenizer.ready = True  # untrained: any map from images to words and back
        method.standardize.load_state_dict(Standardize([0.5] * channels, [0.25] * channels).state_dict())
    return method


def mask_in(noise: Any) -> Mask:
    """The mask of a step's noise, whatever else is in it."""
    return noise if isinstance(noise, Mask) else noise.drawn["mask"] if hasattr(noise, "drawn") else noise.mask


def photographs(count: int = 4, channels: int = 3, height: int = 16, width: int = 16) -> Tensor:
    """Smooth images, standardised: noise could not be restored."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, channels, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")


def test_every_method_has_a_case() -> None:
    assert set(PREDICTIONS) == set(METHODS)


@pytest.mark.quick
@each_method
def test_loss_and_terms_are_finite_scalars(name: str) -> None:
    objective = small(name)(photographs())
    assert objective.loss.shape == ()
    assert torch.isfinite(objective.loss)
    assert "baseline" in objective.terms
    for value in objective.terms.values():
        assert value.shape == ()
        assert torch.isfinite(value)
        assert not value.requires_grad


@pytest.mark.quick
@each_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_end_in_a_loss_that_is_not(name: str, value: float) -> None:
    """And in no error, since the loop leaves such a batch out by its gradient."""
    method, images = small(name), photographs()
    images[1] = value
    objective = method(images)
    objective.loss.backward()
    norms = [p.grad.norm() for p in method.encoder.parameters() if p.grad is not None]
    assert not torch.stack(norms).isfinite().all()


IN_PARTS: list[tuple[str, dict[str, Any]]] = [
    ("energy", {"steps": 3}),
    ("energy", {"steps": 2, "gradient": "difference"}),
    ("localmim", {"stop_gradient": True, "target": "pixels"}),
    ("localmim", {"stop_gradient": True, "target": "pixels", "pixel_head": True}),
]


@pytest.mark.quick
@pytest.mark.parametrize(("name", "settings"), IN_PARTS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_logs_the_loss_and_terms_of_the_whole(name: str, settings: dict[str, Any], accumulation: int) -> None:
    """A trainer that adds up parts must not add up terms; a mean over micro-batches must be one."""
    optimiser = {"batch_size": 4, "accumulation": accumulation}
    recipe = checked({"method": {"name": name, **settings}, "optimiser": optimiser})
    recipe.measured["precision"] = "32"
    method, images = small(name, **settings), photographs()
    assert method.num_losses > 1
    current = stepper_for(Fabric(accelerator="cpu"), recipe, method, Standardize([0.0] * 3, [1.0] * 3))
    noise, rows = current.noise(images, 0), 4 // accumulation
    wholes = [method(images[k : k + rows], noise.rows(slice(k, k + rows))) for k in range(0, 4, rows)]
    meter = Meter()
    meter.add(*current.step(Batch(images, [0, 1, 2, 3]), 0, 1.0))
    logged = meter.means(current.fabric)
    wanted = {"loss": sum(float(whole.loss.detach()) for whole in wholes) / accumulation}
    for key in wholes[0].terms:
        weights = [float(whole.weights.get(key, torch.ones(()))) for whole in wholes]
        wanted[key] = float(np.average([float(whole.terms[key]) for whole in wholes], weights=weights))
    assert logged.keys() == wanted.keys() | {"gradient_norm"}
    for key, value in wanted.items():
        assert logged[key] == pytest.approx(value, rel=1e-4, abs=1e-7), key
    parts = list(method.parts(images, noise))
    assert [bool(part.terms) for part in parts] == [False] * (method.num_losses - 1) + [True]


@pytest.mark.quick
@each_method
def test_gradient_reaches_every_trainable_weight(name: str) -> None:
    method = small(name)
    method(photographs()).loss.backward()
    expected = WITHOUT_GRADIENT.get(name, {})
    silent = {key for key, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert silent == set(expected)


@each_method
def test_overfits_one_batch(name: str) -> None:
    method, images = small(name), photographs(8)
    mask = method.sample(8, 16, 16, Draws.of(0, 8))
    method.calibrate(images, mask)
    optimiser = torch.optim.AdamW(method.parameters(), 3e-3, weight_decay=0.0)
    for _ in range(200):
        optimiser.zero_grad()
        objective = method(images, mask)
        objective.loss.backward()
        optimiser.step()
    objective = method(images, mask)
    assert objective.loss < 0.5 * objective.terms["baseline"]


@pytest.mark.quick
@each_method
def test_hidden_pixels_do_not_leak(name: str) -> None:
    method, images = small(name), photographs()
    mask = method.sample(4, 16, 16, Draws.of(0, 4))
    hidden = hidden_map(mask_in(mask), (4, 4), (4, 4)).expand_as(images)
    predict = PREDICTIONS[name]
    changed = images + 10 * hidden * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(predict(method, changed, mask), predict(method, images, mask))
    visible = images + (1 - hidden)
    assert not torch.allclose(predict(method, visible, mask), predict(method, images, mask))  # it does see something


@pytest.mark.quick
@each_method
def test_every_layer_norm_has_the_references_epsilon(name: str) -> None:
    norms = {key: module.eps for key, module in small(name).named_modules() if isinstance(module, nn.LayerNorm)}
    assert norms
    assert set(norms.values()) == {1e-6}, norms


@pytest.mark.quick
@each_method
def test_same_seed_same_loss(name: str) -> None:
    images = photographs()
    losses = []
    for _ in range(2):
        method = small(name)
        mask = method.sample(4, 16, 16, Draws.of(3, 4))
        losses.append(method(images, mask).loss)
    assert torch.equal(losses[0], losses[1])
    method = small(name)
    other = method.sample(4, 16, 16, Draws.of(4, 4))
    assert not torch.equal(method(images, other).loss, losses[0])


@pytest.mark.quick
@each_method
def test_encoder_loads_strictly_into_timm_with_equal_outputs(name: str, tmp_path: Path) -> None:
    arguments = create_arguments("vit_tiny_patch16_224", image_size=(16, 24), patch_size=4, **SMALL)
    method = METHODS[name](from_arguments(arguments))  # pyright: ignore[reportCallIssue]
    images = photographs(width=24)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_encoder(tmp_path, method.encoder, arguments, Standardize([0.5] * 3, [0.25] * 3))
    description = json.loads((tmp_path / "encoder.json").read_text())
    plain = timm.create_model(**description["create_model"])
    plain.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=True)
    plain.eval()
    method.eval()
    ours = load_encoder(tmp_path)(images)
    torch.testing.assert_close(plain(images), ours.pooled, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(method.encoder(images).pooled, ours.pooled, atol=1e-5, rtol=1e-4)
    assert standardize_for(tmp_path).mean.flatten().tolist() == [0.5] * 3


@pytest.mark.quick
@each_method
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_small_images_of_any_channels(name: str, channels: int) -> None:
    method = small(name, 32, 32, channels)
    assert torch.isfinite(method(photographs(2, channels, 32, 32)).loss)


@pytest.mark.quick
@each_method
def test_rectangular_images(name: str) -> None:
    method = small(name, 16, 32)
    images = photographs(2, 3, 16, 32)
    assert torch.isfinite(method(images).loss)
    frames = method.restore(images)
    (shape,) = {frame.shape for frame in frames.values()}
    assert shape[0] == 2
    assert shape[3] == 2 * shape[2]  # pictures may be enlarged
    if name == "cim":  # all of its pictures are the codec's
        return
    # visible pixels of the corrupted picture are the original's, hidden ones are not
    original, corrupted = list(frames.values())[:2]
    same = (corrupted == original).float().mean()
    assert 0 < same < 1


@pytest.mark.quick
@each_method
def test_scores_are_repeatable_and_one_an_image(name: str) -> None:
    method, images = small(name), photographs()
    scores = method.score(images)
    assert scores.shape == (4,)
    assert torch.equal(method.score(images), scores)
    torch.testing.assert_close(method.score(images[:1]), scores[:1])  # images of a batch do not influence each other


@pytest.mark.quick
@each_method
def test_held_out_errors_are_one_an_image_and_repeatable(name: str) -> None:
    method, images = small(name), photographs()
    found = [method.held_out(images, Draws.of(0, len(images))) for _ in range(2)]
    for task, (left, before) in found[0].items():
        assert left.shape == before.shape == (4,)
        assert (before > 0).all()
        assert torch.equal(left, found[1][task][0])


@pytest.mark.unhooked
@each_method
def test_compiles(name: str) -> None:
    method, images = small(name), photographs()
    mask = method.sample(4, 16, 16, Draws.of(0, 4))
    eager = method(images, mask).loss
    eager.backward()
    gradients = {key: p.grad.clone() for key, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    compiled = torch.compile(method, backend="aot_eager", fullgraph=True)
    loss = compiled(images, mask).loss
    loss.backward()
    torch.testing.assert_close(loss, eager, rtol=1e-4, atol=1e-6)
    for key, parameter in method.named_parameters():
        if key in gradients:
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-3, atol=1e-6)


@pytest.mark.unhooked  # the hook would refuse the argument before the method's own sentence
def test_encoders_that_cannot_serve_fail_with_a_sentence() -> None:
    class Nothing(Backbone):
        dim, channels, stride = 8, 3, 32

    for kind in (underpaint.MAE, underpaint.LocalMIM, underpaint.SimMIM):
        other: Any = Nothing()
        with pytest.raises(TypeError, match="that part of an image can be hidden from, not Nothing"):
            kind(other)
    encoder: Any = underpaint.encoder("resnet10t")
    encoder.model.bn1.track_running_stats = False
    with pytest.raises(ValueError, match="batch norms with running statistics"):
        underpaint.Energy(encoder)


MASKED = [name for name in sorted(METHODS) if issubclass(METHODS[name], MaskedMethod)]


@pytest.mark.quick
@pytest.mark.parametrize("kind", [*MASKS, "checkerboard"])
@pytest.mark.parametrize("name", MASKED)
def test_any_mask_of_larger_patches_hides_whole_ones_and_trains(name: str, kind: str) -> None:
    """Squares of two patches of a side, by every pattern there is and by one that no method knows."""

    def checkerboard(batch: int, grid: tuple[int, int], hidden: int, draws: Draws) -> Mask:
        rows, columns = torch.arange(grid[0]).view(-1, 1), torch.arange(grid[1])
        return hide_highest(((rows + columns) % 2).float().flatten().expand(batch, -1), hidden)

    method = small(name, 32, 32, mask=MASKS.get(kind, checkerboard), mask_patch_size=8)
    images = photographs(4, 3, 32, 32)
    noise = method.sample(4, 32, 32, Draws.of(0, 4))
    rows, columns = method.masking.grid(32, 32)
    hidden = torch.zeros(4, rows * columns).scatter(1, mask_in(noise).hidden, 1.0)
    squares = hidden.view(4, 4, rows // 4, 4, columns // 4)
    assert torch.equal(squares.amax((2, 4)), squares.amin((2, 4)))
    assert 0 < hidden.mean() < 1
    method(images, noise).loss.backward()
    assert method.encoder.model.patch_embed.proj.weight.grad.any()
