"""What the energy method owes (section 9 of its specification): gradients, tasks, steps, order."""

from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from test_methods import photographs, small
from torch import Tensor

import underpaint
from underpaint.backbones import create_arguments, from_arguments
from underpaint.corruptions import Corruption, Downsample, downsample
from underpaint.data import Batch
from underpaint.draws import Draws
from underpaint.masking import each_tensor
from underpaint.methods.energy import CORRUPTIONS, Energy
from underpaint.patches import Standardize
from underpaint.prepare import stepper_for
from underpaint.recipes.recipe import checked
from underpaint.train.meter import Meter

TASKS = tuple(CORRUPTIONS)
each_task = pytest.mark.parametrize("task", [*TASKS, "mixture"])


def fixed(method: Any, images: Tensor, seed: int = 0) -> Any:
    return method.sample(len(images), *images.shape[-2:], Draws.of(seed, len(images)))


def watched(method: Any) -> dict[str, torch.nn.Parameter]:
    """A weight of every kind in every block, the patches' embedding, the head and the step sizes."""
    names = ("qkv.weight", "fc2.weight", "norm1.weight", "proj.weight", "fc1.bias", "head.weight", "step")
    return {k: p for k, p in method.named_parameters() if p.requires_grad and any(name in k for name in names)}


def numerical(method: Any, weight: Tensor, direction: Tensor, loss: Any, h: float = 1e-6) -> Tensor:
    """The slope of the loss along a direction of one weight."""
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * h * direction)
        losses.append(loss().detach())
        with torch.no_grad():
            weight.sub_(sign * h * direction)
    return (losses[0] - losses[1]) / (2 * h)


def exact_equals_finite_differences(method: Any, images: Tensor, loss: Any) -> None:
    loss().backward()
    generator = torch.Generator().manual_seed(5)
    found = watched(method)
    assert len(found) > 8
    for name, weight in found.items():
        assert weight.grad is not None, name
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        expected = numerical(method, weight, direction, loss)
        torch.testing.assert_close((weight.grad * direction).sum(), expected, rtol=1e-5, atol=1e-10, msg=name)


@pytest.mark.parametrize("readout", ["sum", "mean", "class", "square"])
@pytest.mark.parametrize("task", ["mask", "shuffle", "mixture"])
def test_gradient_equals_finite_differences(task: str, readout: str) -> None:
    """One step, in float64, for a weight of every block."""
    method = small("energy", corruption=task, readout=readout, step_size=0.5).double()
    images = photographs(3).double()
    noise = fixed(method, images)
    noise = each_tensor(noise, lambda value: value.double() if value.is_floating_point() else value)
    exact_equals_finite_differences(method, images, lambda: method(images, noise).loss)


@pytest.mark.parametrize("settings", [{"encoder": "swin"}, {"encoder": "resnet"}])
def test_gradient_equals_finite_differences_in_other_encoders(settings: dict[str, str]) -> None:
    method, images = other(settings["encoder"])
    method, images = method.double(), images.double()
    noise = fixed(method, images)
    names = [name for name, p in method.named_parameters() if p.requires_grad and p.dim() > 1]
    method(images, noise).loss.backward()
    parameters = dict(method.named_parameters())
    generator = torch.Generator().manual_seed(5)
    for name in names[:: max(1, len(names) // 12)]:
        weight = parameters[name]
        assert weight.grad is not None, name
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        expected = numerical(method, weight, direction, lambda: method(images, noise).loss)
        torch.testing.assert_close((weight.grad * direction).sum(), expected, rtol=1e-5, atol=1e-10, msg=name)


def other(name: str, task: str = "mask") -> tuple[Energy, Tensor]:
    torch.manual_seed(0)
    if name == "swin":
        encoder = underpaint.encoder(
            "swin_tiny_patch4_window7_224",
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 2),
            window_size=4,
            drop_path_rate=0.0,
        )
    else:
        # timm starts the last norm of a block at 0, behind which no gradient reaches anything yet; a max pool makes
        # dE/dx jump, where finite differences mean nothing
        settings: dict[str, Any] = {"zero_init_last": False, "replace_stem_pool": True}
        encoder = underpaint.encoder("resnet18", norm_layer="groupnorm", act_layer="silu", **settings)
    return Energy(encoder, corruption=task, step_size=0.5, mask_patch_size=8), photographs(2, height=32, width=32)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["swin", "resnet"])
