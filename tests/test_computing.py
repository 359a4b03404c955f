"""In which numbers a step computes: bfloat16 for a network's products, float32 for all else."""

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import pretrain
from conftest import write_pictures
from test_train import COMMAND, SMALL, TINY
from tiny import ENCODERS, SERVED, drawn, made, photographs, stepping
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import underpaint
from underpaint import computing, targets, tokenize
from underpaint.backbones import swin
from underpaint.cli import main
from underpaint.computing import autocast, channels_last, full, lay_out, products, repeatable
from underpaint.data import Batch, crop
from underpaint.data.crop import centre_boxes, crop_resize
from underpaint.errors import InputError
from underpaint.evaluation.detect import AnchorConfig, detector
from underpaint.evaluation.features import extract
from underpaint.evaluation.frozen import Headed, LinearHead
from underpaint.evaluation.settings import DetectConfig
from underpaint.masking import Masking
from underpaint.methods import METHODS
from underpaint.train import fit
from underpaint.train.fit import Fitting, fit_task
from underpaint.train.run_folder import Run, restore_state, training_state
from underpaint.train.schedules import Duration, Schedule
from underpaint.train.stepper import Stepper
from underpaint.trainable import Objective, Trainable

HALF = (torch.bfloat16, torch.float16)
each_method = pytest.mark.parametrize("name", sorted(METHODS))
each_served = pytest.mark.parametrize(("name", "kind"), SERVED)
# what gets images, draws or targets, by which names; and what must come out in float32
WATCHED = (
    "forward",
    "predict",
    "targets",
    "corrupt",
    "words",
    "spoken",
    "sample_tokens",
    "losses",
    "levels",
    "painting",
)
WATCHED += ("target", "energy", "enhance", "errors_at", "left", "nearest", "terms", "aligned_to")
GIVEN = {"images", "noise", "mask", "uniform", "golden", "target", "state", "restored", "slopes", "energy", "corrupted"}
FOUND = {
    "targets",
    "words",
    "spoken",
    "losses",
    "levels",
    "painting",
    "target",
    "energy",
    "left",
    "errors_at",
    "enhance",
}


def halves(values: Any) -> list[torch.dtype]:
    return [leaf.dtype for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.dtype in HALF]


class Watching(TorchDispatchMode):
    """Counts what comes out in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += len(halves(out))
        return out


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, method: Any) -> Iterator[set[str]]:
    """Whatever a method, its generator and the targets are given, or find, must be float32; the names that were called."""
    called: set[str] = set()

    def watch(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)
        signature = inspect.signature(real)

        @functools.wraps(real)
        def seen(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs).arguments
            for what, value in bound.items():
                # logits that the generator said are what they are
                if what in GIVEN and not hasattr(value, "logits"):
                    assert not halves(value), f"{owner}.{name} is given {what} in half precision"
            found = real(*args, **kwargs)
            if name in FOUND or not isinstance(owner, type):
                assert not halves(found), f"{owner}.{name} finds half precision"
            called.add(name)
            return found

        monkeypatch.setattr(owner, name, seen)

    with monkeypatch.context():
        for kind in {type(method), type(getattr(method, "generator", method))}:
            for name in WATCHED:
                if hasattr(kind, name):
                    watch(kind, name)
        watch(targets, "hog_pyramid")
        watch(targets, "window_moments")
        yield called


@each_served
def test_no_method_gets_images_or_draws_in_half_precision(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = photographs()
    method = made(name, kind)
    noise = drawn(method, images)
    method.calibrate(images, noise)
    plain = method(images, noise)
    with watched(monkeypatch, method) as called, Watching() as watching, autocast(images.device, "bf16"):
        found = method(images, noise)
    assert "forward" in called
    assert watching.count > 10  # it was computed in half precision
    assert not halves((found.loss, found.terms, dict(found.weights)))
    torch.testing.assert_close(found.loss, plain.loss, rtol=0.03, atol=0)
    if name != "cae":  # whose baseline holds how far its own features are apart
        # what is to be beaten comes from targets and draws alone, so that it is the same
        torch.testing.assert_close(found.terms["baseline"], plain.terms["baseline"], rtol=1e-6, atol=0)


@each_served
def test_a_step_in_bfloat16_is_about_that_in_float32(name: str, kind: str) -> None:
    """Each weight that is trained gets a gradient; all together they point where those of float32 point."""
    found = {}
    for precision in ("32", "bf16"):
        method, images = made(name, kind), photographs()
        noise = drawn(method, images)
        method.calibrate(images, noise)
        current = stepping(method, precision)
        numbers = current._backward(images, noise)
        assert not halves(numbers)
        gradients = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
        assert not halves(gradients)
        found[precision] = gradients
    assert {key for key, g in found["bf16"].items() if g is None} == {k for k, g in found["32"].items() if g is None}
    left, right = (
        torch.cat([g.flatten() for g in gradients.values() if g is not None]) for gradients in found.values()
    )
    # a second derivative through batch norms of statistics that have hardly begun is the roughest of all
    rough = (name, kind) == ("energy", "resnet")
    assert torch.nn.functional.cosine_similarity(left, right, dim=0) > (0.9 if rough else 0.98)
    assert right.norm() == pytest.approx(float(left.norm()), rel=0.1 if rough else 0.05)


def gradient(precision: str, **settings: Any) -> Tensor:
    """Of an energy's loss, of all weights together."""
    method, images = made("energy", step_size=0.3, **settings), photographs(8)
    noise = drawn(method, images)
    carry = None
    for part in range(method.num_losses):
        with autocast(images.device, precision):
            objective = method(images, noise, part, carry)
        carry = objective.carry
        objective.loss.backward()
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])


