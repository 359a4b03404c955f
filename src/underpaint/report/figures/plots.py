"""One look for every plot: colours that survive colour blindness, labelled axes, text that follows the page.

A plot is SVG to put inside a page, marked as such. Its text and axes are `currentColor`, so that they turn light where
the page turns dark, and its background is transparent. What the page's script shows where a pointer is, lies in
`data-lines`.
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

# Okabe and Ito 2008, without black (the page's own colour) and yellow (invisible on white), darkest first.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = (
    "o",
    "s",
    "^",
    "D",
    "v",
    "P",
)  # the second way to tell lines apart, for readers and printers without colour
WIDE = (4.8, 3.1)  # inches: at 72 points an inch, 10-point text stays 10 px on a phone's 350 px
SMALL = (2.8, 1.9)  # inches
POINTS = 300  # a line: more cannot be told apart on a screen, and every point is 20 bytes of the page
FOREGROUND = "#010203"  # a colour nothing else uses; it becomes `currentColor`
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, copied and read aloud
    "svg.hashsalt": "underpaint",  # equal plots get equal bytes
    "font.size": 10,
    "text.color": FOREGROUND,
    "axes.labelcolor": FOREGROUND,
    "axes.edgecolor": FOREGROUND,
    "xtick.color": FOREGROUND,
    "ytick.color": FOREGROUND,
    "grid.color": FOREGROUND,
    "grid.alpha": 0.15,
    "axes.unicode_minus": True,
    "text.parse_math": False,  # a dollar in a name is a dollar
}


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    - `name`: what the legend says.
    - `x`, `y`: as many numbers each; a `y` that is not finite leaves a gap.
    - `error`: one standard error a point, drawn as a band; a value that is not finite draws none.
    """

    name: str
    x: Sequence[float | int]
    y: Sequence[float | int]
    error: Sequence[float | int] | None = None


def line_plot(
    series: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    title: str,
    baseline: Line | None = None,
    small: bool = False,
    from_zero: bool = False,
    log: bool = False,
    moment: Callable[[float | int], str] | None = None,
) -> Markup:
    """Lines over a shared axis, as SVG text for inlining.

    - `series`: the lines; their names make a legend where there are two, or a baseline.
    - `x_label`, `y_label`: what the axes hold, with the unit.
    - `title`: what is seen; it is also read to those who do not see it.
    - `baseline`: what the lines are to be judged against, dashed; a single point is drawn across the plot.
    - `small`: for plots that stand beside a large one.
    - `log`: equal steps along `x` are equal factors; the ticks are where points are.
    - `from_zero`: the axis of `y` starts at 0, for quantities whose zero means something.
    - `moment`: what is said of an `x` where a pointer is; its number where None.

    **Returns** an `<svg>` element without a namespace, which only HTML understands.
    """
    with matplotlib.rc_context({**STYLE, "font.size": 9 if small else 10}):
        figure = Figure(figsize=SMALL if small else WIDE, layout="constrained")
        axes = figure.add_subplot()
        lines = [(PALETTE[position % len(PALETTE)], thin(line)) for position, line in enumerate(series)]
        for position, (colour, line) in enumerate(lines):
            _draw(axes, line, colour, MARKERS[position % len(MARKERS)])
        if baseline is not None:
            lines.append((FOREGROUND, thin(baseline)))
            _draw_baseline(axes, lines[-1][1])
        axes.set_title(title, loc="left", fontsize="medium", fontweight="bold")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(FixedLocator(sorted({float(x) for line in series for x in line.x})))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4 if small else 6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4 if small else 6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True)
        if from_zero:
            axes.set_ylim(bottom=0)
        if axes.get_legend_handles_labels()[1] and (len(series) > 1 or baseline is not None):
            figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize="small")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return inline(buffer.getvalue(), title, _hover(axes, lines, moment or (lambda x: f"{x_label} {number_text(x)}")))


def _hover(axes: Any, drawn: Sequence[tuple[str, Line]], moment: Callable[[float | int], str]) -> dict[str, Any]:
    """What the script needs: places in the plot and numbers of every line, and what is said of each `x`."""
    height = axes.figure.get_figheight() * 72

    def places(x: Sequence[float | int], y: Sequence[float | int]) -> np.ndarray:
        at = axes.transData.transform(np.stack([np.asarray(x, float), np.asarray(y, float)], 1)) * 72 / axes.figure.dpi
        return np.nan_to_num(np.stack([at[:, 0], height - at[:, 1]], 1).round(1))

    lines = []
    for colour, line in drawn:
        known = [k for k, y in enumerate(line.y) if math.isfinite(y) and math.isfinite(line.x[k])]
        x, y = [line.x[k] for k in known], [line.y[k] for k in known]
        errors = [math.nan if line.error is None else line.error[k] for k in known]
        at = places(x, y)
        made: dict[str, Any] = {
            "name": line.name,
            "colour": colour.lower(),
            "x": at[:, 0].tolist(),
            "y": at[:, 1].tolist(),
        }
        made["value"] = [value_text(*pair) for pair in zip(y, errors, strict=True)]
        made["said"] = [moment(value) for value in x]
        if lines and made["x"] == lines[0]["x"]:  # said once, where all have the same moments
            del made["x"], made["said"]
        lines.append(made)
    (_, bottom), (_, top) = axes.bbox.get_points() * 72 / axes.figure.dpi
    return {"top": round(height - top, 1), "bottom": round(height - bottom, 1), "lines": lines}