@each_task
def test_other_encoders_take_every_task(name: str, task: str) -> None:
    method, images = other(name, task)
    objective = method(images)
    objective.loss.backward()
    silent = [key for key, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not silent
    frames = method.restore(images)
    assert all(frame.shape == images.shape for frame in frames.values())


@each_task
def test_each_task_is_restored_better_than_by_doing_nothing(task: str) -> None:
    method, images = small("energy", corruption=task), photographs(10)
    noise = fixed(method, images)
    if task == "mixture":
        noise = noise._replace(task=torch.arange(10) % len(TASKS))
    method.calibrate(images, noise)
    optimiser = torch.optim.AdamW(method.parameters(), 3e-3, weight_decay=0.0)
    for _ in range(300):
        optimiser.zero_grad()
        method(images, noise).loss.backward()
        optimiser.step()
    states = method.restored(images, noise)
    left, before = (method.left(state, images, noise) for state in (states[-1], states[0]))
    assert left.sum() < 0.7 * before.sum()
    terms = method(images, noise).terms
    names = {"error"} if task != "mixture" else {f"error_{name}" for name in TASKS}
    assert names <= set(terms)
    assert all(terms[name] < 1 for name in names)


@pytest.mark.quick
def test_a_task_that_a_micro_batch_lacks_is_not_logged_as_restored() -> None:
    """Four parts of one image each in two steps: what is logged of a task is its error over all images that have it."""
    optimiser = {"batch_size": 4, "accumulation": 4}
    recipe = checked({"method": {"name": "energy", "corruption": "mixture"}, "optimiser": optimiser})
    recipe.measured["precision"] = "32"
    method, images = small("energy", corruption="mixture"), photographs(4)
    current = stepper_for(Fabric(accelerator="cpu"), recipe, method, Standardize([0.0] * 3, [1.0] * 3))
    meter = Meter()
    left: dict[str, list[float]] = {name: [] for name in TASKS}
    before: dict[str, list[float]] = {name: [] for name in TASKS}
    for step in range(2):
        noise = current.noise(images, step)
        states = method.restored(images, noise)
        errors = [method.left(state, images, noise) for state in (states[-1], states[0])]
        for task, restored, corrupted in zip(noise.task.tolist(), *(each.tolist() for each in errors), strict=True):
            left[TASKS[task]].append(restored)
            before[TASKS[task]].append(corrupted)
        meter.add(*current.step(Batch(images, [0, 1, 2, 3]), step, 1.0))
    logged = meter.means(current.fabric)
    seen = [name for name in TASKS if left[name]]
    assert 1 < len(seen) < len(TASKS)
    for name in seen:
        assert logged[f"error_{name}"] == pytest.approx(np.sum(left[name]) / np.sum(before[name]), rel=1e-4), name
    for name in set(TASKS) - set(seen):
        assert np.isnan(logged[f"error_{name}"]), name  # null in metrics.jsonl


def test_a_known_order_is_recovered() -> None:
    method, images = small("energy", corruption="shuffle"), photographs(8)
    noise = fixed(method, images)
    method.calibrate(images, noise)
    before = method.placed(images, method.restored(images, noise)[-1]).mean()
    optimiser = torch.optim.AdamW(method.parameters(), 3e-3, weight_decay=0.0)
    for _ in range(300):
        optimiser.zero_grad()
        method(images, noise).loss.backward()
        optimiser.step()
    after = method.placed(images, method.restored(images, noise)[-1]).mean()
    assert before < 0.3
    assert after > 0.9


@pytest.mark.quick
def test_an_untrained_network_places_patches_by_chance() -> None:
    method, images = small("energy", corruption="shuffle"), photographs(64)
    shares = []
    for seed in range(20):
        noise = fixed(method, images, seed)
        shares.append(method.placed(images, method.restored(images, noise)[-1]).mean())
    found = torch.stack(shares)
    # 64 x 20 x 16 patches at 1/16; the matches of one permutation have variance 1
    assert found.mean() == pytest.approx(1 / 16, abs=4 / 16 / (64 * 20) ** 0.5)


@pytest.mark.quick
def test_the_order_of_tokens_changes_nothing() -> None:
    method, images = small("energy", corruption="shuffle"), photographs(2)
    state = method.corrupt(images, fixed(method, images))
    encoder: Any = method.encoder
    tokens = encoder.embed(images)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(7))

    def restored(these: Tensor, positions: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            energy = lambda z: method.head(encoder.encode(these, positions=z).tokens).sum()  # noqa: E731
            return positions - torch.func.grad(energy)(positions)

    straight = restored(tokens, state[1])
    permuted = restored(tokens[:, order], state[1][:, order])
    torch.testing.assert_close(permuted, straight[:, order], atol=1e-5, rtol=1e-4)


@pytest.mark.quick
def test_where_a_patch_lies_is_not_told() -> None:
    """Sorting sees content and the wrong position: with both permuted together the answer is permuted with them."""
    method, images = small("energy", corruption="shuffle"), photographs(2)
    noise = fixed(method, images)
    state = method.corrupt(images, noise)
    assert torch.equal(state[0], images)
    assert torch.equal(method.nearest(state[1]), noise.drawn["shuffle"])
    assert not method.encoder.model.pos_embed.requires_grad


@pytest.mark.quick
@pytest.mark.parametrize("gradient", ["exact", "difference"])
@pytest.mark.parametrize("task", ["mask", "mixture"])
def test_parts_add_up_to_the_whole(task: str, gradient: str) -> None:
    images = photographs(4)
    found = []
    for by_parts in (False, True):
        method = small("energy", corruption=task, steps=3, step_size=0.3, gradient=gradient)
        noise = fixed(method, images)
        if by_parts:
            loss = 0.0
            for part in method.parts(images, noise):
                part.loss.backward()
                loss += float(part.loss.detach())
        else:
            whole = method(images, noise).loss
            whole.backward()
            loss = float(whole.detach())
        found.append((loss, {k: p.grad for k, p in method.named_parameters() if p.grad is not None}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient_ in found[0][1].items():
        scale = float(gradient_.abs().max())
        torch.testing.assert_close(found[1][1][name], gradient_, rtol=1e-3, atol=1e-3 * scale, msg=name)


@pytest.mark.quick
def test_no_gradient_flows_between_steps() -> None:
    method, images = small("energy", steps=2, step_size=0.3), photographs(2)
    noise = fixed(method, images)
    first, second = list(method.parts(images, noise))
    reached, target = first.carry
    assert not reached[0].requires_grad
    # the second step's loss knows the first only by its result
    alone = method(images, noise, 1, ((reached[0].clone(),), target))
    assert torch.equal(alone.loss, second.loss)


@pytest.mark.parametrize("task", ["mask", "mixture"])
def test_the_finite_difference_points_where_the_exact_gradient_does(task: str) -> None:
    images = photographs(8)
    found = []
    for gradient in ("exact", "difference"):
        method = small("energy", corruption=task, steps=2, step_size=0.3, gradient=gradient)
        for part in method.parts(images, fixed(method, images)):
            part.loss.backward()
        encoder = [p.grad.flatten() for k, p in method.named_parameters() if p.grad is not None and "step" not in k]
        found.append((torch.cat(encoder), method.log_step_sizes[0].grad))
    cosine = torch.nn.functional.cosine_similarity(found[0][0], found[1][0], dim=0)
    assert cosine > 0.999
    torch.testing.assert_close(found[0][0].norm(), found[1][0].norm(), rtol=0.03, atol=0.0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-7)


@pytest.mark.quick
def test_images_do_not_influence_each_other() -> None:
    method = small("energy")
    images = photographs(2).requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(method.energy(images)[0], images)
    assert gradient[0].any()
    assert not gradient[1].any()


@pytest.mark.quick
def test_constants_of_the_energy_are_absent() -> None:
    method = small("energy")
    assert method.head.bias is None
    assert not method.encoder.model.norm.bias.requires_grad


def test_with_the_step_size_frozen_the_network_still_learns() -> None:
    method, images = small("energy", step_size=0.3), photographs(8)
    method.log_step_sizes[0].requires_grad_(False)
    noise = fixed(method, images)
    first = method(images, noise).loss.detach()
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 3e-3, weight_decay=0.0)
    for _ in range(60):
        optimiser.zero_grad()
        method(images, noise).loss.backward()
        optimiser.step()
    assert method(images, noise).loss < 0.7 * first


def test_the_slope_points_from_corrupted_towards_clean() -> None:
    """Which is all that training asks for: whether the energy itself is lower at clean images depends on the masks
    (docs/methods/energy.md)."""
    method, images = small("energy"), photographs(8)
    noise = fixed(method, images)
    corrupted = method.corrupt(images, noise)
    method.calibrate(images, noise)

    def slope() -> Tensor:
        with torch.no_grad():
            slope = method.slopes(corrupted)[0][0]
        return (slope * (images - corrupted[0])).sum((1, 2, 3))

    assert (slope() > 0).any()  # untrained it knows nothing
    optimiser = torch.optim.AdamW(method.parameters(), 3e-3, weight_decay=0.0)
    for _ in range(150):
        optimiser.zero_grad()
        method(images, noise).loss.backward()
        optimiser.step()
    assert (slope() < 0).all()


@pytest.mark.quick
def test_calibration_sets_each_change_to_a_tenth() -> None:
    method, images = small("energy", corruption="mixture"), photographs(8)
    noise = fixed(method, images)
    found = method.calibrate(images, noise)
    before = method.corrupt(images, noise)
    after = method.step(before, noise)
    for old, new in zip(before, after, strict=True):
        assert float((new - old).square().mean().sqrt().detach()) == pytest.approx(0.1, abs=1e-4)
    again = small("energy", corruption="mixture", **found)
    assert again.calibrate(images, noise) == {}  # given: measured no more
    assert [float(size.detach()) for size in again.step_sizes()] == pytest.approx(found["step_size"], rel=1e-5)


@pytest.mark.quick
def test_corruptions_may_be_passed_in() -> None:
    """By names of one's own: other factors than the usual ones, and a corruption that no one knows."""

    class Darken(Corruption):
        def apply(self, images: Tensor, noise: Any) -> Tensor:
            return images - 1

    images = photographs(4)
    method = small("energy", corruption={"small": Downsample((4,)), "dark": Darken()})
    noise = method.sample(4, 16, 16, Draws.of(0, 4))._replace(task=torch.tensor([0, 1, 0, 1]))
    [corrupted] = method.corrupt(images, noise)
    torch.testing.assert_close(corrupted[1::2], images[1::2] - 1)
    assert torch.equal(corrupted[::2], downsample(images, 4)[::2])
    assert {"error_small", "error_dark"} <= set(method(images).terms)
    assert torch.equal(method.restore(images, task="dark")["corrupted"], images - 1)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "at least 1"),
        ({"readout": "class"}, "class token"),
        ({"corruption": "gray", "channels": 1}, "more than one channel"),
        ({"corruption": "sepia"}, "one of mask, shuffle"),
    ],
)
def test_what_cannot_be_is_said(settings: dict[str, Any], said: str) -> None:
    channels = settings.pop("channels", 3)
    arguments = create_arguments(
        "vit_tiny_patch16_224",
        image_size=(16, 16),
        patch_size=4,
        in_chans=channels,
        embed_dim=32,
        depth=1,
        num_heads=2,
        **({"class_token": False, "global_pool": "avg"} if settings.get("readout") else {}),
    )
    with pytest.raises(ValueError, match=said):
        Energy(from_arguments(arguments), **settings)


