"""One look for every plot: colours that survive colour blindness, labelled axes, text that follows the page.

A plot is SVG to put inside a page, marked as such, written here and not by matplotlib, whose plot takes a tenth of a second:
the page of a run is written anew beside each checkpoint. Its text and axes are `currentColor`, so that they turn light
where the page turns dark, and its background is transparent. What the page's script shows where a pointer is, lies in
`data-lines`.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

# Okabe and Ito 2008, without black (the page's own colour) and yellow (invisible on white), darkest first; a dark page
# gives another blue
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# the second way to tell lines apart, for readers and printers without colour: paths around a point
MARKERS = (
    "m-2.2 0a2.2 2.2 0 1 0 4.4 0a2.2 2.2 0 1 0-4.4 0z",
    "m-2-2h4v4h-4z",
    "m0-2.6l2.6 4.6h-5.2z",
    "m0-2.8l2.8 2.8l-2.8 2.8l-2.8-2.8z",
    "m0 2.6l2.6-4.6h-5.2z",
    "m-.8-2.4h1.6v1.6h1.6v1.6h-1.6v1.6h-1.6v-1.6h-1.6v-1.6h1.6z",
)
WIDE = (346, 223)  # pixels, at which text has 10: on a phone's 350 px nothing shrinks
SMALL = (202, 137)
POINTS = 300  # a line: more cannot be told apart on a screen
MARKED = 30  # points of a line, up to which each has a marker
LETTER = 0.56  # width of a letter, over its height, about
Number = float | int
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)  # between ticks, times a power of ten


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    - `name`: what the legend says.
    - `x`, `y`: as many numbers each; a `y` that is not finite leaves a gap.
    - `error`: one standard error a point, drawn as a band; a value that is not finite draws none.
    """

    name: str
    x: Sequence[Number]
    y: Sequence[Number]
    error: Sequence[Number] | None = None


@dataclass(frozen=True)
class Dot:
    """One row of a dot plot: a value with one standard error; what is not `full` is drawn hollow."""

    name: str
    value: Number
    error: Number
    full: bool = True


