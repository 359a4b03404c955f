"""A run folder or a comparison as one self-contained page, and the verdict of a run."""

from pathlib import Path

from underpaint.report.comparison import PROBES, comparison, markdown_table
from underpaint.report.page import write_page
from underpaint.report.run import report
from underpaint.report.verdict import Verdict, is_falling, verdict


def write_report(run: Path) -> Path:
    """Writes `run/report.html`, one page that holds all it shows, and returns its path.

    Whatever is missing from the run folder is left out of the page, or said to be missing.
    """
    return write_page(run / "report.html", report(run))


def write_comparison(folder: Path) -> Path:
    """Writes `folder/report.html` from `folder/compare.json`, and returns its path.

    Raises InputError where the folder holds no finished comparison.
    """
    return write_page(folder / "report.html", comparison(folder))


__all__ = ["PROBES", "Verdict", "is_falling", "markdown_table", "verdict", "write_comparison", "write_report"]
