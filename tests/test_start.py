"""Help, lists and complaints come at once: before torch, timm or anything of their weight is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

HEAVY = ("torch", "timm", "lightning", "torchvision", "sklearn", "scipy", "pandas", "matplotlib", "skimage", "pyarrow")
SAID = """
import contextlib, io, json, sys
from underpaint.cli import main
found = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as ended:
            status = ended.code
    heavy = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
    found.append([status, out.getvalue(), err.getvalue(), heavy])
print(json.dumps(found))
"""


def answers(commands: list[list[str]]) -> list[tuple[int, str, str, list[str]]]:
    """Status, both outputs, and what had been imported by then, of commands one after the other in a new process."""
    asked = [sys.executable, "-c", SAID, json.dumps(commands), json.dumps(HEAVY)]
    return json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)


@pytest.mark.seconds
def test_nothing_heavy_is_imported_to_help_to_list_or_to_complain(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "recipe.yaml").write_text("measured: {steps: 100}")
    (tmp_path / "old" / "metrics.jsonl").write_text('{"step": 40, "loss": 0.5, "images_per_second": 300}\n')
    run = ["pretrain", str(pictures), "--out", str(tmp_path / "run")]
    asked = {
        "usage": ["--help"],
        "--checkpoint-every": ["pretrain", "--help"],
        "arXiv 2302.01384": ["methods"],
        "mae-tiny-32": ["recipes"],
        "invalid choice: 'pretrian'": ["pretrian"],
        "there is no 'mea'; there are: beit, cae": [*run, "--method", "mea"],
        "neither a file nor one of": [*run, "--recipe", "mae-tiny"],
        "no such setting; paths are method.NAME": [*run, "--set", "methd.mask_ratio=0.6"],
        "data: no setting 'chanels'": [*run, "--set", "data.chanels=3"],
        "no such data: nowhere": ["pretrain", "nowhere", "--out", str(tmp_path / "run")],
        "no such data: labelled": [*run, "--labels", "labelled"],
        "optimiser.lr: -1; it must be at least 0": [*run, "--lr", "-1"],
        "run.steps: -2; it must be above 0": [*run, "--steps", "-2"],
        "method.mask_ratio: 2; it must be above 0 and below 1": [*run, "--set", "method.mask_ratio=2"],
        "'mea' is no method": ["compare", str(pictures), "--methods", "mae,mea", "--minutes", "1", "--out", "x"],
        "here: no recipe.yaml here": ["report", "here"],
        "old: stopped, step 40 of 100 (40%), 300 images/s, loss 0.500": ["watch", str(tmp_path / "old")],
        "there: no recipe.yaml": ["score", "there", str(pictures), "--out", "x.csv"],
        "runs/fisrt: no such encoder": ["embed", "runs/fisrt", str(pictures), "--out", "x.parquet"],
        "--task 'lineal': there are knn, linear": [
            *("evaluate", "timm:any", "--data", str(pictures), "--task", "lineal", "--out", "x")
        ],
        "no such data: absent": ["check", "absent"],
    }
    for (said, arguments), (status, out, err, heavy) in zip(asked.items(), answers(list(asked.values())), strict=True):
        assert said in out + err, arguments
        assert status == (2 if err else 0), arguments
        assert err.count("\n") <= 1, arguments
        assert not heavy, arguments


@pytest.mark.seconds
def test_a_misspelt_setting_of_a_method_is_known_by_its_class(pictures: Path, tmp_path: Path) -> None:
    asked = ["pretrain", str(pictures), "--out", str(tmp_path / "run"), "--set", "method.hidden=1"]
    ((status, _, err, _),) = answers([asked])
    assert status == 2
    assert "no setting 'hidden'; there are: name" in err