class Frame:
    """The axes of a plot: from numbers to pixels, and what is written around them."""

    def __init__(
        self,
        size: tuple[int, int],
        x: tuple[Number, Number],
        y: tuple[Number, Number],
        labels: tuple[str, str, str],
        legend: Sequence[tuple[str, str]] = (),
        rows: Sequence[str] = (),
        factors: Sequence[Number] = (),
    ):
        """`x`, `y`: the least and the largest number; `labels`: title, of x, of y; `legend`: names with what draws their
        sample; `rows`: names along y in place of numbers; `factors`: ticks along x, of which equal factors are equally far
        apart, and `x` holds logarithms."""
        self.size, self.x, self.y = size, x, y
        self.scale = math.log10 if factors else float
        small = size[0] < WIDE[0]
        self.text = 9 if small else 10
        most = 4 if small else 6
        self.ticks = factors or ticks(*x, most, whole=not rows), [] if rows else ticks(*y, most)
        self.title, self.labels, self.rows = labels[0], labels[1:], rows
        lines = self._wrapped(legend)
        wide = max((len(text) for text in (*rows, *map(number_text, self.ticks[1]))), default=0)
        self.left = 8 + LETTER * self.text * wide + (0 if rows else self.text + 6)
        self.right, self.top = size[0] - 8, self.text + 12
        self.height = size[1] + (self.text + 5) * max(0, len(lines))
        self.bottom = size[1] - 2 * self.text - 14
        self.parts: list[str] = []
        self._axes()
        self._legend(lines)

    def at_x(self, value: Number) -> float:
        low, high = self.x
        return self.left + (self.scale(value) - low) / (high - low) * (self.right - self.left)

    def at_y(self, value: Number) -> float:
        low, high = self.y
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def add(self, path: str, style: str) -> None:
        """A path in pixels; nothing where it is empty."""
        if path:
            self.parts.append(f'<path d="{path}" {style}/>')

    def write(self, x: Number, y: Number, text: str, style: str = "") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}"{style}>{escape(text)}</text>')

    def _wrapped(self, legend: Sequence[tuple[str, str]]) -> list[list[tuple[float, str, str]]]:
        """Lines of samples with their names, each with where it begins."""
        lines: list[list[tuple[float, str, str]]] = []
        x = math.inf
        for name, sample in legend:
            wide = 36 + LETTER * self.text * len(name)
            if x + wide > self.size[0] and (x > 4 or not lines):
                lines.append([])
                x = 4.0
            lines[-1].append((x, name, sample))
            x += wide
        return lines

    def _axes(self) -> None:
        small = self.text - 1
        self.write(2, self.text, self.title, ' font-weight="700"')
        xs = [(self.at_x(value), number_text(value)) for value in self.ticks[0]]
        ys = [(self.at_y(value), number_text(value)) for value in self.ticks[1]]
        ys += [(self.at_y(position), name) for position, name in enumerate(self.rows)]
        grid = "".join(f"M{x:.1f} {self.top}V{self.bottom}" for x, _ in xs)
        grid += "" if self.rows else "".join(f"M{self.left:.1f} {y:.1f}H{self.right}" for y, _ in ys)
        self.add(grid, 'stroke="currentColor" stroke-opacity=".15"')
        self.add(f"M{self.left:.1f} {self.top}V{self.bottom}H{self.right}", 'fill="none" stroke="currentColor"')
        for x, text in xs:
            self.write(x, self.bottom + small + 4, text, f' text-anchor="middle" font-size="{small}"')
        for y, text in ys:
            self.write(self.left - 5, y + small / 3, text, f' text-anchor="end" font-size="{small}"')
        middle = (self.left + self.right) / 2
        self.write(middle, self.bottom + 2 * self.text + 8, self.labels[0], ' text-anchor="middle"')
        x, y = self.text + 1, (self.top + self.bottom) / 2
        if self.labels[1]:
            self.write(x, y, self.labels[1], f' text-anchor="middle" transform="rotate(-90 {x:.1f} {y:.1f})"')

    def _legend(self, lines: Sequence[Sequence[tuple[float, str, str]]]) -> None:
        for row, line in enumerate(lines):
            y = self.size[1] + (self.text + 5) * row + self.text / 2
            for x, name, sample in line:
                self.parts.append(sample.format(x=x, middle=x + 9, end=x + 18, y=y))
                self.write(x + 23, y + self.text / 3, name, f' font-size="{self.text - 1}"')

    def svg(self, hover: object = None) -> Markup:
        """The element; without a namespace, which only HTML understands."""
        told = json.dumps(hover, separators=(",", ":")).replace("&", "&amp;").replace("<", "&lt;").replace("'", "&#39;")
        told = "" if hover is None else f" tabindex=\"0\" data-lines='{told}'"
        return Markup(
            f'<svg class="plot" role="img" viewBox="0 0 {self.size[0]} {self.height}" font-size="{self.text}" '
            f'fill="currentColor" aria-label="{escape(self.title)}"{told}>{"".join(self.parts)}</svg>'
        )


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
    moment: Callable[[Number], str] | None = None,
) -> Markup:
    """Lines over a shared axis, as SVG text for inlining.

    - `series`: the lines; their names make a legend where there are two, or a baseline.
    - `x_label`, `y_label`: what the axes hold, with the unit.
    - `title`: what is seen; it is also read to those who do not see it.
    - `baseline`: what the lines are to be judged against, dashed; a single point is drawn across the plot.
    - `small`: for plots that stand beside a large one.
    - `from_zero`: the axis of `y` starts at 0, for quantities whose zero means something.
    - `log`: equal steps along `x` are equal factors; the ticks are where points are.
    - `moment`: what is said of an `x` where a pointer is; its number where None.
    """
    lines = [thin(line) for line in series]
    base = None if baseline is None else thin(baseline)
    across = base is not None and len(base.y) == 1
    drawn = [(colour_of(k), line) for k, line in enumerate(lines)]
    drawn += [] if base is None else [("currentColor", base)]
    xs = [value for _, line in drawn if not (across and line is base) for value in line.x]
    ys = [edge for _, line in drawn for edge in edges(line)]
    legend = [(line.name, sample_of(k)) for k, line in enumerate(lines)]
    legend += [] if base is None else [(base.name, f'<path d="M{{x}} {{y}}H{{end}}" {dashed()}/>')]
    factors = sorted({float(value) for value in xs}) if log else []
    frame = Frame(
        SMALL if small else WIDE,
        span([math.log10(value) for value in factors] if log else xs, margin=0.02, zero=not log),
        span(ys, margin=0.05, zero=from_zero),
        (title, x_label, y_label),
        legend if len(legend) > 1 else (),
        factors=factors,
    )
    if base is not None:
        _draw_baseline(frame, base)
    for k, line in enumerate(lines):
        _draw(frame, line, k)
    return frame.svg(_hover(frame, drawn, moment, x_label))


