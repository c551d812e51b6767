"""Numbers and names as a reader sees them.

An em dash for a missing value, a true minus sign, thin spaces between thousands.
"""

from __future__ import annotations

from collections.abc import Callable
from math import floor, log10

MISSING = "—"
_THIN = "\u202f"
_UNSEEN = [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
"""Marks that turn the reading direction of what follows, and halves of surrogate pairs, which UTF-8 cannot write."""
_STAND_INS = (
    {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"}
    | {0x7F: "\u2421"}
    | dict.fromkeys([*range(0x80, 0xA0), *_UNSEEN], "\ufffd")
)
TEXTS = {
    "held_out": "held-out conversations",
    "held_out_text": "held-out free text of the teacher",
    "natural": "natural text",
}
"""What fidelity is measured on, in the order of the tables."""


def benchmark_name(benchmark: str) -> str:
    """A text in words, a task by its own name."""
    return TEXTS.get(benchmark, benchmark)


def printable(text: str) -> str:
    """Each control character and mark of direction as one visible character; lines, tabs and all else stay."""
    return text.translate(_STAND_INS)


def count(value: float | None) -> str:
    """1234567 → "1 234 567"."""
    return MISSING if value is None else f"{round(value):,}".replace(",", _THIN).replace("-", "−")


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant figures, trailing zeros kept: 0.61 → "0.610"."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return count(value)
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    decimals = max(0, digits - 1 - floor(log10(abs(value))))
    return f"{value:.{decimals}f}".replace("-", "−")


def uncertain(value: float | None, half_width: float | None) -> str:
    """The value with no more decimals than its interval has with two significant figures: "0.223 ± 0.048"."""
    if value is None or not half_width:
        return number(value)
    decimals = max(0, 1 - floor(log10(half_width)))
    return f"{value:.{decimals}f} ± {half_width:.{decimals}f}".replace("-", "−")


def tick(value: float) -> str:
    """A label on an axis: no more digits than needed."""
    return count(value) if abs(value) >= 1000 else f"{value:.6g}".replace("-", "−")


def percent(share: float | None) -> str:
    """0.661 → "66.1 %"."""
    return MISSING if share is None else f"{100 * share:.1f}{_THIN}%".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    if value is None:
        return MISSING
    return number(value, digits) if value <= 0 else f"+{number(value, digits)}"


def points(share: float | None) -> str:
    """A difference of shares in percentage points: −0.06 → "−6.0"."""
    if share is None:
        return MISSING
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}×"


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return MISSING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f}{_THIN}B" if unit == "B" else f"{value:.1f}{_THIN}{unit}"
        value /= 1024
    raise AssertionError("unreachable: the last unit always returns")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f}{_THIN}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{_THIN}h {minutes}{_THIN}min" if hours else f"{minutes}{_THIN}min {rest}{_THIN}s"


def p_value(p: float | None) -> str:
    if p is None:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def interval(low: float | None, high: float | None, show: Callable[[float], str] = number) -> str:
    """ "[low, high]", or an em dash where there is none."""
    return MISSING if low is None or high is None else f"[{show(low)}, {show(high)}]"