@dataclass(frozen=True)
class Dot:
    """One row of a dot plot: a value with one standard error; what is not `full` is drawn hollow."""

    name: str
    value: float
    error: float
    full: bool = True


def dot_plot(dots: Sequence[Dot], *, x_label: str, title: str, baseline: float | None = None) -> Markup:
    """A value a row with its standard error, the first on top, as SVG text; `baseline` is a dashed line across."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDE[0], 0.9 + 0.32 * len(dots)), layout="constrained")
        axes = figure.add_subplot()
        for position, dot in enumerate(dots):
            axes.errorbar(
                dot.value,
                position,
                xerr=dot.error,
                fmt="o" if dot.full else "s",
                color=PALETTE[0] if dot.full else FOREGROUND,
                markerfacecolor=None if dot.full else "none",
                markersize=6,
                elinewidth=1.6,
                capsize=3,
            )
        if baseline is not None:
            axes.axvline(baseline, color=FOREGROUND, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.set_yticks(range(len(dots)), [dot.name for dot in dots])
        axes.set_ylim(len(dots) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_title(title, loc="left", fontsize="medium", fontweight="bold")
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="x")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return inline(buffer.getvalue(), title)


def _draw(axes, line: Line, colour: str, marker: str) -> None:
    """A line with its band of one standard error to both sides; a few points are also marked."""
    x, y = np.asarray(line.x, dtype=float), np.asarray(line.y, dtype=float)
    # a point between two gaps has no line to be seen by
    alone = len(y) <= 30 or not np.isfinite(y[1:] + y[:-1]).any()
    axes.plot(x, y, color=colour, linewidth=1.6, marker=marker if alone else "", markersize=4, label=line.name)
    if line.error is not None:
        error = np.asarray(line.error, dtype=float)
        axes.fill_between(x, y - error, y + error, color=colour, alpha=0.2, linewidth=0)


def _draw_baseline(axes, line: Line) -> None:
    """A dashed line in the colour of the text; a single point goes across the plot, band and all."""
    style = {"color": FOREGROUND, "linestyle": (0, (4, 3)), "linewidth": 1.2, "label": line.name}
    if len(line.y) == 1 and math.isfinite(line.y[0]):
        axes.axhline(line.y[0], **style)
        if line.error is not None and math.isfinite(line.error[0]):
            low, high = line.y[0] - line.error[0], line.y[0] + line.error[0]
            axes.axhspan(low, high, color=FOREGROUND, alpha=0.1, linewidth=0)
    elif len(line.y) > 1:
        axes.plot(line.x, line.y, **style)


def thin(line: Line, points: int = POINTS) -> Line:
    """The line with at most `points` points, each the mean of its neighbours' finite values."""
    if len(line.y) <= points:
        return line
    parts = np.array_split(np.arange(len(line.y)), points)

    def means(values: Sequence[float | int]) -> list[float]:
        array = np.asarray(values, dtype=float)
        finite = [part[np.isfinite(array[part])] for part in parts]
        return [float(array[part].mean()) if len(part) else math.nan for part in finite]

    return Line(line.name, means(line.x), means(line.y), None if line.error is None else means(line.error))


def number_text(value: float | int) -> str:
    """A number as an axis shows it: 12000 is 12k, 0.00015 stays plain, nothing needs a legend of powers."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.4g}{name}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def value_text(value: float | int, error: float | int) -> str:
    """A number where a pointer is, with its error where that is known."""
    return f"{number_text(value)} ± {number_text(float(f'{error:.2g}'))}" if error > 0 else number_text(value)


def inline(svg: str, title: str, hover: dict[str, Any] | None = None) -> Markup:
    """Matplotlib's SVG file as an element of a page: in the page's colour and font, with names of its own. `hover` is what
    the page's script shows of it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)  # matplotlib repeats each text in a comment
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    told = json.dumps(hover, separators=(",", ":")).replace("&", "&amp;").replace("<", "&lt;").replace("'", "&#39;")
    told = "" if hover is None else f""" tabindex="0" data-lines='{told}'"""
    svg = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 system-ui, sans-serif", svg)  # matplotlib 3.10
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # matplotlib 3.11
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, flags=re.DOTALL)  # it would style the whole page
    # several plots share a page, and matplotlib calls the first axes of each `axes_1`
    name = hashlib.sha256((title + svg).encode()).hexdigest()[:8]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="p{name}-\1"', svg)
    svg = re.sub(r'href="#', f'href="#p{name}-', svg)
    svg = svg.replace("url(#", f"url(#p{name}-")
    # the style sheet gives the size, so that a plot shrinks with its column
    svg = re.sub(
        r'<svg[^>]*?viewBox="([^"]+)"[^>]*>', r'<svg class="plot" role="img" viewBox="\1" HOVER>', svg, count=1
    )
    svg = svg.replace(">", f"><title>{escape(title)}</title>", 1).replace(" HOVER>", f"{told}>", 1)
    # the one colour too dark for a dark page, which may give another
    svg = svg.replace(FOREGROUND, "currentColor").replace(PALETTE[0].lower(), f"var(--blue, {PALETTE[0]})")
    return Markup(svg.strip())