def _hover(
    frame: Frame, drawn: Sequence[tuple[str, Line]], moment: Callable[[Number], str] | None, x_label: str
) -> dict[str, object]:
    """What the script needs: pixels and numbers of every line, and what is said of each `x`."""
    lines = []
    for colour, line in drawn:
        known = [k for k, y in enumerate(line.y) if math.isfinite(y) and math.isfinite(line.x[k])]
        x = [line.x[k] for k in known]
        lines.append(
            {
                "name": line.name,
                "colour": colour,
                "x": [round(frame.at_x(value), 1) for value in x],
                "y": [round(frame.at_y(line.y[k]), 1) for k in known],
                "value": [value_text(line.y[k], line.error[k] if line.error else math.nan) for k in known],
                "said": [moment(value) if moment else f"{x_label} {number_text(value)}" for value in x],
            }
        )
    for k, line in enumerate(lines):  # said once, where all have the same moments
        if k and line["x"] == lines[0]["x"]:
            del line["x"], line["said"]
    return {"top": frame.top, "bottom": frame.bottom, "lines": lines}


def dot_plot(dots: Sequence[Dot], *, x_label: str, title: str, baseline: Number | None = None) -> Markup:
    """A value a row with its standard error, the first on top, as SVG text; `baseline` is a dashed line across."""
    ends = [dot.value + sign * dot.error for dot in dots for sign in (-1, 1)]
    frame = Frame(
        (WIDE[0], 66 + 23 * len(dots)),
        span([0.0, *ends, *([] if baseline is None else [baseline])], margin=0.05, zero=True),
        (len(dots) - 0.5, -0.5),
        (title, x_label, ""),
        rows=[dot.name for dot in dots],
    )
    if baseline is not None:
        frame.add(f"M{frame.at_x(baseline):.1f} {frame.top}V{frame.bottom}", dashed())
    for position, dot in enumerate(dots):
        y, x = frame.at_y(position), frame.at_x(dot.value)
        low, high = frame.at_x(dot.value - dot.error), frame.at_x(dot.value + dot.error)
        colour = colour_of(0) if dot.full else "currentColor"
        bars = f"M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 3:.1f}v6M{high:.1f} {y - 3:.1f}v6"
        frame.add(bars, f'stroke="{colour}" stroke-width="1.5"')
        mark, fill = (MARKERS[0], colour) if dot.full else (MARKERS[1], "none")
        frame.add(f"M{x:.1f} {y:.1f}{mark}", f'fill="{fill}" stroke="{colour}" stroke-width="1.5"')
    return frame.svg()


# -- lines -----------------------------------------------------------------------------------------------------------


def _draw(frame: Frame, line: Line, number: int) -> None:
    """A line with its band of one standard error to both sides; a few points are also marked."""
    colour = colour_of(number)
    points = [(frame.at_x(x), frame.at_y(y)) for x, y in zip(line.x, line.y, strict=True)]
    if line.error is not None:
        for run in runs([math.isfinite(y + e) for y, e in zip(line.y, line.error, strict=True)]):
            above = [(points[k][0], frame.at_y(line.y[k] + line.error[k])) for k in run]
            below = [(points[k][0], frame.at_y(line.y[k] - line.error[k])) for k in reversed(run)]
            frame.add(f"{path_of([*above, *below])}z", f'fill="{colour}" fill-opacity=".2"')
    whole = list(runs([math.isfinite(y) for y in line.y]))
    path = "".join(path_of([points[k] for k in run]) for run in whole)
    frame.add(path, f'fill="none" stroke="{colour}" stroke-width="1.6"')
    # a point between two gaps has no line to be seen by
    alone = len(points) <= MARKED or all(len(run) == 1 for run in whole)
    marked = "".join(f"M{points[k][0]:.1f} {points[k][1]:.1f}{marker_of(number)}" for run in whole for k in run)
    frame.add(marked if alone else "", f'fill="{colour}"')


