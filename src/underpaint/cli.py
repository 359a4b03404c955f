"""The command line: each command is a plain function of the library."""

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin

import yaml

import underpaint
from underpaint.config import COMPARED, FLAGS, LENGTHS, PLANNED, declaration
from underpaint.errors import InputError, Stopped
from underpaint.evaluation import EVALUATIONS
from underpaint.evaluation.options import Options
from underpaint.exporting import FORMATS, require
from underpaint.files import check_writable, place_of, refuse_inside
from underpaint.methods import LISTED
from underpaint.signals import Interrupted, answered_signals, requeue


class _Parser(argparse.ArgumentParser):
    """Usage errors are one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; '{self.prog} --help' lists what there is")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are shown where there are some."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, []) else action.help


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    return int(height), int(width or height)


def _setting(text: str) -> tuple[str, Any]:
    path, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not PATH=VALUE")
    return path, _value(value)


def _value(text: str) -> Any:
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return yaml.safe_load(text) if text.isalpha() else text


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


class _Command(NamedTuple):
    """What `--help` says of a command, its arguments, and what it does."""

    text: str
    example: str
    takes: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _add_flags(made: argparse.ArgumentParser, names: Collection[str], planned: Collection[str] = ()) -> None:
    """Flags as they are declared, and `--set`; what is not said comes from the recipe, or where there is none from the plan."""
    length = made.add_mutually_exclusive_group() if set(LENGTHS) <= set(names) else made
    for name in names:
        _add_flag(length if name in LENGTHS else made, name, declaration(FLAGS[name]), name in planned)
    made.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="PATH=VALUE", help="any value of the recipe"
    )


def _add_flag(made: argparse._ActionsContainer, name: str, declared: Field[Any], planned: bool = False) -> None:
    """The flag of a setting, as it is declared; what is not said is not there."""
    flag = f"--{name.replace('_', '-')}"
    told: dict[str, Any] = {"help": _told(declared, planned), "default": argparse.SUPPRESS}
    if declared.type is bool:
        made.add_argument(flag, action="store_true", **told)
    elif get_origin(declared.type) is Literal:
        made.add_argument(flag, choices=get_args(declared.type), **told)
    else:
        made.add_argument(flag, type=_kind(declared.type), **told)


def _kind(annotation: Any) -> Callable[[str], Any]:
    """What makes a setting from a word of the command line."""
    if any(get_origin(kind) is tuple for kind in (annotation, *get_args(annotation))):
        return _size
    return next(kind for kind in (int, float, str) if annotation is kind or kind in get_args(annotation))


def _told(declared: Field[Any], planned: bool) -> str:
    """A setting's help, unit and default."""
    said, default = declared.metadata, declared.default
    words = f"{said['help']} [{said['unit']}]" if said["unit"] else said["help"]
    if planned:
        return f"{words} (default: planned)"
    if default is None:
        default = said["unset"]
    elif isinstance(default, tuple):
        default = "x".join(map(str, default))
    return words if default is False or default == "" else f"{words} (default: {default})"


def _run_at(folder: Path) -> None:
    """Complain of a folder that holds no run."""
    if not (folder / "recipe.yaml").is_file():
        raise InputError(f"{folder}: no recipe.yaml here, so it is not a run folder")


def _encoder_at(text: str) -> None:
    """Complain of an encoder that is neither `timm:NAME` nor anything on disk."""
    if not text.startswith("timm:") and not Path(text).exists():
        raise InputError(
            f"{text}: no such encoder; expected a run folder, a file of weights, a Hugging Face folder or timm:NAME"
        )


def _demo_takes(made: argparse.ArgumentParser) -> None:
    made.add_argument("--out", type=Path, required=True, help="the run folder")


def _demo(given: argparse.Namespace) -> None:
    from underpaint.demo import demo

    demo(given.out)


def _pretrain_takes(made: argparse.ArgumentParser) -> None:
    made.add_argument("data", help="folder, .zip, .tar, parquet, hf:NAME[:SPLIT], parquet:PATTERN or wds:PATTERN")
    made.add_argument("--out", type=Path, required=True, help="the run folder")
    made.add_argument("--recipe", help="a shipped name ('underpaint recipes') or a YAML file")
    made.add_argument(
        "--preview", action="store_true", help="say plan, memory and time, and how DATA is read; then stop"
    )
    _add_flags(made, FLAGS, PLANNED)


