"""Images that change between a kill and the resume: what changed is said, and nothing goes on by itself."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import write_pictures
from forked import CommandLine, Ended

from underpaint.data import changes, open_source

COMMAND = [
    *("--method", "mae", "--encoder", "vit_tiny_patch16_224", "--image-size", "16", "--patch-size", "4"),
    *("--batch-size", "8", "--steps", "6", "--checkpoint-every", "2", "--set", "encoder.embed_dim=32"),
    *("--set", "encoder.depth=1", "--set", "encoder.num_heads=2", "--set", "run.log_every=2"),
]


def add(folder: Path) -> None:
    shutil.copy(folder / "class0" / "0000.png", folder / "class0" / "new.png")


def remove(folder: Path) -> None:
    (folder / "class0" / "0003.png").unlink()


def replace(folder: Path) -> None:
    """By one of the same size."""
    file = folder / "class0" / "0003.png"
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)


def touch(folder: Path) -> None:
    for file in folder.rglob("*.png"):
        os.utime(file, (1e9, 1e9))


@pytest.mark.quick
@pytest.mark.parametrize(("images", "size"), [(20_000, 1), (3, 2**30), (20_000, 2**30)])
def test_only_small_sets_are_read_for_digests(
    images: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(write_pictures(tmp_path / "images", 4, size=16))
    monkeypatch.setattr(changes, "DIGESTED", images)
    monkeypatch.setattr(changes, "DIGESTED_BYTES", size)
    digests = changes.listing(source, tmp_path / "none.parquet")[0]["digest"].to_pylist()
    assert len(digests) == 4
    assert all(digest is None for digest in digests) == (images == 3 or size == 1)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, server: CommandLine) -> Path:
    """A folder with images and a run on them that was killed in its fifth step."""
    folder = tmp_path_factory.mktemp("killed")
    write_pictures(folder / "images", 36, size=16)
    died = server("pretrain", folder / "images", "--out", folder / "run", *COMMAND, die=("step", 5))
    assert died.status == -9, died.error
    return folder


@pytest.fixture
def resume(killed: Path, server: CommandLine, tmp_path: Path) -> Iterator[Callable[..., Ended]]:
    """Goes on with a copy of that run after a change of its images, which are put back."""

    def going_on(change: Callable[[Path], None], *more: str) -> Ended:
        images, run = killed / "images", tmp_path / "run"
        if not run.is_dir():
            shutil.copytree(killed / "run", run)
            shutil.copytree(images, tmp_path / "before")  # copy2 keeps the times
        change(images)
        return server("pretrain", images, "--out", run, *COMMAND, *more)

    yield going_on
    shutil.rmtree(killed / "images")
    shutil.copytree(tmp_path / "before", killed / "images")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (add, "1 added (class0/new.png)"),
        (remove, "1 removed (class0/0003.png)"),
        (replace, "1 replaced (class0/0003.png)"),
    ],
)
def test_a_change_is_named_refused_and_can_be_accepted(
    change: Callable[[Path], None], said: str, resume: Callable[..., Ended], tmp_path: Path
) -> None:
    refused = resume(change)
    assert refused.status == 2
    error = refused.error.strip()
    assert error.count("\n") == 0
    assert f"changed since the run began: {said}" in error
    assert "--set data.changed=accept" in error
    before = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["measured"]["statistics"]

    accepted = resume(lambda _: None, "--set", "data.changed=accept")
    assert accepted.status == 0, accepted.error
    assert said in accepted.out
    assert "going on from step 4 of 6" in accepted.out
    stored = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert stored["data"]["changed"] == "refuse"  # the next change is another one
    assert stored["measured"]["statistics"] == before
    assert resume(lambda _: None).status == 0  # what was accepted is what the run has now


@pytest.mark.parametrize("change", [lambda _: None, touch])
def test_what_did_not_change_goes_on(change: Callable[[Path], None], resume: Callable[..., Ended]) -> None:
    done = resume(change)
    assert done.status == 0, done.error
    assert "going on from step 4 of 6" in done.out
    assert "changed" not in done.out
