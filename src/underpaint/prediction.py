"""Using what `underpaint evaluate` trained on images without annotations, and features for use elsewhere."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from underpaint.backbones import from_arguments
from underpaint.data import eval_batches, open_source, stored_scaling
from underpaint.errors import InputError
from underpaint.evaluation import EVALUATIONS, evaluation
from underpaint.evaluation.bundle import EncoderBundle, open_bundle
from underpaint.evaluation.keep import kept
from underpaint.files import replacing
from underpaint.patches import Standardize


def predict(trained: str | Path, images: str | Path, out: str | Path) -> None:
    """Run what an evaluation trained over images.

    `out` gets what the evaluation writes: predictions.csv (path, and a class with its probability, or a number), masks/
    (an index PNG an image, and classes.json), or detections.json (COCO, with scores); and a picture of the first images.

    Args:
        trained: a folder of `underpaint evaluate`, or that of one of its tasks.
        images: as for pretraining.
        out: a folder.

    Raises:
        InputError: nothing trained there; no images.
    """
    saved, weights = kept(Path(trained))
    name = saved["task"].partition("-")[0]
    if name not in EVALUATIONS:
        raise InputError(f"a model of task '{saved['task']}'; this version does not know it")
    kind = evaluation(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bundle = EncoderBundle(
        saved["encoder"],
        from_arguments(dict(saved["create_model"])),
        saved["create_model"],
        Standardize(saved["mean"], saved["std"]).to(device),
        (saved["image_size"][0], saved["image_size"][1]),
        True,
        scaling=stored_scaling(saved.get("scaling")),
    )
    model = kind.rebuild(saved, bundle)
    model.load_state_dict(weights)
    source = open_source(images)
    bundle, folder = bundle.scaled(source), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    kind.write(model.to(device).eval(), saved, bundle, source, folder)


@torch.no_grad()
def embed(encoder: str | Path, data: str | Path, out: str | Path, *, image_size: tuple[int, int] | None = None) -> int:
    """Write path and pooled feature vector of every image to a parquet file; how many there are.

    Raises:
        InputError: an encoder or data that cannot be used.
    """
    source = open_source(data)
    bundle = open_bundle(str(encoder), image_size=image_size).scaled(source)
    images, path = bundle.images(source), Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = pa.list_(pa.float32(), bundle.encoder.dim)
        schema = pa.schema([("path", pa.string()), ("vector", kind)])
        with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for batch in eval_batches(images, size=bundle.size, device=bundle.standardize.mean.device):
                pooled = bundle.encoder(bundle.standardize(batch.images)).pooled.float().cpu().numpy()
                vectors = pa.FixedSizeListArray.from_arrays(pa.array(pooled.reshape(-1)), bundle.encoder.dim)
                names = pa.array([images.names[k] for k in batch.samples])
                writer.write_table(pa.Table.from_arrays([names, vectors], schema=schema))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from error
    return len(images)
