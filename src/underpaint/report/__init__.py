"""A run, an evaluation, a comparison or predictions as one self-contained page, its tables, and the verdict of a run."""

from functools import partial
from pathlib import Path

from underpaint.report.verdict import Decision, Verdict, is_falling, verdict
from underpaint.report.watch import watch


def write_report(folder: Path, going: bool | None = None) -> Path:
    """Writes `folder/report.html`, one page that holds all it shows, and returns its path.

    `going` says whether a process works on a run, where that is known: its page then reloads itself. The folder is a comparison (it holds compare.json), an evaluation (results.json), predictions (predictions.json), or else a run. Whatever is missing
    from it is left out of the page, or said to be missing. Raises InputError where it is none of them.
    """
    # here: a line of `underpaint watch` needs no templates and no pictures
    from underpaint.report.comparison import comparison_page
    from underpaint.report.evaluation import evaluation_page
    from underpaint.report.page import write_page
    from underpaint.report.predictions import predictions_page
    from underpaint.report.run import run_page

    kind, made = "run", partial(run_page, going=going)
    if (folder / "compare.json").is_file():
        kind, made = "comparison", comparison_page
    elif (folder / "results.json").is_file():
        kind, made = "evaluation", evaluation_page
    elif (folder / "predictions.json").is_file():
        kind, made = "predictions", predictions_page
    return write_page(folder / "report.html", f"{kind}.html.jinja2", made(folder))


__all__ = ["Decision", "Verdict", "is_falling", "verdict", "watch", "write_report"]