def _draw_baseline(frame: Frame, line: Line) -> None:
    """A dashed line in the colour of the text; a single point goes across the plot, band and all."""
    if len(line.y) != 1:
        kept = runs([math.isfinite(y) for y in line.y])
        points = [(frame.at_x(x), frame.at_y(y)) for x, y in zip(line.x, line.y, strict=True)]
        frame.add("".join(path_of([points[k] for k in run]) for run in kept), f'fill="none" {dashed()}')
        return
    middle, error = line.y[0], line.error[0] if line.error else math.nan
    if math.isfinite(middle) and math.isfinite(error):
        high, low = frame.at_y(middle + error), frame.at_y(middle - error)
        band = f"M{frame.left:.1f} {high:.1f}H{frame.right}V{low:.1f}H{frame.left:.1f}z"
        frame.add(band, 'fill="currentColor" fill-opacity=".1"')
    if math.isfinite(middle):
        frame.add(f"M{frame.left:.1f} {frame.at_y(middle):.1f}H{frame.right}", dashed())


def colour_of(number: int) -> str:
    """Of a line; the one colour too dark for a dark page is one that such a page may change."""
    colour = PALETTE[number % len(PALETTE)]
    return f"var(--blue, {colour})" if colour == PALETTE[0] else colour


def marker_of(number: int) -> str:
    return MARKERS[number % len(MARKERS)]


def sample_of(number: int) -> str:
    """A line with its marker for the legend, to be put in its place."""
    colour = colour_of(number)
    drawn = f'<path d="M{{x}} {{y}}H{{end}}" stroke="{colour}" stroke-width="1.6"/>'
    return f'{drawn}<path d="M{{middle}} {{y}}{marker_of(number)}" fill="{colour}"/>'


def dashed() -> str:
    return 'stroke="currentColor" stroke-width="1.2" stroke-dasharray="4 3"'


def path_of(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def runs(known: Sequence[bool]) -> list[list[int]]:
    """The positions of what is known, in pieces without a gap."""
    made: list[list[int]] = []
    for position, one in enumerate(known):
        if one and position and known[position - 1]:
            made[-1].append(position)
        elif one:
            made.append([position])
    return made


def edges(line: Line) -> list[float]:
    """How far a line and its band reach along `y`."""
    errors = line.error or [math.nan] * len(line.y)
    pairs = [(y, error if math.isfinite(error) else 0.0) for y, error in zip(line.y, errors, strict=True)]
    return [float(y + sign * error) for y, error in pairs for sign in (-1, 1)]


def span(values: Sequence[Number], margin: float, zero: bool = False) -> tuple[float, float]:
    """From the least to the largest finite value with a margin on both sides; with `zero`, from 0 where all lie above."""
    finite = [float(value) for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if zero:
        low = min(low, 0.0)
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        beside = abs(low) / 20 or 1.0
        low, high = (low if zero else low - beside), high + beside
    wide = margin * (high - low)
    return (low if zero and low == 0 else low - wide), high + wide


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """At most `most` + 1 round numbers from `low` to `high`, evenly apart; `whole` ones where these are enough."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * step for step in STEPS if power * step >= rough * (1 - 1e-9))
    if whole and high - low > 1.5:
        step = float(math.ceil(step - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step + 0.0 for number in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(line: Line, points: int = POINTS) -> Line:
    """The line with at most `points` points, each the mean of its neighbours' finite values."""
    if len(line.y) <= points:
        return line
    parts = np.array_split(np.arange(len(line.y)), points)

    def means(values: Sequence[Number]) -> list[float]:
        array = np.asarray(values, dtype=float)
        finite = [part[np.isfinite(array[part])] for part in parts]
        return [float(array[part].mean()) if len(part) else math.nan for part in finite]

    return Line(line.name, means(line.x), means(line.y), None if line.error is None else means(line.error))


def number_text(value: Number) -> str:
    """A number as an axis shows it: 12000 is 12k, 0.00015 stays plain, nothing needs a legend of powers."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.4g}{name}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def value_text(value: Number, error: Number) -> str:
    """A number where a pointer is, with its error where that is known."""
    return f"{number_text(value)} ± {number_text(float(f'{error:.2g}'))}" if error > 0 else number_text(value)
