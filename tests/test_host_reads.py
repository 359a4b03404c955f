"""Nothing in a step makes the host wait for the device: no number is read, no shape depends on one, nothing is copied there
from the host's own memory."""

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import pretrain
from test_train import SMALL, TINY
from tiny import SERVED, drawn, made, photographs, stepping
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import underpaint
from underpaint.data import Batch
from underpaint.train import devices, loop
from underpaint.train.devices import Flag
from underpaint.train.meter import Meter

each_served = pytest.mark.parametrize(("name", "kind"), SERVED)
aten: Any = torch.ops.aten
# a number read; shapes that depend on numbers; a tensor made of the host's
WAITS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.lift_fresh,
    aten.lift_fresh_copy,
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Waited(Exception):
    """A GPU would have been waited for."""


class NoCopying(TorchFunctionMode):
    """Refuses what a CPU's tensors are read by without an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            raise Waited(str(func))
        return func(*args, **(kwargs or {}))


class NoWaiting(TorchDispatchMode):
    """Refuses whatever else would make the host wait for a GPU, on any device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet in WAITS:
            raise Waited(str(func))
        if packet in INDEXED and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise Waited(f"{func} by truths")
        if func is aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None:
            raise Waited(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.quick
@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long)),
    ],
)
def test_what_would_wait_is_refused(read: Any) -> None:
    x = torch.randn(3)
    with pytest.raises(Waited), NoCopying(), NoWaiting():
        read(x)


@each_served
def test_no_step_waits_for_the_device(name: str, kind: str) -> None:
    """Forward, backward, clipping, the optimiser and what is noted, of every part of the loss."""
    method, images = made(name, kind), photographs()
    noise = drawn(method, images)
    method.calibrate(images, noise)
    current, meter = stepping(method), Meter()
    current.step(Batch(images, [0, 1, 2, 3]), 0, 1.0)  # an optimiser makes its state in its first step
    with NoCopying(), NoWaiting():
        numbers = current._backward(images, noise)
        bad = current._take(current._clip(), numbers["loss"][0])
        meter.add(numbers | {"gradient_norm": numbers["loss"]}, bad)
        method.after_step(0.5, 1 - bad)
    assert not bad


@pytest.mark.cuda
@each_served
@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
def test_no_step_waits_for_a_gpu(name: str, kind: str, precision: str) -> None:
    method, images = made(name, kind), photographs().cuda()
    current, meter = stepping(method, precision), Meter()
    batch, flags = Batch(images, [0, 1, 2, 3]), []
    for step in range(2):
        current.step(batch, step, 1.0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2, 5):
            numbers, bad = current.step(batch, step, 1.0)
            meter.add(numbers, bad)
            flags.append(Flag(bad))
        assert not any(bool(flag) for flag in flags)  # which waits for its copy alone
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- flags -----------------------------------------------------------------------------------------------------------------


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.device("cuda")

    def item(self) -> Any:
        raise Waited("item")


