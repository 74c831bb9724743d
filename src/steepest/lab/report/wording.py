"""Numbers and names as a reader sees them."""

from __future__ import annotations

from collections.abc import Sequence

from steepest.lab.report.statistics import Interval, Ratio, Summary
from steepest.lab.tasks.task import DataIdentity

DASH = "\N{EN DASH}"
GREATER = "\N{GREATER-THAN OR EQUAL TO}"
MINUS = "\N{MINUS SIGN}"
FIXED = "\N{NO-BREAK SPACE}"
NARROW = "\N{NARROW NO-BREAK SPACE}"


def plain(name: str) -> str:
    """A name in which every control and invisible character shows, so that none can rearrange the text around it."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in name)


def shortened(name: str, *, length: int = 20) -> str:
    """A plain name cut to what fits beside a curve."""
    text = plain(name)
    return text if len(text) <= length else f"{text[: length - 1]}\N{HORIZONTAL ELLIPSIS}"


def possessive(name: str) -> str:
    """A plain name in the genitive."""
    return f"{plain(name)}\N{RIGHT SINGLE QUOTATION MARK}s"


def listed(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def counted(number: int, noun: str) -> str:
    """ "1 run", "2 runs", "1,000 runs"."""
    return f"{number:,}{FIXED}{noun}{'' if number == 1 else 's'}"


def loss(value: float, *, like: float | None = None) -> str:
    """A loss, or the size of a difference: three decimals, more for small ones, or as many as `like` has."""
    size = abs(value if like is None else like)
    if size == 0 or 0.1 <= size < 1000:
        return f"{value:.3f}"
    return f"{value:.4f}" if 0.001 <= size < 0.1 else f"{value:.2g}"


def signed(value: float, *, like: float | None = None) -> str:
    """A difference of losses with its sign, such as "+0.021"."""
    return f"{'+' if value > 0 else MINUS if value < 0 else ''}{loss(abs(value), like=like)}"


def spread(summary: Summary | None) -> str:
    """Mean and standard deviation, such as "1.731 ± 0.012"."""
    if summary is None:
        return DASH
    if summary.sd is None:
        return loss(summary.mean)
    return f"{loss(summary.mean)}{FIXED}±{FIXED}{loss(summary.sd, like=summary.mean)}"


def between(interval: Interval) -> str:
    """The ends of an interval, such as "0.103 to 0.124"; with signs where it does not lie above 0."""
    write, like = loss if interval.low > 0 else signed, scale(interval)
    return f"{write(interval.low, like=like)} to {write(interval.high, like=like)}"


def scale(interval: Interval) -> float:
    """The size by which the ends of an interval, and what lies between them, are given the same decimals."""
    return max(abs(interval.low), abs(interval.high))


def percent(ratio: float) -> str:
    """A ratio such as "59%", or "12 times" where per cent are no longer read easily."""
    return f"{100 * ratio:.0f}%" if ratio < 10 else f"{ratio:,.0f}{FIXED}times"


def share(ratio: Ratio) -> str:
    """A ratio of steps as "59%", or as a lower bound."""
    return percent(ratio.value) if ratio.censored == 0 else f"at least {percent(ratio.value)}"


def p_value(p: float) -> str:
    """ "p = 0.012", or "p < 0.001"."""
    return f"p{FIXED}<{FIXED}0.001" if p < 0.001 else f"p{FIXED}={FIXED}{p:.2g}"


def rate(lr: float) -> str:
    """A learning rate: "0.02", "3e-05"."""
    return f"{lr:.4g}"


def decades(value: float, *, more: bool = False) -> str:
    """A width in decades: two decimals, more for small ones, and none for nothing; "≥ 1.62" if it may be more."""
    return f"{GREATER + FIXED if more else ''}{value:{'.2f' if value >= 0.1 else '.2g'}}"


def seeds(numbers: Sequence[int]) -> str:
    """How many seeds and which, such as "2 seeds (0, 1)"."""
    return f"{counted(len(numbers), 'seed')} ({', '.join(map(str, numbers))})"


def data(what: DataIdentity) -> str:
    """Which data, exactly enough to find it."""
    return f"Data: {plain(what.name)}, {size(what.bytes)}, SHA-256 {what.sha256[:12]}\N{HORIZONTAL ELLIPSIS}"


def milliseconds(value: float) -> str:
    """ "12.3 ms", "142 ms"."""
    return f"{value:.{0 if value >= 100 else 1}f}{NARROW}ms"


def duration(seconds: float) -> str:
    """ "0.4 s", "21 s", "4 min 05 s", "2 h 07 min"."""
    if seconds < 120:
        return f"{seconds:.1f}{NARROW}s" if seconds < 10 else f"{seconds:.0f}{NARROW}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes}{NARROW}min {rest:02d}{NARROW}s"
    return f"{minutes // 60}{NARROW}h {minutes % 60:02d}{NARROW}min"


def size(number: int) -> str:
    """Bytes in decimal units: "512 B", "12.3 MB"."""
    exponent = min(4, (len(str(abs(number))) - 1) // 3)
    value = number / 1000**exponent
    decimals = 0 if exponent == 0 or value >= 100 else 1
    return f"{value:.{decimals}f}{NARROW}{('B', 'kB', 'MB', 'GB', 'TB')[exponent]}"
