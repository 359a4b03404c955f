"""What a judgement costs: features, kNN, the linear and the attentive probe, a quick probe, the judgement at the end.

    python benchmarks/judging.py [--part probes,run] [--threads 2] [--beside SRC]

Part "probes": made features of 50,000 images to train on and 10,000 to test by, 128 numbers each, 10 classes; for the attentive
probe 10,000 and 10,000 images of 64 patch tokens. Beside ours what one would take from scikit-learn: `LogisticRegression` on
standardised features at the C that ours chose (one fit, where ours chooses among five), `KNeighborsClassifier` by cosine at
the k that ours chose. Part "run": 2,000 and 2,000 made images of 64 px, a ViT of 192 x 12 with patches of 8 px: extraction, a
quick probe, and the last quick probe with the judgement and its pictures.

`--beside SRC` times the same parts with the sources in another folder (`git worktree add`), in turns with these, each in a process of its own.
docs/results/judging.json has every line; a run adds to it.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOUND = ROOT / "docs" / "results" / "judging.json"
TRAIN, TEST, DIM, CLASSES = 50_000, 10_000, 128, 10
FEW, TOKENS = 10_000, 64  # images and patch tokens of the attentive probe
IMAGES, SIDE = 2_000, 64
PARTS = ("probes", "run", "peers")


def timed(name: str, made: dict[str, Any], work: Callable[[], Any]) -> Any:
    """Seconds on the clock and of processor time."""
    began, spent = time.perf_counter(), time.process_time()
    found = work()
    made[name] = {"seconds": time.perf_counter() - began, "processor": time.process_time() - spent}
    if hasattr(found, "accuracy"):
        made[name] |= {"accuracy": found.accuracy, "chosen": found.chosen}
    return found


def features() -> tuple[Any, Any, Any, Any]:
    import torch

    torch.manual_seed(0)
    y = torch.randint(0, CLASSES, (TRAIN + TEST,))
    x = torch.randn(TRAIN + TEST, DIM) + 0.22 * torch.randn(CLASSES, DIM)[y]
    x = x @ (0.1 * torch.randn(DIM, DIM) * torch.logspace(0, -2, DIM)) + 0.5  # correlated, of unlike variance
    return x[:TRAIN], y[:TRAIN].numpy(), x[TRAIN:], y[TRAIN:].numpy()


def probes(made: dict[str, Any]) -> None:
    import torch

    from underpaint.evaluation.attentive import attentive
    from underpaint.evaluation.knn import knn
    from underpaint.evaluation.linear import linear

    given = features()
    timed("knn", made, lambda: knn(*given))
    timed("linear", made, lambda: linear(*given))
    y = torch.from_numpy(given[1][: 2 * FEW])
    tokens = torch.randn(2 * FEW, TOKENS, DIM)
    tokens[:, :20] += 0.3 * torch.randn(CLASSES, DIM)[y][:, None]
    timed("attentive", made, lambda: attentive(tokens[:FEW], y[:FEW].numpy(), tokens[FEW:], y[FEW:].numpy()))


def peers(made: dict[str, Any]) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler

    x, y, test_x, test_y = (part.numpy() if hasattr(part, "numpy") else part for part in features())

    def logistic() -> float:
        scaler = StandardScaler().fit(x)
        return (
            LogisticRegression(C=1.0, max_iter=1_000)
            .fit(scaler.transform(x), y)
            .score(scaler.transform(test_x), test_y)
        )

    def neighbours() -> float:
        fitted = KNeighborsClassifier(50, metric="cosine", algorithm="brute", n_jobs=-1).fit(x, y)
        return float(fitted.score(test_x, test_y))

    for name, work in (("scikit-learn, logistic regression", logistic), ("scikit-learn, neighbours", neighbours)):
        accuracy = timed(name, made, work)
        made[name]["accuracy"] = float(accuracy)


def run(made: dict[str, Any], images: int) -> None:
    import numpy as np
    import torch
    from PIL import Image

    import underpaint
    from underpaint.data import load_images, open_source, pretraining_indices
    from underpaint.evaluation.probes import ProbeSuite
    from underpaint.evaluation.visualizations import write_visualizations
    from underpaint.patches import Standardize

    size, random = (SIDE, SIDE), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        os.environ["UNDERPAINT_CACHE"] = f"{place}/cache"
        for k in range(2 * images):
            folder = Path(place, "images", "train" if k < images else "test", f"class{k % CLASSES}")
            folder.mkdir(parents=True, exist_ok=True)
            small = random.integers(0, 256, (8, 8, 3)) // 2 + 12 * (k % CLASSES)
            Image.fromarray(small.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC).save(folder / f"{k}.png")
        source = open_source(Path(place, "images"))
        indices = pretraining_indices(source)
        pool = load_images(source, indices, size=size)
        suite = ProbeSuite.of(source, lambda s, i: load_images(s, i, size=size), pool, indices, size, 0)
        torch.manual_seed(0)
        start = underpaint.encoder("vit_tiny_patch16_224", image_size=SIDE, patch_size=8).eval()
        encoder, standardize = copy.deepcopy(start), Standardize([0.5] * 3, [0.25] * 3)
        for weight in encoder.parameters():
            weight.data += 0.02 * torch.randn(weight.shape)
        before: Any = None
        if hasattr(suite, "glance"):
            before = timed("look at the images", made, lambda: suite.glance(start, standardize))
            timed("quick probe of what was seen", made, lambda: suite.quick(start, standardize, before))
            made["quick probe"] = {
                name: made["look at the images"][name] + made["quick probe of what was seen"][name]
                for name in ("seconds", "processor")
            }
        else:
            timed("quick probe", made, lambda: suite.quick(start, standardize))

        def judge() -> None:
            seen = suite.see(encoder, standardize)
            suite.quick(encoder, standardize, seen)
            old = suite.see(start, standardize, before) if before is not None else suite.see(start, standardize)
            suite.final(seen, old, standardize)
            known: Any = [one.known(suite if before is not None else suite.splits) for one in (seen, old)]  # type: ignore
            write_visualizations(encoder, start, suite, standardize, Path(place, "out"), known=(known[0], known[1]))

        timed("last probe, judgement and pictures", made, judge)
        whole = ("quick probe", "last probe, judgement and pictures")
        made["all of a run's judging"] = {n: sum(made[k][n] for k in whole) for n in ("seconds", "processor")}


def told(source: Path, commit: str, part: str, threads: int, images: int) -> dict[str, Any]:
    """The same parts by the sources in a folder, in a process of its own."""
    line = [sys.executable, __file__, "--alone", "--part", part, "--threads", str(threads), "--images", str(images)]
    path = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": str(threads)}
    answer = subprocess.run(line, env=path, check=True, stdout=subprocess.PIPE, text=True)
    from underpaint.train.run_folder import environment

    described = {"commit": commit, "torch": environment()["torch"], "cores": os.cpu_count(), "threads": threads}
    return {**described, "load": round(os.getloadavg()[0], 1), **json.loads(answer.stdout.splitlines()[-1])}


def commit_of(source: Path) -> str:
    line = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(line, capture_output=True, text=True, cwd=source).stdout.strip()


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--part", default="probes,run,peers", help="of " + ",".join(PARTS))
    given.add_argument("--threads", type=int, default=os.cpu_count())
    given.add_argument("--images", type=int, default=IMAGES, help="to train on, and to test by, of the part run")
    given.add_argument("--beside", type=Path, help="the src folder of another commit")
    given.add_argument("--alone", action="store_true", help="in this process, and print the numbers alone")
    asked = given.parse_args()
    if asked.alone:
        import torch

        torch.set_num_threads(asked.threads)
        made: dict[str, Any] = {}
        for part in asked.part.split(","):
            if part == "run":
                run(made, asked.images)
            else:
                {"probes": probes, "peers": peers}[part](made)
        print(json.dumps(made))
        return
    for part in asked.part.split(","):
        sources = [ROOT / "src"] if part == "peers" or asked.beside is None else [asked.beside.resolve(), ROOT / "src"]
        for source in sources:
            row = told(source, commit_of(source), part, asked.threads, asked.images)
            known = json.loads(FOUND.read_text()) if FOUND.is_file() else []
            FOUND.write_text(
                json.dumps(
                    [*known, {"part": part, **({"images": asked.images} if part == "run" else {}), **row}], indent=1
                )
                + "\n"
            )
            for name, found in row.items():
                if isinstance(found, dict):
                    words = f"{found['seconds']:8.2f} s, processor {found['processor']:8.2f} s"
                    print(f"{row['commit']}  {name:40s} {words}  {found.get('accuracy', '')} {found.get('chosen', '')}")


if __name__ == "__main__":
    main()
