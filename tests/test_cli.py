"""The command line: help, one clear line for bad input, and the small commands."""

import csv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from asking import pretrain
from PIL import Image

from underpaint.cli import COMMANDS, main, parser
from underpaint.config import COMPARED, FLAGS, declaration


@pytest.mark.quick
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args([command, "--help"])
    assert ended.value.code == 0
    assert f"example: underpaint {command}" in capsys.readouterr().out.replace("\n", " ").replace("  ", " ")


@pytest.mark.quick
def test_the_flags_are_those_that_were_promised() -> None:
    """To add one is to promise it for good: here, in docs/interface.md, and in the table."""
    assert set(FLAGS) == {
        *("method", "mask_ratio", "encoder", "patch_size", "image_size", "init"),
        *("labels", "groups", "all_images", "drop_duplicates", "workers"),
        *("lr", "weight_decay", "warmup", "batch_size"),
        *("epochs", "steps", "minutes", "seed", "precision", "devices", "nodes", "probe_every", "checkpoint_every"),
    }
    assert set(FLAGS) - set(COMPARED) == {"method", "epochs", "steps", "minutes", "seed", "probe_every"}


@pytest.mark.quick
@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_is_documented_and_tells_its_unit(name: str, capsys: Any) -> None:
    flag, declared = f"--{name.replace('_', '-')}", declaration(FLAGS[name])
    rows = (Path(__file__).parents[1] / "docs" / "interface.md").read_text().splitlines()
    assert f"`{flag}" in next(row for row in rows if row.startswith("| `underpaint pretrain"))
    for command in ["pretrain", *["compare"] * (name in COMPARED)]:
        with pytest.raises(SystemExit):
            parser().parse_args([command, "--help"])
        said = " ".join(capsys.readouterr().out.partition("options:")[2].split())
        told = said[said.index(f" {flag} ") :]
        assert told.index(declared.metadata["help"].split()[0]) < len(flag) + 40
        assert declared.metadata["unit"] in told


@pytest.mark.quick
def test_help_shows_defaults_and_units(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["pretrain", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--lr LR peak learning rate [per 256 images] (default: planned)" in said
    assert "height and width, N or HxW [pixels] (default: planned)" in said
    assert "[steps] (default: a quarter of the run)" in said
    with pytest.raises(SystemExit):
        parser().parse_args(["compare", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--lr LR peak learning rate [per 256 images] (default: 0.00015)" in said
    assert "[pixels] (default: 224x224)" in said


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrain", "DATA"], "required: --out"),
        (["pretrain", "nowhere", "--out", "OUT"], "nowhere"),
        (
            ["pretrain", "DATA", "--out", "OUT", "--method", "mea"],
            "there is no 'mea'; there are: beit, cae, cim, conditional-energy, energy, localmim, mae, simmim",
        ),
        (["pretrain", "DATA", "--out", "OUT", "--encoder", "vit_tinny"], "timm has no model 'vit_tinny'"),
        (["pretrain", "DATA", "--out", "OUT", "--set", "method.hidden=1"], "no setting 'hidden'; there are: name"),
        (["pretrain", "DATA", "--out", "OUT", "--set", "methd.x=1"], "no such setting; paths are method.NAME"),
        (["pretrain", "DATA", "--out", "OUT", "--set", "method.mask_ratio=a"], "mask_ratio"),
        (["pretrain", "DATA", "--out", "OUT", "--set", "method.mask_ratio=1.5"], "must be above 0 and below 1"),
        (["pretrain", "DATA", "--out", "OUT", "--set", "method.mask_ratio"], "not PATH=VALUE"),
        (["pretrain", "DATA", "--out", "OUT", "--recipe", "none"], "neither a file nor one of"),
        (
            ["pretrain", "DATA", "--out", "OUT", "--image-size", "30", "--patch-size", "16"],
            "16 px does not divide an image of 30x30",
        ),
        (["pretrain", "DATA", "--out", "OUT", "--epochs", "1", "--steps", "2"], "not allowed with"),
        (["pretrain", "DATA", "--out", "OUT", "--steps", "-2"], "must be above 0"),
        (["pretrain", "DATA", "--out", "OUT", "--lr", "-1"], "optimiser.lr: -1; it must be at least 0"),
        (["pretrain", "DATA", "--out", "OUT", "--warmup", "many"], "argument --warmup: invalid float value: 'many'"),
        (["pretrain", "DATA", "--out", "OUT", "--batch-size", "0"], "must be at least 1"),
        (
            ["pretrain", "DATA", "--out", "OUT", "--set", "encoder.fc_norm=true"],
            "cannot be used: this transformer lacks a final norm",
        ),
        (["pretrain", "DATA", "--out", "OUT", "--init", "absent.pth"], "no such file"),
        (["report", "DATA"], "no recipe.yaml"),
        (["score", "DATA", "DATA", "--out", "x.csv"], "no recipe.yaml"),
        (["check", "nowhere"], "nowhere"),
        (["nonsense"], "invalid choice"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], said: str, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    places = {"DATA": str(pictures), "OUT": str(tmp_path / "run")}
    assert main([places.get(a, a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert error.startswith("underpaint: ")


@pytest.mark.quick
def test_a_folder_that_is_no_run_is_not_written_over(pictures: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert main(["pretrain", str(pictures), "--out", str(tmp_path), "--steps", "1"]) == 2
    assert "exists and is not a run folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.quick
def test_lists(capsys: Any) -> None:
    assert main(["methods"]) == 0
    assert "arXiv 2302.01384" in capsys.readouterr().out
    assert main(["recipes"]) == 0
    assert "mae-tiny-32" in capsys.readouterr().out


def test_check_restore_score_and_report(pictures: Path, tmp_path: Path, capsys: Any) -> None:
    settings = {"encoder.embed_dim": 32, "encoder.depth": 2, "encoder.num_heads": 2}
    for method in ("energy", "mae"):
        run = pretrain(
            *(pictures, tmp_path / method),
            method=method,
            encoder="vit_tiny_patch16_224",
            image_size=(16, 32),
            patch_size=4,
            steps=2,
            batch_size=16,
            settings=settings,
        )
        images = [str(p) for p in sorted(pictures.rglob("*.png"))[:3]]
        assert main(["restore", str(run.path), *images, "--out", str(tmp_path / "sheet.png")]) == 0
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.width > 3 * 96
        assert main(["score", str(run.path), str(pictures), "--out", str(tmp_path / "scores.csv")]) == 0
        with open(tmp_path / "scores.csv") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 90
        values = [float(row["score"]) for row in rows]
        assert values == sorted(values, reverse=True)
        assert [int(row["rank"]) for row in rows] == list(range(1, 91))
    capsys.readouterr()
    assert main(["restore", str(run.path), "absent.png", "--out", str(tmp_path / "x.png")]) == 2
    (tmp_path / "report-first").write_text("")
    (run.path / "report.html").unlink()
    assert main(["report", str(run.path)]) == 0
    assert (run.path / "report.html").is_file()
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for image in pictures.rglob("*.png"):
            archive.write(image, image.relative_to(pictures))
    capsys.readouterr()
    assert main(["check", str(tmp_path / "pictures.zip")]) == 0
    assert "90" in capsys.readouterr().out