def apart(a: Tensor, b: Tensor) -> float:
    """Their distance, as a share of the length of the first."""
    return float((a - b).norm() / a.norm())


# the second derivative is as good as the numbers that it is computed in: bfloat16 has 2 to 3 digits
SECOND = 0.1


def test_the_second_derivative_in_bfloat16_is_that_of_float32_within_a_tenth() -> None:
    exact = gradient("32")
    assert 1e-4 < apart(exact, gradient("bf16")) < SECOND


def test_a_difference_of_energies_is_taken_in_float32_under_bfloat16_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made("energy", gradient="difference").exact
    assert not made("energy").exact
    plain = gradient("32", gradient="difference")
    assert apart(gradient("32"), plain) < SECOND
    assert apart(plain, gradient("bf16", gradient="difference")) < SECOND
    # and it could not be taken in bfloat16: nothing but noise is left of it
    monkeypatch.setattr(METHODS["energy"], "_near", lambda self, state, given: self.energy(*state, given=given))
    assert apart(plain, gradient("bf16", gradient="difference")) > 3 * SECOND


@each_method
def test_float16_trains(name: str) -> None:
    """With a scaler of its own, from its first steps on: the loss on one batch falls."""
    method, images = made(name), photographs(8)
    method.calibrate(images, drawn(method, images))
    current = stepping(method, "16", batch=8)
    assert current.scaler is not None
    batch, losses, scales = Batch(images, list(range(8))), [], []
    for _ in range(24):
        numbers, bad = current.step(batch, 0, 1.0)
        assert not bad
        losses.append(float(numbers["loss"][0]))
        scales.append(current.scaler.get_scale())
    assert losses[-1] < 0.97 * losses[0]
    assert scales[-1] == scales[len(scales) // 2] >= 1  # it settled
    assert all(torch.isfinite(p).all() for p in method.parameters())


def test_float16_from_the_command_line(plain: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["pretrain", str(plain), "--out", str(tmp_path / "run"), *COMMAND, "--method", "mae"]
    assert main([*command, "--steps", "6", "--precision", "16", "--set", "run.log_every=2"]) == 0
    run = Run(tmp_path / "run")
    assert run.recipe().measured["precision"] == "16"
    lines = run.lines("metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert lines[-1]["gradient_norm"] > 0
    found = run.load()
    assert found is not None
    assert found[1]["scaler"]["scale"] >= 1


@pytest.mark.slow
@pytest.mark.unhooked
@each_method
def test_what_is_compiled_computes_in_bfloat16_too(name: str) -> None:
    """In one piece, with what stays in float32 inside it."""
    method, images = made(name), photographs()
    noise = drawn(method, images)
    method.calibrate(images, noise)
    compiled = torch.compile(method, backend="aot_eager", fullgraph=True)
    with autocast(images.device, "bf16"):
        eager = method(images, noise)
        found = compiled(images, noise)
    found.loss.backward()
    torch.testing.assert_close(found.loss, eager.loss, rtol=0.01, atol=0)
    assert not halves((found.loss, found.terms))
    torch.testing.assert_close(found.terms["baseline"], eager.terms["baseline"], rtol=0.01, atol=0)


class Steep(Trainable):
    """Its loss is 0, and its gradient infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, images: Tensor, noise: None = None) -> Objective:
        return Objective(self.weight.sqrt().sum(), {})


def test_float16_says_so_where_no_scale_makes_a_gradient_finite() -> None:
    from lightning_fabric import Fabric

    task = Steep()
    current = Stepper(
        Fabric(accelerator="cpu", devices=1),
        task,
        torch.optim.AdamW(task.parameters(), fused=True),
        lambda batch: batch,
        1,
        precision="16",
    )
    bad = [bool(current.step(torch.zeros(1), step, 1.0)[1]) for step in range(20)]
    assert bad == [False] * 17 + [True] * 3  # from 2 ** 16 to below 1
    assert not task.weight.any()


# -- settings of the whole process ------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_crops_are_whole_numbers_whatever_is_set_and_leave_it_so(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = [], torch.bmm

    def bmm(*args: Tensor) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return real(*args)

    monkeypatch.setattr(crop.torch, "bmm", bmm)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        boxes = torch.from_numpy(centre_boxes([(8, 8)] * 2, (4, 4)))
        crop_resize(torch.full((2, 1, 8, 8), 65_535.0), boxes, torch.zeros(2, dtype=torch.bool), (4, 4))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"] * 2


@pytest.mark.quick
def test_products_are_put_back_after_an_error_too() -> None:
    state = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for exact, wanted in ((True, ("highest", False)), (False, ("high", True))):

        def fail(wanted: Any = wanted) -> None:
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == wanted
            raise KeyError

        with pytest.raises(KeyError), products(exact):
            fail()
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == state


def process_state() -> tuple[Any, ...]:
    memory: Any = torch.utils.deterministic
    return (
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        memory.fill_uninitialized_memory,
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
    )


REPEATABLE = (":4096:8", True, False, False, True, False)


@pytest.mark.quick
def test_what_makes_kernels_repeatable_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        assert process_state()[:6] == REPEATABLE
        raise KeyError

    for own in (None, ":16:8"):
        if own is not None:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", own)
        before = process_state()
        with repeatable(False):
            assert process_state() == before
        with pytest.raises(KeyError), repeatable(True):
            fail()
        assert process_state() == before


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures without labels: probes take the most of a short run."""
    return write_pictures(tmp_path_factory.mktemp("plain"), 48, classes=1)


def test_a_run_that_is_deterministic_leaves_the_process_as_it_was(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real, before = set(), Stepper.step, process_state()

    def step(self: Stepper, *args: Any) -> Any:
        seen.add(process_state()[:6])
        return real(self, *args)

    monkeypatch.setattr(Stepper, "step", step)
    command = ["pretrain", str(plain), *COMMAND, "--method", "mae", "--steps", "2", "--out"]
    assert main([*command, str(tmp_path / "one"), "--set", "run.deterministic=true"]) == 0
    assert seen == {REPEATABLE}
    assert process_state() == before
    assert main([*command, str(tmp_path / "other")]) == 0
    assert seen == {REPEATABLE, before[:6]}
    assert process_state() == before
    one, other = ((tmp_path / name / "encoder.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other  # a CPU's kernels repeat themselves anyway


def test_a_kernel_that_cannot_repeat_itself_is_named_in_a_line(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    real = METHODS["mae"].forward

    def forward(self: Any, images: Tensor, *rest: Any) -> Objective:
        if len(images) == 2:  # counted on a CPU
            return real(self, images, *rest)
        raise RuntimeError(
            "upsample_bicubic2d_backward_out_cuda does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation, ..."
        )

    monkeypatch.setattr(METHODS["mae"], "forward", forward)
    command = ["pretrain", str(pictures), *COMMAND, "--method", "mae", "--steps", "2", "--out", str(tmp_path / "run")]
    assert main([*command, "--set", "run.deterministic=true"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "run.deterministic: upsample_bicubic2d_backward_out_cuda has no deterministic kernel" in error


# -- how a network lies in memory ------------------------------------------------------------------------------------------

CUDA = torch.device("cuda")  # where it would be: only its name is asked for


@pytest.mark.quick
def test_channels_are_last_of_nets_of_convolutions_on_gpus() -> None:
    made_of = {kind: underpaint.encoder(**settings, image_size=32) for kind, settings in ENCODERS.items()}
    made_of["convnext"] = underpaint.encoder("convnext_tiny", dims=(16, 16, 32, 32), depths=(1, 1, 1, 1))
    assert {kind for kind, net in made_of.items() if channels_last(net, CUDA)} == {"resnet", "convnext"}
    assert not any(channels_last(net, torch.device("cpu")) for net in made_of.values())
    images = photographs()
    for kind, net in made_of.items():
        net.eval()
        before = net(images)
        lay_out(net, CUDA)
        torch.testing.assert_close(net(images).patches, before.patches, rtol=1e-4, atol=1e-5)
        strides = {p.stride()[1] for p in net.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1}
        assert (strides == {1}) == (kind in ("resnet", "convnext")), kind


@pytest.mark.parametrize("name", ["mae", "energy", "cim"])
def test_with_channels_last_a_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """A fused step goes through memory as it lies, and a checkpoint holds plain tensors."""

    def steps(first: int, last: int, before: Any = None) -> dict[str, Tensor]:
        method = made(name, "resnet")
        lay_out(method.encoder, CUDA)
        current, images = stepping(method), photographs()
        if before is not None:
            restore_state(method, current.optimiser, before)
        for step in range(first, last):
            current.step(Batch(images, [0, 1, 2, 3]), step, 1.0)
        assert any(p.ndim == 4 and p.stride()[1] == 1 and p.shape[1] > 1 for p in method.encoder.parameters())
        tensors = training_state(method, current.optimiser)
        return {key: value.detach().clone().contiguous() for key, value in tensors.items()}

    unbroken, halfway = steps(0, 4), steps(0, 2)
    found = steps(2, 4, halfway)
    assert found.keys() == unbroken.keys()
    assert all(torch.equal(found[key], unbroken[key]) for key in unbroken)


@pytest.mark.parametrize("window", [4, 8])
@pytest.mark.parametrize("name", [swin.Swin, swin.SwinV2])
def test_packed_windows_are_attended_to_in_four_dimensions(
    name: type[Any], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As attention of six dimensions has it, whose bias is that of each mask."""
    from test_swin import V1, V2, at_random
    from test_swin import swin as encoder_of

    encoder = encoder_of(window=window, name=V2 if name is swin.SwinV2 else V1).eval()
    at_random(encoder)
    pool = encoder.walk(Masking(0.6, unit=(8, 8)), masks=3)
    noise = swin.PooledMask(torch.tensor([2, 2, 0, 0, 1, 1]), 3)
    real, shapes = torch.nn.functional.scaled_dot_product_attention, set()

    def six(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, **rest: Any) -> Tensor:
        shapes.update(each.ndim for each in (q, k, v, attn_mask))
        apart = [each.unflatten(0, (3, 2, -1)) for each in (q, k, v, attn_mask)]
        assert torch.equal(apart[3][:, 0], apart[3][:, 1])  # images of a mask have one bias
        return real(*apart[:3], attn_mask=apart[3][:, :1], **rest).flatten(0, 2)

    images = torch.randn(6, 3, 64, 64)
    found = []
    for attention in (real, six):
        monkeypatch.setattr(swin.functional, "scaled_dot_product_attention", attention)
        encoder.zero_grad()
        state, tokens = None, None
        for number in range(len(pool.layers)):
            state, tokens = encoder.advance(pool, number, state, images, noise)
        assert tokens is not None
        tokens.square().mean().backward()
        found.append([tokens, *(p.grad for p in encoder.parameters() if p.grad is not None)])
    assert shapes == {4}
    for four, of_six in zip(*found, strict=True):
        torch.testing.assert_close(four, of_six, rtol=1e-4, atol=1e-6)


# -- evaluations -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the best precision is bfloat16."""
    monkeypatch.setattr(computing, "best_precision", lambda device: "bf16")


def test_features_are_kept_in_float32(halved: None) -> None:
    encoder = underpaint.encoder(**ENCODERS["vit"], image_size=32).eval()
    batches = [Batch(photographs(), [0, 1, 2, 3])]
    with torch.no_grad():
        plain = encoder(batches[0].images)
    with Watching() as watching:
        found = extract(encoder, batches)
        said = Headed(encoder, LinearHead(32, 3), False)(batches[0].images)
    assert watching.count > 10
    assert found.pooled.dtype == found.patches.dtype == said.dtype == torch.float32
    assert 1e-5 < apart(plain.pooled, found.pooled) < 0.03
    # the mean of the patches is taken in float32: bfloat16 has no such numbers
    assert not torch.equal(found.pooled, found.pooled.bfloat16().float())


def test_boxes_are_found_in_float32(halved: None) -> None:
    torch.manual_seed(0)
    encoder = underpaint.encoder(**ENCODERS["resnet"], image_size=32)
    sizes = AnchorConfig(((6.0, 8.0), (12.0, 16.0)), 100, 4)
    model: Any = detector(encoder, (32, 32), 2, True, sizes, DetectConfig(channels=16, regions=16)).train()
    given: list[torch.dtype] = []
    for part in (model.rpn, model.roi_heads):
        part.register_forward_pre_hook(
            lambda module, args: given.extend(x.dtype for x in tree_leaves(args) if isinstance(x, Tensor))
        )
    target = {
        "boxes": torch.tensor([[2.0, 3.0, 17.0, 19.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 32, 32, dtype=torch.uint8),
    }
    with Watching() as watching:
        losses = model(list(photographs(2)), [target, target])
    assert watching.count > 10
    assert not set(given) & set(HALF)
    assert not halves(losses)
    assert all(torch.isfinite(loss) for loss in losses.values())


class Line(Trainable):
    """Fits a line, and notes in what its products are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(2, 1), set[torch.dtype]()

    def forward(self, inputs: Tensor, noise: None = None) -> Objective:
        assert inputs.dtype == torch.float32
        said = self.linear(inputs)
        self.seen.add(said.dtype)
        return Objective(full(said).square().mean(), {})


@pytest.mark.parametrize(("asked", "kind"), [(None, torch.bfloat16), ("32", torch.float32), ("16", torch.float16)])
def test_what_is_trained_beside_has_the_best_precision_or_that_of_its_run(
    asked: str | None, kind: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "best_precision", lambda device: "bf16")
    task = Line()
    optimiser = torch.optim.AdamW(task.parameters(), 1e-3, fused=True)
    how = Fitting(Duration(2), Schedule(0.0), 0, 1.0, 4, {}, precision=asked)
    fit_task(task, optimiser, lambda first, seed: (torch.randn(4, 2) for _ in range(9)), tmp_path / "line", how)
    assert task.seen == {kind}


def test_a_tokenizer_of_a_run_is_trained_in_its_precision(pictures: Path, tmp_path: Path, monkeypatch: Any) -> None:
    found: list[str | None] = []

    def fitted(task: Any, optimiser: Any, batches: Any, folder: Path, how: Fitting) -> None:
        found.append(how.precision)
        raise InputError("that will do")

    monkeypatch.setattr(tokenize, "fit_task", fitted)
    settings = SMALL | {"method.codebook_size": 64, "run.precision": "bf16"}
    with pytest.raises(InputError, match="that will do"):
        pretrain(pictures, tmp_path / "run", method="cim", steps=2, settings=settings, **TINY)
    assert found == ["bf16"]


# -- on a GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@each_served
def test_a_step_on_a_gpu_is_about_that_on_a_cpu(name: str, kind: str) -> None:
    """In float32 and in bfloat16, with convolutions' channels last."""
    images, found = photographs(), []
    plain = made(name, kind)
    noise = drawn(plain, images)
    plain.calibrate(images, noise)
    wanted = plain(images, noise)
    for precision, tolerance in (("32", 0.01), ("bf16", 0.05)):
        method = made(name, kind)
        method.load_state_dict(plain.state_dict())
        current = stepping(method, precision)
        objective = None
        with autocast(current.fabric.device, precision):
            objective = method(images.cuda(), noise.to(current.fabric.device))
        assert not halves((objective.loss, objective.terms))
        found.append(objective.loss)
        torch.testing.assert_close(objective.loss.cpu(), wanted.loss, rtol=tolerance, atol=1e-3)


@pytest.mark.cuda
@each_method
def test_steps_on_a_gpu_repeat_themselves_where_they_are_told_to(name: str) -> None:
    def weights() -> list[Tensor]:
        method, images = made(name), photographs().cuda()
        current = stepping(method, "bf16")
        for step in range(3):
            current.step(Batch(images, [0, 1, 2, 3]), step, 1.0)
        return [p.detach().cpu() for p in method.parameters()]

    with repeatable(True):
        one, other = weights(), weights()
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.cuda
def test_crops_on_a_gpu_are_those_of_a_cpu() -> None:
    images = torch.randint(0, 65_536, (2, 3, 40, 50)).float()
    boxes, flips = torch.from_numpy(centre_boxes([(40, 50)] * 2, (16, 16))), torch.tensor([True, False])
    wanted = crop_resize(images, boxes, flips, (16, 16))
    torch.set_float32_matmul_precision("high")
    try:
        found = crop_resize(images.cuda(), boxes.cuda(), flips.cuda(), (16, 16))
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=0.05)
