"""Numbers and sentences as a page shows them."""

import json
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

TEXT_CHARACTERS = 60_000  # of a recipe or an environment


def sentence_html(text: str) -> str:
    """An escaped sentence, what stood in backticks as code, no line broken within a number and its error."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text)).replace(" ± ", "\u00a0±\u00a0")


def text_at(mapping: dict, section: str, key: str) -> str:
    """A setting of a section as text; a section may also be its own name."""
    value = mapping.get(section)
    value = value.get(key) if isinstance(value, dict) else value
    return "" if value is None else str(value)


def plain_text(value: Any) -> str:
    """A value as one would write it: text as it is, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def cut(text: str, length: int = TEXT_CHARACTERS) -> str:
    """The text, or its beginning where it is too long for a page."""
    return text if len(text) <= length else f"{text[:length]}\n... ({len(text) - length} more characters)"


def short(value: float) -> str:
    """A loss in three digits."""
    return (f"{value:#.3g}".rstrip(".") if 1e-3 <= abs(value) < 1e3 else f"{value:.3g}").replace("-", "−")


def signed(value: float) -> str:
    """A number with its sign, to one decimal."""
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")  # + 0.0: no minus before a zero


def percent_text(value: float, error: float) -> str:
    """A share as percent, with its standard error where it is known."""
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if math.isfinite(error) else "")


def points_text(value: float, error: float) -> str:
    """A difference of shares in percentage points, with its standard error where it is known."""
    if not math.isfinite(value):
        return "–"
    return signed(100 * value) + (f" ± {100 * error:.1f}" if math.isfinite(error) else "")


def count_text(value: float | int) -> str:
    """A count with its thousands apart; nothing where it is not known."""
    return f"{value:,.0f}".replace(",", "\u202f") if math.isfinite(value) else ""


def time_text(seconds: float) -> str:
    """A duration in its two largest units."""
    if not math.isfinite(seconds):
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def span_text(values: Sequence[float], text: Callable[[float], str]) -> str:
    """Several numbers as one, or from the smallest to the largest where their texts differ."""
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"