def _pretrain(given: argparse.Namespace) -> None:
    from underpaint.recipes.request import asked, foresee, said

    flags = {name: getattr(given, name) for name in FLAGS if hasattr(given, name)}
    foresee(given.data, given.recipe, flags, dict(given.set))
    settings = said(flags, dict(given.set))
    asked(given.out, given.recipe, {}, settings)  # a mistake is answered before the training is imported
    from underpaint.pretraining import pretrain, preview

    if given.preview:
        preview(given.data, given.out, given.recipe, settings)
    else:
        pretrain(given.data, given.out, given.recipe, settings=settings)


def _restore_takes(made: argparse.ArgumentParser) -> None:
    made.add_argument("run_folder", metavar="RUN", type=Path)
    made.add_argument("images", metavar="IMAGE", nargs="+", type=Path)
    made.add_argument("--out", type=Path, required=True, help="a PNG file")
    made.add_argument("--corruption", help="one of those that the run was trained on (default: all in turn)")


def _restore(given: argparse.Namespace) -> None:
    _run_at(given.run_folder)
    from underpaint.inference import restore

    restore(given.run_folder, given.images, given.out, corruption=given.corruption)
    print(given.out)


def _score_takes(made: argparse.ArgumentParser) -> None:
    made.add_argument("run_folder", metavar="RUN", type=Path)
    made.add_argument("data", help="images, as for pretrain")
    made.add_argument("--out", type=Path, required=True, help="a CSV file: path, score, rank; most unusual first")


def _score(given: argparse.Namespace) -> None:
    _run_at(given.run_folder)
    place_of(given.data)
    check_writable(given.out, file=True)
    from underpaint.console import say
    from underpaint.inference import score

    rows = score(given.run_folder, given.data, given.out)
    say(f"{given.out}: {len(rows)} images, most unusual first")


def _compare_takes(made: argparse.ArgumentParser) -> None:
    made.add_argument("data", help="images, as for pretrain")
    made.add_argument("--out", type=Path, required=True, help="a folder; where it holds this comparison, go on")
    made.add_argument(
        "--methods", required=True, type=_names, help="names of methods, shipped recipes or YAML files: a,b,c"
    )
    made.add_argument("--minutes", type=float, required=True, help="of training, for each method with each seed")
    made.add_argument("--seeds", type=int, default=2, help="how often each method is trained")
    made.add_argument("--recipe", help="where encoder and data settings come from: a shipped name or a YAML file")
    _add_flags(made, COMPARED)


def _compare(given: argparse.Namespace) -> None:
    from underpaint.recipes.request import foresee, recipe_named

    flags = {name: getattr(given, name) for name in COMPARED if hasattr(given, name)}
    for entry in given.methods:
        recipe_named(entry)
    foresee(given.data, given.recipe, flags, dict(given.set))
    from underpaint.comparison.plan import recipes_of

    recipes = recipes_of(given.methods, given.recipe, flags, dict(given.set))
    from underpaint.comparison.run import compare

    compare(given.data, given.out, recipes, given.minutes, seeds=given.seeds)


def _evaluate_takes(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "encoder", metavar="ENCODER", help="a run, a file of weights, a Hugging Face folder, or timm:NAME"
    )
    made.add_argument("--data", required=True, help="images with class labels, masks or boxes")
    made.add_argument("--task", required=True, type=_names, help=f"{', '.join(EVALUATIONS)}: a,b,c")
    made.add_argument("--out", type=Path, required=True, help="a folder; where it holds this evaluation, go on")
    for declared in fields(Options):
        if declared.name not in ("settings", "beside"):
            _add_flag(made, declared.name, declared)
    made.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="ENCODER",
        help="public weights (timm:NAME), another run or exported file to ask the same of, with all labels and with 1 and "
        "10 percent of them; any number of times",
    )
    made.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", help="any setting of the training"
    )