@pytest.mark.unhooked
@pytest.mark.parametrize(("task", "gradient"), [("mixture", "exact"), ("mask", "difference"), ("shuffle", "exact")])
def test_other_paths_compile(task: str, gradient: str) -> None:
    method, images = small("energy", corruption=task, step_size=0.3, gradient=gradient), photographs()
    noise = fixed(method, images)
    eager = method(images, noise).loss
    compiled = torch.compile(method, backend="aot_eager", fullgraph=True)
    loss = compiled(images, noise).loss
    loss.backward()
    torch.testing.assert_close(loss, eager, rtol=1e-4, atol=1e-5)


# -- batch norm --------------------------------------------------------------------------------------------------------


def with_batch_norms(**settings: Any) -> Energy:
    torch.manual_seed(0)
    # smooth, and the last norm of a block is not 0, so that every weight has a gradient
    encoder = underpaint.encoder(
        "resnet18",
        layers=[1, 1, 1, 1],
        channels=[8, 8, 16, 16],
        act_layer="silu",
        output_stride=8,
        zero_init_last=False,
        replace_stem_pool=True,
    )
    return Energy(encoder, mask_patch_size=8, step_size=0.5, **settings).train()


@pytest.mark.parametrize("gradient", ["exact", "difference"])
def test_images_of_a_batch_do_not_influence_each_other_through_batch_norms(gradient: str) -> None:
    """The restoration of one has no slope towards another's pixels, and is the same alone as in the batch."""
    method, images = with_batch_norms(gradient=gradient).double(), photographs(4).double()
    noise = fixed(method, images)
    method.take_up(images)
    assert method.training
    state = method.corrupt(images, noise)
    leaf = state[0].clone().requires_grad_()
    moved = method.step((leaf,), noise)[0]
    moved[1].square().sum().backward()
    assert leaf.grad is not None
    touched = leaf.grad.flatten(1).abs().amax(1)
    assert touched[1] > 0
    assert not touched[[0, 2, 3]].any()
    others = leaf.detach().clone()
    others[[0, 2, 3]] = torch.randn_like(others[[0, 2, 3]])
    torch.testing.assert_close(method.step((others,), noise)[0][1], moved[1], rtol=0, atol=0)
    torch.testing.assert_close(method.step((leaf[1:2].detach(),), noise)[0], moved[1:2], rtol=1e-12, atol=1e-12)


