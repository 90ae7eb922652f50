"""Numbers for people: figures, shares, counts, bytes and times, the same in every report."""

import math

MISSING = "–"
"""Stands where nothing was measured."""


def format_figure(value: float | None, *, decimals: bool = False) -> str:
    """Four significant digits, with an exponent outside 1e-3 .. 1e5.

    Args:
        value: the figure; None gives `MISSING`.
        decimals: for columns of measured figures: 10 is 10.00, not 10.
    """
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    whole = value == int(value) and abs(value) < 1e12
    if whole and (value == 0 or not decimals or isinstance(value, int)):
        return format_count(int(value))
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}" if decimals else f"{value:.3g}"
    return f"{value:#.4g}".rstrip(".") if decimals else f"{value:.4g}"


def format_with_error(value: float, error: float) -> str:
    """A measured figure and its standard error, the latter to one digit: 126.7 ± 12."""
    spread = f"{error:.0f}" if error >= 1 else f"{error:.1g}"
    return f"{format_figure(value, decimals=True)} ± {spread}"


def format_share(share: float | None) -> str:
    """Percent with two decimals; 0 % and 100 % only for the exact 0 and 1."""
    if share is None:
        return MISSING
    if 0 < share < 5e-5:
        return "< 0.01 %"
    if 1 - 5e-5 < share < 1:
        return "> 99.99 %"
    return f"{100 * share:.0f} %" if share in (0, 1) else f"{100 * share:.2f} %"


def format_count(count: int) -> str:
    """Thousands separated by commas."""
    return f"{count:,}"


def format_large_count(count: int) -> str:
    """Three significant digits with k, M or B: 268 M."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return str(count)


def format_bytes(count: int) -> str:
    """Decimal units, as disks and hubs count: 241 MB."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            amount = count / limit
            return f"{amount:.2f} {unit}" if amount < 10 else f"{amount:.0f} {unit}"
    return f"{count} B"


def format_seconds(seconds: float) -> str:
    """Seconds with one decimal below a minute, else minutes or hours: 4 min 05 s."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
