"""A teacher cache in words: its size, and what k words keep of the divergence."""

from qatlora.report.formatting import (
    format_bytes,
    format_count,
    format_figure,
    format_seconds,
    format_share,
)
from qatlora.report.results_cache import CacheResult

CACHE_HEADER = ("text", "top k", "full", "kept", "lost", "rest mass", "per 1M tokens")
CACHE_LEGEND = (
    "The divergence of the base from the teacher on held-out text, nats per token: in full, and "
    "from the k likeliest words and one bucket for all others. What is lost is also what training "
    "from the cache does not see; the KLDs of other reports are those of the full distributions."
)


def cache_rows(result: CacheResult) -> list[list[str]]:
    """Cells of the table, one row per text and k."""
    return [
        [
            point.text,
            str(point.top_k),
            f"{point.full:.4f}",
            f"{point.kept:.4f}",
            format_share(1 - point.kept / point.full) if point.full else "",
            format_share(point.rest_mass),
            format_bytes(point.bytes_per_million_tokens),
        ]
        for point in result.points
    ]


def cache_facts(result: CacheResult) -> list[tuple[str, str]]:
    """Pairs of a label and plain text."""
    added = f"{format_count(result.added_rows)} rows written in {format_seconds(result.seconds)}"
    return [
        ("folder", result.path),
        ("teacher", f"{result.teacher}, {result.top_k} words per token"),
        ("rows of this run", f"{format_count(result.rows)}, {format_figure(result.tokens)} tokens"),
        ("new", added if result.added_rows else "nothing: all rows were there"),
        ("size", f"{format_bytes(result.bytes)}, and {_held_out(result)}"),
    ]


def _held_out(result: CacheResult) -> str:
    return f"{format_bytes(result.held_out_bytes)} to score held-out text (states and head)"