def test_batch_norms_take_up_the_statistics_of_the_clean_images_of_each_step() -> None:
    method, images = with_batch_norms(), photographs(8)
    norm: Any = method.norms[0]
    seen = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    method.take_up(images)
    clean = seen[0].mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, clean)  # the first ones as a whole
    torch.testing.assert_close(norm.running_var, seen[0].transpose(0, 1).flatten(1).var(1))
    brighter = images + 1
    method(brighter)  # its own clean images, a tenth of the way, though it restores corrupted ones
    torch.testing.assert_close(norm.running_mean, 0.9 * clean + 0.1 * seen[1].mean((0, 2, 3)))
    held = {key: value.clone() for key, value in method.state_dict().items()}
    method.eval()(brighter)
    method.score(images)
    method.train()
    assert all(torch.equal(value, held[key]) for key, value in method.state_dict().items())
    assert all(each.momentum == 0.1 and not each.training for each in method.norms)
    method.take_up(images * float("nan"))
    assert all(value.isfinite().all() for value in method.state_dict().values())


def test_a_step_takes_up_statistics_once_whatever_its_parts() -> None:
    whole, parted = with_batch_norms(steps=2), with_batch_norms(steps=2)
    images = photographs(4)
    noise = fixed(whole, images)
    loss = whole(images, noise).loss
    losses = [objective.loss for objective in parted.parts(images, noise)]
    torch.testing.assert_close(sum(losses), loss)
    one, other = whole.state_dict(), parted.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert int(whole.norms[0].num_batches_tracked) == 1  # pyright: ignore[reportArgumentType]