def _evaluate(given: argparse.Namespace) -> None:
    place_of(given.data)
    for encoder in (given.encoder, *given.beside):
        _encoder_at(encoder)
    flags = {each.name: getattr(given, each.name) for each in fields(Options) if hasattr(given, each.name)}
    options = Options(**flags, settings=dict(given.set))
    from underpaint.evaluation.settings import foresee

    foresee(given.task, options, given.out, given.data)
    from underpaint.evaluation.runner import evaluate

    evaluate(given.encoder, given.data, given.task, given.out, options)


def _predict_takes(made: argparse.ArgumentParser) -> None:
    made.add_argument("trained", metavar="DIR", type=Path, help="a folder of evaluate, or that of one of its tasks")
    made.add_argument("images", help="images, as for pretrain")
    made.add_argument(
        "--out", type=Path, required=True, help="a folder: CSV, masks, or COCO json and YOLO txt, and a page"
    )


def _predict(given: argparse.Namespace) -> None:
    refuse_inside(given.out, given.images)
    check_writable(given.out)
    from underpaint.prediction import predict

    predict(given.trained, given.images, given.out)


def _embed_takes(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "encoder", metavar="ENCODER", help="a run, a file of weights, a Hugging Face folder, or timm:NAME"
    )
    made.add_argument("data", help="images, as for pretrain")
    made.add_argument("--image-size", type=_size, help="pixels, N or HxW (default: the encoder's own)")
    made.add_argument("--out", type=Path, required=True, help="a parquet file: path, vector")
    made.add_argument("--patches", action="store_true", help="the features of every patch too, in float16")


def _embed(given: argparse.Namespace) -> None:
    place_of(given.data)
    _encoder_at(given.encoder)
    check_writable(given.out, file=True)
    from underpaint.console import say
    from underpaint.prediction import embed

    count = embed(given.encoder, given.data, given.out, image_size=given.image_size, patches=given.patches)
    say(f"{given.out}: {count} images")


def _explore_takes(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "encoder", metavar="ENCODER", help="a run, a file of weights, a Hugging Face folder, or timm:NAME"
    )
    made.add_argument("data", help="images, as for pretrain; of more than 100,000 so many are drawn at random")
    made.add_argument("--out", type=Path, required=True, help="a folder: explore.html and images.parquet")
    made.add_argument("--predictions", type=Path, metavar="FILE.csv", help="of predict: path, class")
    made.add_argument("--image-size", type=_size, help="pixels, N or HxW (default: the encoder's own)")


def _explore(given: argparse.Namespace) -> None:
    _encoder_at(given.encoder)
    refuse_inside(given.out, given.data)
    check_writable(given.out)
    from underpaint.console import say
    from underpaint.exploring import explore

    page = explore(given.encoder, given.data, given.out, predictions=given.predictions, image_size=given.image_size)
    say(f"look at {page}; filter, search and export the same images with Embedding Atlas (underpaint[explore]):")
    say(f"embedding-atlas {given.out}/images.parquet --x x --y y --neighbors neighbors --image image")


def _suggest_takes(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "encoder", metavar="ENCODER", help="a run, a file of weights, a Hugging Face folder, or timm:NAME"
    )
    made.add_argument("data", help="images, as for pretrain; those of the train split that have no label")
    made.add_argument("--out", type=Path, required=True, help="a CSV file: path, cluster, typicality, reason")
    made.add_argument("--count", type=int, default=100, help="images to label")
    made.add_argument("--labels", type=Path, metavar="FILE.csv", help="path, label: in place of the labels of DATA")
    made.add_argument(
        "--by",
        choices=("typical", "margin", "random"),
        help="typical: of each cluster; margin: where a probe on the labels hesitates; random: what to compare with "
        "(default: margin where two classes have labels, else typical)",
    )
    made.add_argument("--image-size", type=_size, help="pixels, N or HxW (default: the encoder's own)")


def _suggest(given: argparse.Namespace) -> None:
    place_of(given.data)
    _encoder_at(given.encoder)
    check_writable(given.out, file=True)
    from underpaint.console import say
    from underpaint.suggesting import suggest

    settings = {name: getattr(given, name) for name in ("count", "labels", "by", "image_size")}
    count = suggest(given.encoder, given.data, given.out, **settings)
    say(f"{given.out}: {count} images to label, the first one first")


