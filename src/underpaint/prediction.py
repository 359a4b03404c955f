"""Using what `underpaint evaluate` trained on images without annotations, and features for use elsewhere."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from underpaint.backbones import from_arguments
from underpaint.computing import autocast
from underpaint.console import say
from underpaint.data import eval_batches, open_source, stored_scaling
from underpaint.errors import InputError
from underpaint.evaluation import EVALUATIONS, evaluation
from underpaint.evaluation.base import AnyEvaluation
from underpaint.evaluation.bundle import EncoderBundle, open_bundle
from underpaint.evaluation.features import HALF_LIMIT, counted
from underpaint.evaluation.keep import Saved, kept
from underpaint.files import check_writable, refuse_inside, replacing, utf8, write_json
from underpaint.patches import Standardize
from underpaint.report import write_report


def predict(trained: str | Path, images: str | Path, out: str | Path) -> None:
    """Run what an evaluation trained over images.

    `out` gets what the evaluation writes: predictions.csv (path, and a class with its probability, or a number), masks/
    (an indexed PNG an image, and classes.json), or detections.json (COCO, with scores) and labels/ (YOLO); a picture of some
    of the images, predictions.json, which sums up, and a page, report.html. Everything is written as it is computed.

    Args:
        trained: a folder of `underpaint evaluate`, or that of one of its tasks.
        images: as for pretraining.
        out: a folder.

    Raises:
        InputError: nothing trained there; no images.
    """
    folder = Path(out)
    refuse_inside(out, images)
    check_writable(folder)
    kind, saved, bundle, model = rebuilt(trained)
    source = open_source(images)
    bundle = bundle.scaled(source)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        written = kind.write(model, saved, bundle, source, folder)
        told = {
            "format": 1,
            "task": saved["task"],
            "trained": str(trained),
            "images": str(images),
            "count": written.images,
        }
        rest = {name: value for name, value in asdict(written).items() if name != "images"}
        write_json(folder / "predictions.json", told | rest)
        say(f"done: {write_report(folder)}")
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from error


def rebuilt(trained: str | Path) -> tuple[AnyEvaluation, Saved, EncoderBundle, nn.Module]:
    """What an evaluation trained: its kind, description, encoder and network, in eval mode, on the GPU where there is one.

    Args:
        trained: a folder of `underpaint evaluate`, or that of one of its tasks.

    Raises:
        InputError: nothing trained there, or it is damaged.
    """
    saved, weights = kept(Path(trained))
    name = str(saved.get("task")).partition("-")[0]
    if name not in EVALUATIONS:
        raise InputError(f"{trained}: a model of task '{saved.get('task')}'; this version does not know it")
    kind = evaluation(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        bundle = EncoderBundle(
            saved["encoder"],
            from_arguments(dict(saved["create_model"])),
            saved["create_model"],
            Standardize(saved["mean"], saved["std"]).to(device),
            (saved["image_size"][0], saved["image_size"][1]),
            True,
            scaling=stored_scaling(saved.get("scaling")),
        )
        if {len(saved["mean"]), len(saved["std"])} != {bundle.encoder.channels}:
            raise ValueError(f"mean and std are not those of {bundle.encoder.channels} channels")
        model = kind.rebuild(saved, bundle)
        model.load_state_dict(weights)
    except InputError as error:
        raise InputError(f"{trained}: model.json: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"{trained}: model.json is damaged, or does not fit model.safetensors ({reason}); evaluate anew in another folder"
        ) from error
    return kind, saved, bundle, model.to(device).eval()


@torch.no_grad()
def embed(
    encoder: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    patches: bool = False,
) -> int:
    """Write path and pooled feature vector of every image to a parquet file; how many there are.

    With `patches` a third column holds the features of the patches, [rows, columns, d] in float16 (what lies beyond its
    range becomes its largest number), as Arrow's fixed-shape tensor. Everything is written batch by batch.

    A name that is not UTF-8, which parquet cannot hold, has its bytes as escapes: `caf\\udce9.png`.

    Raises:
        InputError: an encoder or data that cannot be used; a file that cannot be written.
    """
    check_writable(Path(out), file=True)
    source = open_source(data)
    bundle = open_bundle(str(encoder), image_size=image_size).scaled(source)
    images, path, dim = bundle.images(source), Path(out), bundle.encoder.dim
    columns: list[tuple[str, Any]] = [("path", pa.string()), ("vector", pa.list_(pa.float32(), dim))]
    if patches:
        columns.append(("patches", pa.fixed_shape_tensor(pa.float16(), [*bundle.encoder.grid(*bundle.size), dim])))
    schema = pa.schema(columns)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            batches = eval_batches(images, size=bundle.size, device=bundle.standardize.mean.device)
            for batch in counted(batches, "features", len(images)):
                with autocast(batch.images.device):
                    found = bundle.encoder(bundle.standardize(batch.images))
                pooled = found.pooled.float().cpu().numpy()
                vectors = pa.FixedSizeListArray.from_arrays(pa.array(pooled.reshape(-1)), dim)
                made: list[Any] = [pa.array([utf8(images.names[k]) for k in batch.samples]), vectors]
                if patches:
                    half = found.patches.float().clamp(-HALF_LIMIT, HALF_LIMIT).half().cpu().numpy()
                    grid = half.reshape(len(half), *schema.field("patches").type.shape)
                    made.append(pa.FixedShapeTensorArray.from_numpy_ndarray(grid))
                writer.write_table(pa.Table.from_arrays(made, schema=schema))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from error
    return len(images)
