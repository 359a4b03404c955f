"""The promises that every method keeps, over METHODS. One that is not kept is named here with its reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

import underpaint
from underpaint.backbones import create_arguments, from_arguments, load_encoder, save_encoder, standardize_for
from underpaint.corruptions import mask_cells
from underpaint.masking import Mask, hidden_map
from underpaint.methods import METHODS
from underpaint.patches import Standardize

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
# weights that no gradient reaches, with the reason
WITHOUT_GRADIENT: dict[str, dict[str, str]] = {}
# what a method predicts of hidden pixels, from the clean images and the mask
PREDICTIONS: dict[str, Callable[[Any, Tensor, Mask], Tensor]] = {
    "mae": lambda method, images, mask: method.predict(images, mask),
    "energy": lambda method, images, mask: method.step(mask_cells(images, mask, method.cell)),
}
each_method = pytest.mark.parametrize("name", sorted(METHODS))


def small(name: str, height: int = 16, width: int = 16, channels: int = 3, **settings: Any) -> Any:
    torch.manual_seed(0)
    arguments = create_arguments(
        "vit_tiny_patch16_224", image_size=(height, width), patch_size=4, channels=channels, **SMALL
    )
    return METHODS[name](from_arguments(arguments), **settings)  # pyright: ignore[reportCallIssue]


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
def test_gradient_reaches_every_trainable_weight(name: str) -> None:
    method = small(name)
    method(photographs()).loss.backward()
    expected = WITHOUT_GRADIENT.get(name, {})
    silent = {key for key, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert silent == set(expected)


@each_method
def test_overfits_one_batch(name: str) -> None:
    method, images = small(name), photographs(8)
    mask = method.draw(8, 16, 16, torch.Generator().manual_seed(0))
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
    mask = method.draw(4, 16, 16, torch.Generator().manual_seed(0))
    hidden = hidden_map(mask, (4, 4), (4, 4)).expand_as(images)
    predict = PREDICTIONS[name]
    changed = images + 10 * hidden * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(predict(method, changed, mask), predict(method, images, mask))
    visible = images + (1 - hidden)
    assert not torch.allclose(predict(method, visible, mask), predict(method, images, mask))  # it does see something


@pytest.mark.quick
@each_method
def test_same_seed_same_loss(name: str) -> None:
    images = photographs()
    losses = []
    for _ in range(2):
        method = small(name)
        mask = method.draw(4, 16, 16, torch.Generator().manual_seed(3))
        losses.append(method(images, mask).loss)
    assert torch.equal(losses[0], losses[1])
    method = small(name)
    other = method.draw(4, 16, 16, torch.Generator().manual_seed(4))
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
    assert all(frame.shape == images.shape for frame in frames.values())
    # visible pixels of the corrupted picture are the original's, hidden ones are not
    same = (frames["hidden"] == frames["original"]).float().mean()
    assert 0 < same < 1


@pytest.mark.quick
@each_method
def test_scores_are_repeatable_and_one_an_image(name: str) -> None:
    method, images = small(name), photographs()
    scores = method.score(images)
    assert scores.shape == (4,)
    assert torch.equal(method.score(images), scores)
    torch.testing.assert_close(method.score(images[:1]), scores[:1])  # images of a batch do not influence each other


@pytest.mark.unhooked
@each_method
def test_compiles(name: str) -> None:
    method, images = small(name), photographs()
    mask = method.draw(4, 16, 16, torch.Generator().manual_seed(0))
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
    with pytest.raises(TypeError, match="runs on part of its patches"):
        underpaint.MAE(underpaint.encoder("resnet18"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="without batch norm"):
        underpaint.Energy(underpaint.encoder("resnet18"))


def test_energy_on_a_convolutional_net() -> None:
    torch.manual_seed(0)
    encoder = underpaint.encoder("resnet18", norm_layer="groupnorm", act_layer="silu")
    method = underpaint.Energy(encoder, cell=16)
    method(torch.randn(2, 3, 64, 64)).loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_energy_gradient_equals_finite_differences() -> None:
    """The double backward, in float64: d loss / d weight for a weight of every block and the head."""
    method = small("energy", step_size=0.5).double()
    images = photographs(2).double()
    mask = method.draw(2, 16, 16, torch.Generator().manual_seed(0))
    method(images, mask).loss.backward()
    model: Any = method.encoder.model
    watched = [block.attn.qkv.weight for block in model.blocks] + [block.mlp.fc2.weight for block in model.blocks]
    watched += [model.patch_embed.proj.weight, model.pos_embed, method.head.weight, method.log_step_size]
    generator = torch.Generator().manual_seed(5)
    for weight in watched:
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        exact = (weight.grad * direction).sum()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(sign * 1e-6 * direction)
            losses.append(method(images, mask).loss.detach())
            with torch.no_grad():
                weight.sub_(sign * 1e-6 * direction)
        torch.testing.assert_close((losses[0] - losses[1]) / 2e-6, exact, rtol=1e-5, atol=1e-10)


def test_energy_images_do_not_influence_each_other() -> None:
    method = small("energy")
    images = photographs(2).requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(method.energy(images)[0], images)
    assert gradient[0].any()
    assert not gradient[1].any()


def test_energy_falls_from_corrupted_towards_clean() -> None:
    """Training asks for the slope at the corrupted image, so the slope is what can be promised."""
    method, images = small("energy"), photographs(8)
    mask = method.draw(8, 16, 16, torch.Generator().manual_seed(0))
    corrupted = mask_cells(images, mask, (4, 4))
    method.calibrate(images, mask)

    def slope() -> Tensor:
        return (method.gradient(corrupted) * (images - corrupted)).sum((1, 2, 3)).detach()

    assert (slope() > 0).any()  # untrained it knows nothing
    optimiser = torch.optim.AdamW(method.parameters(), 3e-3, weight_decay=0.0)
    for _ in range(150):
        optimiser.zero_grad()
        method(images, mask).loss.backward()
        optimiser.step()
    assert (slope() < 0).all()


def test_energy_calibration_sets_the_change_to_a_tenth() -> None:
    method, images = small("energy"), photographs(8)
    mask = method.draw(8, 16, 16, torch.Generator().manual_seed(0))
    found = method.calibrate(images, mask)
    corrupted = mask_cells(images, mask, (4, 4))
    change = (method.step(corrupted) - corrupted).square().mean().sqrt()
    assert abs(float(change.detach()) - 0.1) < 1e-4
    again = small("energy", step_size=found["step_size"])
    assert again.calibrate(images, mask) == {}  # given: measured no more
    assert abs(float(again.log_step_size.detach().exp()) - found["step_size"]) < 1e-5 * found["step_size"]