def _tokenizer_takes(made: argparse.ArgumentParser) -> None:
    made.add_argument("data", help="images, as for pretrain")
    made.add_argument("--out", type=Path, required=True, help="a .safetensors file; a .json and a picture beside it")
    made.add_argument("--kind", default="kmeans", help="kmeans, fsq or vq")
    made.add_argument("--image-size", type=_size, default=(224, 224), help="pixels, N or HxW")
    made.add_argument("--stride", type=int, default=16, help="pixels of a word: the encoder's patch size")
    made.add_argument("--codebook-size", type=int, help="words (default: by the image size)")
    made.add_argument("--channels", type=int, default=3, help="of the images")
    made.add_argument("--minutes", type=float, help="of training, for fsq and vq (default: 5,000 steps)")
    made.add_argument("--groups", metavar="REGEX", help="as for pretrain, so that the same images are held out")
    made.add_argument("--seed", type=int, default=0, help="of everything random")


def _tokenizer(given: argparse.Namespace) -> None:
    place_of(given.data)
    check_writable(given.out, file=True)
    from underpaint.tokenize import Words, make_tokenizer

    words = Words(given.kind, given.image_size, given.stride, given.codebook_size, given.channels)
    make_tokenizer(given.data, given.out, words, minutes=given.minutes, groups=given.groups, seed=given.seed)


def _export_takes(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "encoder",
        metavar="RUN",
        help="a run, a folder of evaluate or that of one of its tasks, a file of weights, a Hugging Face folder, or timm:NAME",
    )
    told = "; ".join(f"{name}: {each.line}" for name, each in FORMATS.items())
    made.add_argument("--to", required=True, choices=FORMATS, help=told)
    made.add_argument("--out", type=Path, required=True, help="a folder; an export that is there is replaced")


def _export(given: argparse.Namespace) -> None:
    _encoder_at(given.encoder)
    require(given.to, given.out)
    from underpaint.exporting.export import export

    export(given.encoder, given.to, given.out)


def _report_takes(made: argparse.ArgumentParser) -> None:
    made.add_argument("run_folder", metavar="RUN|DIR", type=Path)


def _report(given: argparse.Namespace) -> None:
    if not any((given.run_folder / name).is_file() for name in ("compare.json", "results.json", "predictions.json")):
        _run_at(given.run_folder)
    from underpaint.report import write_report

    print(write_report(given.run_folder))


def _watch_takes(made: argparse.ArgumentParser) -> None:
    made.add_argument("run_folder", metavar="RUN", type=Path)


def _watch(given: argparse.Namespace) -> None:
    from underpaint.console import say
    from underpaint.report import watch

    say(watch(given.run_folder))


def _check_takes(made: argparse.ArgumentParser) -> None:
    made.add_argument("data", help="images, as for pretrain")
    made.add_argument("--out", type=Path, help="a folder: sheets of annotated and of alike images, and all as JSON")
    for name in ("groups", "masks"):
        _add_flag(made, name, declaration(f"data.{name}"))


def _check(given: argparse.Namespace) -> None:
    place_of(given.data)
    if given.out is not None:
        refuse_inside(given.out, given.data)
        check_writable(given.out)
    from underpaint.console import printable, say
    from underpaint.data import examine, format_check, format_found, open_source

    asked = {name: getattr(given, name) for name in ("groups", "masks") if hasattr(given, name)}
    source = open_source(given.data, **asked)
    say(format_found(source))
    print(printable(format_check(examine(source, out=given.out), notes=False)))


def _methods(_: argparse.Namespace) -> None:
    for name, listed in LISTED.items():
        print(f"{name:<10} {listed[1]}")


def _recipes(_: argparse.Namespace) -> None:
    from underpaint.recipes import RECIPES

    for name, recipe in RECIPES.items():
        print(f"{name:<26} {(recipe.__doc__ or '').strip().splitlines()[0]}")


