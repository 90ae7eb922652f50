"""A data preview in words: the verdict, what was lost and why, lengths, and marked examples."""

from collections.abc import Iterator

from rich.text import Text

from qatlora.report.escape import fenced, inline, table, visible
from qatlora.report.formatting import format_count, format_share
from qatlora.report.results_preview import PreviewExample, PreviewResult

OPENING, CLOSING = "⟦", "⟧"
"""Marks around trained tokens, for a place without colour."""

LENGTH_HEADER = ("tokens", "number", "share", "")
_TRAINED_STYLE = "bold green"
_BAR_WIDTH = 30


def headline(result: PreviewResult) -> str:
    """What the set is, and what it gives; one sentence."""
    share = format_share(result.trained_tokens / result.tokens)
    return (
        f"{format_count(result.conversations)} conversations, format {result.format}; "
        f"{format_count(result.examined)} rendered give {format_count(result.rows)} rows, and "
        f"{share} of their tokens are trained."
    )


def losses(result: PreviewResult) -> list[str]:
    """What was cut or left out, and why; a sentence each."""
    sentences = [
        f"Left out, {reason}: {format_count(number)}." for reason, number in result.dropped.items()
    ]
    if result.cut_rows:
        sentences.append(
            f"{format_count(result.cut_rows)} rows lost {format_count(result.cut_tokens)} tokens "
            f"at their end, beyond data.max_length_tokens={result.max_length_tokens}."
        )
    return sentences or ["Nothing was cut or left out."]


def preview_facts(result: PreviewResult) -> list[tuple[str, str]]:
    """Pairs of a label and plain text."""
    return [
        ("data", result.name),
        ("licence", result.licence),
        ("row", f"at most {format_count(result.max_length_tokens)} tokens"),
        ("padding", f"{format_share(result.padding_share)} of full rows"),
        ("with data.packing", f"{format_share(result.packed_padding_share)} of full rows"),
    ]


def length_rows(result: PreviewResult) -> list[list[str]]:
    """Cells of the histogram in the order of `LENGTH_HEADER`; the last one is a bar."""
    total = sum(one.count for one in result.lengths)
    longest = max(one.count for one in result.lengths)
    return [
        [
            f"{one.first}-{one.last}",
            format_count(one.count),
            format_share(one.count / total),
            "█" * round(_BAR_WIDTH * one.count / longest),
        ]
        for one in result.lengths
    ]


def marked(example: PreviewExample) -> str:
    """The row's text with marks around what is trained."""
    return "".join(
        f"{OPENING}{piece.text}{CLOSING}" if piece.trained else piece.text
        for piece in example.pieces
    )


def highlighted(example: PreviewExample) -> Text:
    """The same for a terminal, coloured besides."""
    text = Text()
    for piece in example.pieces:
        said = visible(piece.text)
        if piece.trained:
            text.append(f"{OPENING}{said}{CLOSING}", style=_TRAINED_STYLE)
        else:
            text.append(said)
    return text


def example_title(example: PreviewExample, number: int) -> str:
    """What stands over an example."""
    cut = f", {format_count(example.cut_tokens)} cut" if example.cut_tokens else ""
    return (
        f"Example {number}: {format_count(example.tokens)} tokens, "
        f"{format_count(example.trained_tokens)} trained{cut}"
    )


def preview_sections(result: PreviewResult) -> Iterator[str]:
    """Markdown: the histogram, then the examples."""
    rows = [[inline(cell) for cell in row] for row in length_rows(result)]
    yield f"Lengths up to the last answer, uncut; a row holds {result.max_length_tokens} tokens."
    yield table(LENGTH_HEADER, rows, "rrrl")
    if result.examples:
        yield f"The loss falls on what stands between {OPENING} and {CLOSING}."
    for number, example in enumerate(result.examples, 1):
        yield f"**{example_title(example, number)}**"
        yield fenced(marked(example))
