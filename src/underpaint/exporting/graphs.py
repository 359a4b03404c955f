"""Networks as graphs that need neither timm nor underpaint: ONNX, and TorchScript. Both take images in [0, 1]: mean and deviation
are inside, so that nobody forgets them."""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from underpaint import __version__
from underpaint.backbones import Swin, SwinV2, TokenBackbone
from underpaint.exporting.subject import OnUnit, Outputs, Subject, Written
from underpaint.reading import one_line

OPSET = 20
LARGE = 1.8e9  # bytes: a protocol buffer holds no more than 2 GiB, so larger weights lie beside the graph


def facts_of(subject: Subject) -> dict[str, Any]:
    """What is written into a graph, as plain data."""
    return {
        "task": subject.task,
        "input": f"images: float32 [b, {len(subject.mean)}, height, width] in [0, 1]",
        "outputs": list(subject.names),
        "image_size": list(subject.size),
        "mean": subject.mean,
        "std": subject.std,
        "feature_dim": subject.bundle.encoder.dim,
        "pooling": subject.bundle.encoder.pooling,
        "classes": subject.classes,
        "underpaint": __version__,
        "torch": torch.__version__,
    }


def write_onnx(subject: Subject, folder: Path) -> Written:
    """`model.onnx` by torch's exporter through `torch.export`, with any number of images and, of a convolutional net, any size
    that it took in a try."""
    import onnxruntime

    if subject.task == "detect":
        why = "torch.export does not take a detector's loops over as many objects as an image has"
        raise subject.refused("onnx", why, "torchscript or safetensors")
    network = OnUnit(subject).eval()
    program, reason = None, ""
    for sizes in (True, False) if _any_size(subject) else (False,):
        try:
            with _quiet():
                program = torch.onnx.export(
                    network,
                    (_example(subject, sizes),),
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=["images"],
                    output_names=list(subject.names),
                    dynamic_shapes=(_dimensions(subject, sizes),),
                    verbose=False,
                )
            if not sizes or _takes_any_size(program):
                break
            program = None  # the exporter fixed them, without a word
        except Exception as error:  # of every stage of it, by which it says that it cannot
            reason = one_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
    if program is None:
        raise subject.refused("onnx", f"torch cannot export it ({reason[:200]})", "torchscript or safetensors")
    facts = facts_of(subject) | {"opset": OPSET, "any_size": _takes_any_size(program)}
    program.model.metadata_props.update({k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()})
    file = folder / "model.onnx"
    size = sum(each.numel() * each.element_size() for each in network.state_dict().values())
    program.save(file, external_data=size > LARGE)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def read(images: Tensor) -> Outputs:
        found = session.run(list(subject.names), {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(subject.names, found, strict=True)}

    first = subject.names[0]
    usage = (
        "import onnxruntime\n\n"
        'session = onnxruntime.InferenceSession("PATH/model.onnx")\n'
        f"# images: float32 [b, {len(subject.mean)}, {subject.size[0]}, {subject.size[1]}] in [0, 1]\n"
        f'{first}, *rest = session.run(None, {{"images": images}})\n'
    )
    return Written(read, usage, facts | {"onnxruntime": onnxruntime.__version__})


def write_torchscript(subject: Subject, folder: Path) -> Written:
    """`model.pt` by tracing, at the size of the subject's images; what it is lies in it as `underpaint.json`."""
    network, example = OnUnit(subject).eval(), _example(subject)
    facts = facts_of(subject)
    try:
        with _quiet(), torch.no_grad():
            traced: Any = torch.jit.trace(network, (example,), check_trace=False, strict=False)
            torch.jit.save(traced, folder / "model.pt", _extra_files={"underpaint.json": json.dumps(facts)})
            made: Any = torch.jit.load(folder / "model.pt").eval()
    except Exception as error:  # of any kind, by which it says that it cannot
        why = f"torch cannot trace it ({one_line(error)[:200]})"
        raise subject.refused("torchscript", why, "onnx or safetensors") from error

    @torch.no_grad()
    def read(images: Tensor) -> Outputs:
        return dict(zip(subject.names, made(images), strict=True))

    usage = (
        'import torch\n\nmodel = torch.jit.load("PATH/model.pt").eval()\n'
        f"# images: float32 [b, {len(subject.mean)}, {subject.size[0]}, {subject.size[1]}] in [0, 1]\n"
        f"{subject.names[0]}, *rest = model(images)\n"
    )
    return Written(read, usage, facts)


def _example(subject: Subject, sizes: bool = False) -> Tensor:
    """Images that a graph is made by: two, so that their number is seen to vary; larger ones where their size may, since a
    map that a size leaves one place of is taken for always so small."""
    generator = torch.Generator().manual_seed(0)
    height, width = subject.size
    size = (2 * height, 3 * width) if sizes else subject.size
    return torch.rand(2 if subject.batched else 1, len(subject.mean), *size, generator=generator)


def _any_size(subject: Subject) -> bool:
    """Whether images of any size might do."""
    fixed = isinstance(subject.bundle.encoder, TokenBackbone | Swin | SwinV2)
    return subject.task in ("encoder", "finetune", "linear", "regression") and not fixed


def _dimensions(subject: Subject, sizes: bool) -> dict[int, Any] | None:
    dimensions: dict[int, Any] = {0: torch.export.Dim("batch")} if subject.batched else {}
    if sizes:
        dimensions |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    return dimensions or None


def _takes_any_size(program: Any) -> bool:
    """Whether height and width of a graph's images are left open."""
    shape = program.model.graph.inputs[0].shape
    return not any(isinstance(shape[axis], int) for axis in (2, 3))


@contextmanager
def _quiet() -> Iterator[None]:
    """What exporters say of their own inside is not for a user."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
