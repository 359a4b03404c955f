"""A run folder as one self-contained page, and its verdict."""

from pathlib import Path

from underpaint.report.page import write_page
from underpaint.report.run import report
from underpaint.report.verdict import Verdict, is_falling, verdict


def write_report(run: Path) -> Path:
    """Writes `run/report.html`, one page that holds all it shows, and returns its path.

    Whatever is missing from the run folder is left out of the page, or said to be missing.
    """
    return write_page(run / "report.html", report(run))


__all__ = ["Verdict", "is_falling", "verdict", "write_report"]