COMMANDS = {
    "demo": _Command(
        "pretrain, judge and report on crops of photographs, no download", "demo --out runs/demo", _demo_takes, _demo
    ),
    "pretrain": _Command(
        "pretrain an encoder on a folder of images, with what suits them, this machine and the time; go on where the run "
        "exists",
        "pretrain photos/ --out runs/first --minutes 30",
        _pretrain_takes,
        _pretrain,
    ),
    "restore": _Command(
        "a picture: original, corrupted, restored",
        "restore runs/first a.jpg b.jpg --out sheet.png",
        _restore_takes,
        _restore,
    ),
    "score": _Command(
        "rank images by energy or restoration error", "score runs/first photos/ --out scores.csv", _score_takes, _score
    ),
    "compare": _Command(
        "several methods under the same wall-clock on your images, then one table and one page",
        "compare photos/ --methods mae,energy --minutes 30 --image-size 64 --patch-size 8 --out runs/which",
        _compare_takes,
        _compare,
    ),
    "evaluate": _Command(
        "what an encoder is worth on your annotated images, beside the same one untrained",
        "evaluate runs/first --data labelled/ --task knn,linear --out runs/worth",
        _evaluate_takes,
        _evaluate,
    ),
    "predict": _Command(
        "use a trained classifier, segmenter or detector",
        "predict runs/worth/finetune photos/ --out predicted",
        _predict_takes,
        _predict,
    ),
    "embed": _Command(
        "a feature vector an image", "embed runs/first photos/ --out vectors.parquet", _embed_takes, _embed
    ),
    "explore": _Command(
        "your images on a map by what an encoder sees: neighbours, clusters, odd ones, near-duplicates",
        "explore runs/first photos/ --out seen",
        _explore_takes,
        _explore,
    ),
    "suggest": _Command(
        "which images to label first",
        "suggest runs/first photos/ --count 100 --out to-label.csv",
        _suggest_takes,
        _suggest,
    ),
    "tokenizer": _Command(
        "fit or train a tokenizer: images to and from visual words",
        "tokenizer photos/ --kind kmeans --image-size 64 --stride 8 --out words.safetensors",
        _tokenizer_takes,
        _tokenizer,
    ),
    "export": _Command(
        "an encoder, or what evaluate trained, for timm, transformers, ONNX or TorchScript, with a model card",
        "export runs/first --to timm --out exported",
        _export_takes,
        _export,
    ),
    "watch": _Command(
        "where a run stands, in one line: step, speed, loss, probe, verdict so far, time left",
        "watch runs/first",
        _watch_takes,
        _watch,
    ),
    "report": _Command(
        "write the HTML page of a run, an evaluation, a comparison or predictions",
        "report runs/first",
        _report_takes,
        _report,
    ),
    "check": _Command(
        "what would be read, and how it was understood; no training", "check photos/", _check_takes, _check
    ),
    "methods": _Command("the pretraining methods, a line each", "methods", lambda made: None, _methods),
    "recipes": _Command("the shipped recipes, a line each", "recipes", lambda made: None, _recipes),
}


def parser() -> argparse.ArgumentParser:
    """The parser of every command; each command's function is its `run` default."""
    top = _Parser(prog="underpaint", description=underpaint.__doc__)
    top.add_argument("--version", action="version", version=underpaint.__version__)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (text, example, takes, run) in COMMANDS.items():
        made = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"example: underpaint {example}",
            formatter_class=_Help,
        )
        takes(made)
        made.set_defaults(run=run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Exit status: 0 done; 2 usage or input; 3 stopped by what it met; 128 + signal where interrupted."""
    try:
        with answered_signals():
            given = parser().parse_args(arguments)
            given.run(given)
        return 0
    except InputError as error:
        print(f"underpaint: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Stopped as error:
        print(f"underpaint: {' '.join(str(error).split())}", file=sys.stderr)
        return 3
    except OSError as error:  # a full disk, say, where nobody knew better
        place = f"{error.filename}: " if error.filename else ""
        print(f"underpaint: {place}{error.strerror or error}", file=sys.stderr)
        return 3
    except Interrupted as interruption:
        requeue(interruption)
        kept = f"; {interruption.kept}: the same command goes on" if interruption.kept else ""
        print(f"underpaint: interrupted{kept}", file=sys.stderr)
        return 128 + interruption.signal_number


if __name__ == "__main__":
    sys.exit(main())