@pytest.mark.quick
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_flag_is_copied_at_once_and_waits_for_its_copy_alone(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        def record(self) -> None:
            happened.append("recorded")

        def synchronize(self) -> None:
            happened.append("waited")

    class Pinned(torch.Tensor):
        def copy_(self, source: Any, non_blocking: bool = False) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            assert non_blocking
            happened.append("copied")
            return torch.Tensor.copy_(self.as_subclass(torch.Tensor), source.as_subclass(torch.Tensor))

    def empty_like(like: Tensor, *, device: str, pin_memory: bool) -> Tensor:
        assert (device, pin_memory) == ("cpu", True)
        return torch.empty(()).as_subclass(Pinned)

    monkeypatch.setattr(devices.torch, "empty_like", empty_like)
    monkeypatch.setattr(devices.torch.cuda, "Event", Event)
    flag = Flag(torch.tensor(value).as_subclass(OnGpu))
    assert happened == ["copied", "recorded"]
    assert bool(flag) == bool(value)
    assert happened == ["copied", "recorded", "waited"]


@pytest.mark.quick
def test_a_flag_on_a_cpu_is_itself() -> None:
    assert not Flag(torch.tensor(0.0))
    assert Flag(torch.tensor(1.0))


def test_a_flag_is_read_one_step_late(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Always, so that all processes know of a step at the same one; at a line of metrics, and at the end, at once."""
    happened: list[str] = []

    class Noted(Flag):
        made = itertools.count(1)

        def __init__(self, value: Tensor):
            super().__init__(value)
            self.number = next(self.made)
            happened.append(f"step {self.number}")

        def __bool__(self) -> bool:
            happened.append(f"read {self.number}")
            return super().__bool__()

    monkeypatch.setattr(loop, "Flag", Noted)
    settings = SMALL | {"run.log_every": 4}
    pretrain(pictures, tmp_path / "run", method="mae", steps=6, settings=settings, probe_every=6, **TINY)
    assert happened == [
        *("step 1", "step 2", "read 1", "step 3", "read 2", "step 4", "read 3", "read 4"),
        *("step 5", "step 6", "read 5", "read 6"),
    ]


# -- what the source says --------------------------------------------------------------------------------------------------

ROOM = Path(underpaint.__file__).parent
IN_STEPS = [
    *sorted((ROOM / "methods").rglob("*.py")),
    *(ROOM / "backbones" / f"{name}.py" for name in ("protocols", "plain", "vit", "beit", "cait", "eva", "naflex")),
    *(ROOM / "backbones" / f"{name}.py" for name in ("swin", "maps", "visible", "hiera", "norms")),
    *(ROOM / "train" / f"{name}.py" for name in ("stepper", "meter", "optim")),
    *(ROOM / f"{name}.py" for name in ("blocks", "patches", "masking", "corruptions", "targets", "computing")),
    *(ROOM / f"{name}.py" for name in ("trainable", "tokenizers")),
    ROOM / "data" / "crop.py",
]
READS = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "new_tensor", "is_nonzero"}
MADE = {"tensor", "as_tensor", "from_numpy"}  # torch's, of the host's memory
BEFORE = "made or measured before the first step"
ALLOWED = {
    "backbones/swin.py:MaskPool.__init__": BEFORE,
    "backbones/swin.py:MaskPool.sample": "masks are drawn on the CPU",
    "backbones/swin.py:Windows.__init__": BEFORE,
    "backbones/visible.py:_alike": BEFORE,
    "backbones/visible.py:soundly": BEFORE,
    "data/crop.py:_resized_each": "on a CPU alone",
    "methods/energy/descent.py:Descent.begin": BEFORE,
    "methods/energy/descent.py:Descent.calibrate": BEFORE,
    "patches.py:Standardize.__init__": BEFORE,
    "tokenizers.py:KMeansPatches.fit": BEFORE,
    "tokenizers.py:Tokenizer.count": BEFORE,
    "tokenizers.py:Tokenizer.judge": BEFORE,
    "tokenizers.py:_plus_plus": BEFORE,
    "tokenizers.py:save_tokenizer": "written",
    "train/meter.py:Meter.last": "of a checkpoint",
    "train/meter.py:Meter.means": "of a line of metrics",
    "train/stepper.py:Stepper._backward": "tensors already",
    "train/stepper.py:Stepper._take": "a tensor already",
}


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Each function by its name, with that of its class."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield f"{inside}{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{node.name}.")


def reads(function: ast.AST) -> list[str]:
    """What reads a device, or may, in a function."""
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, of = node.func.attr, node.func.value
            torchs = isinstance(of, ast.Name) and of.id == "torch"
            if (name in READS and not torchs) or (name in MADE and torchs):
                found.append(f"{node.lineno}: .{name}(")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("bool", "float", "int"):
            inner = ast.unparse(node.args[0]) if node.args else ""
            if any(
                word in inner for word in (".sum()", ".mean()", ".any()", ".all()", ".max()", ".min()", ".square()")
            ):
                found.append(f"{node.lineno}: {node.func.id}({inner})")
        tests = [node.test] if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert) else []
        for test in tests:
            if any(part in ast.unparse(test) for part in (".any()", ".all()", ".item()", "isfinite(")):
                found.append(f"{test.lineno}: if {ast.unparse(test)}")
        if isinstance(node, ast.Subscript):
            index = node.slice
            if isinstance(index, ast.Compare) or (isinstance(index, ast.UnaryOp) and isinstance(index.op, ast.Invert)):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.quick
def test_the_source_of_what_runs_in_a_step_reads_no_device() -> None:
    """By the words alone: what they are said of only running them tells (above). Where one is right, it is listed."""
    found = {}
    for file in IN_STEPS:
        for name, function in functions(ast.parse(file.read_text())):
            if lines := reads(function):
                found[f"{file.relative_to(ROOM)}:{name}"] = lines
    assert {place: lines for place, lines in found.items() if place not in ALLOWED} == {}
    assert set(ALLOWED) <= set(found), "listed, and no longer there"


@pytest.mark.quick
@pytest.mark.parametrize(
    "source",
    [
        "x.item()",
        "x.tolist()",
        "x.cpu()",
        "bool(x.any())",
        "float(x.mean())",
        "x[x > 0]",
        "x[~hidden]",
        "torch.tensor([1.0])",
        "x.new_tensor(y)",
        "if (x > 0).any(): pass",
        "y = 1 if x.isfinite().all() else 2",
    ],
)
def test_words_that_read_a_device_are_found(source: str) -> None:
    assert reads(ast.parse(source))


@pytest.mark.quick
@pytest.mark.parametrize(
    "source", ["x[-1]", "x[..., :-1]", "torch.zeros(3)", "(x > 0).any()", "len(x) if x.ndim else 1"]
)
def test_words_that_read_none_are_let_be(source: str) -> None:
    assert not reads(ast.parse(source))