def test_gradient_equals_finite_differences_behind_batch_norms() -> None:
    method, images = with_batch_norms().double(), photographs(3).double()
    noise = fixed(method, images)
    method.take_up(images)
    method.eval()  # the same statistics for every loss
    names = [name for name, p in method.named_parameters() if p.requires_grad and name.endswith("weight")]
    method(images, noise).loss.backward()
    parameters = dict(method.named_parameters())
    generator = torch.Generator().manual_seed(5)
    for name in names[::3]:
        weight = parameters[name]
        assert weight.grad is not None, name
        assert weight.grad.any(), name
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        expected = numerical(method, weight, direction, lambda: method(images, noise).loss)
        torch.testing.assert_close((weight.grad * direction).sum(), expected, rtol=1e-5, atol=1e-10, msg=name)


@each_task
def test_an_encoder_with_batch_norms_takes_every_task(task: str) -> None:
    method, images = with_batch_norms(corruption=task), photographs(4)
    noise = fixed(method, images)
    method.calibrate(images, noise)
    optimiser = torch.optim.AdamW(method.parameters(), 3e-3, weight_decay=0.0)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = method(images, noise).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.unhooked
def test_batch_norms_and_compiled_regions_go_together() -> None:
    method, images = with_batch_norms(), photographs(4)
    twin = with_batch_norms()
    noise = fixed(method, images)
    compiled = torch.compile(method, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(images, noise).loss, twin(images, noise).loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method.norms[0].running_mean, twin.norms[0].running_mean)


def test_hard_activations_are_differentiated_twice() -> None:
    """MobileNetV3's: torch's have no second derivative. Their values stay."""
    torch.manual_seed(0)
    encoder = underpaint.encoder("mobilenetv3_small_100", image_size=32)
    images = torch.randn(2, 3, 32, 32)
    before = encoder.eval()(images).pooled
    method = underpaint.Energy(encoder, mask_patch_size=8)
    assert torch.allclose(before, encoder.eval()(images).pooled, atol=1e-6)
    method.train()(images).loss.backward()
    gates = [p.grad for name, p in encoder.named_parameters() if ".se." in name and p.grad is not None]
    assert any(bool(grad.abs().sum() > 0) for grad in gates)
