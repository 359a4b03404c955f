"""Numbers and lists as pages, tables and verdicts say them."""

import json
import math
from collections.abc import Callable, Sequence

TEXT_CHARACTERS = 60_000  # of a recipe or an environment
NONE = "–"  # where a table has no number
UNEQUAL = 1.05  # of minutes: where one method's are more than this times another's, they are not called the same


def plain_text(value: object) -> str:
    """A value as one would write it, cut where it is very long: text as it is, the rest as JSON."""
    return cut(value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False), 2000)


def cut(text: str, length: int = TEXT_CHARACTERS) -> str:
    """The text, or its beginning where it is too long for a page."""
    return text if len(text) <= length else f"{text[:length]}\n... ({len(text) - length} more characters)"


def listing(names: Sequence[str], joined: str = "and") -> str:
    """Names in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {joined} {names[-1]}"


def capital(sentence: str) -> str:
    """A sentence with its first letter large, the rest as it is."""
    return sentence[:1].upper() + sentence[1:]


def short(value: float) -> str:
    """A loss in three digits."""
    return (f"{value:#.3g}".rstrip(".") if 1e-3 <= abs(value) < 1e3 else f"{value:.3g}").replace("-", "−")


def signed(value: float) -> str:
    """A number with its sign, to one decimal."""
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")  # + 0.0: no minus before a zero


def with_error(value: str, error: float, digits: int) -> str:
    """A number with its standard error, where that is known."""
    return f"{value} ± {error:.{digits}f}" if math.isfinite(error) else value


def percent_text(value: float, error: float = math.nan) -> str:
    """A share as percent, without the sign of percent."""
    return with_error(f"{100 * value:.1f}", 100 * error, 1) if math.isfinite(value) else NONE


def points_text(value: float, error: float = math.nan) -> str:
    """A difference of shares in percentage points, without their name."""
    return with_error(signed(100 * value), 100 * error, 1) if math.isfinite(value) else NONE


def decimal_text(value: float, error: float = math.nan, digits: int = 3, sign: str = "") -> str:
    """A number in so many decimals; with its sign where `sign` is "+"."""
    return with_error(f"{value:{sign}.{digits}f}".replace("-", "−"), error, digits) if math.isfinite(value) else NONE


def figure_text(value: float, error: float = math.nan, sign: str = "") -> str:
    """A number of any size in four figures, or in as many as its error lets stand; with its sign where `sign` is "+"."""
    digits = [1 - math.floor(math.log10(error))] if error > 0 and math.isfinite(error) else []
    digits += [3 - math.floor(math.log10(abs(value)))] if value and math.isfinite(value) else []
    return decimal_text(value, error, max(0, min(digits, default=0)), sign)


def count_text(value: float | int) -> str:
    """A count with its thousands apart; nothing where it is not known."""
    return f"{value:,.0f}".replace(",", "\u202f") if math.isfinite(value) else ""


def time_text(seconds: float | int) -> str:
    """A duration in its two largest units; nothing where it is not known."""
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
