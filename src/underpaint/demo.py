"""`underpaint demo`: pretraining, judgement and page on crops of photographs that two libraries carry along."""

from pathlib import Path

from underpaint.console import say
from underpaint.demo_images import write_demo_images
from underpaint.pretraining import pretrain
from underpaint.recipes.request import named
from underpaint.train.run_folder import Run


def demo(out: Path) -> Run:
    """Make the images beside the run (`OUT-images`), pretrain on them for two minutes, and judge."""
    folder = out.with_name(out.name + "-images")
    names = write_demo_images(folder)
    say(f"crops of {len(names)} photographs: {', '.join(names)}")
    say("left parts are for training, right parts for testing; the label is the photograph a crop is from")
    recipe = named("mae-tiny-32")
    recipe.run.minutes, recipe.optimiser.lr = 2.0, 1e-3
    run = pretrain(folder, out, recipe)
    say(f"look at {run.path / 'report.html'}")
    return run
