"""Foreign text in Markdown: what a model, a prompt or a file name says must not become markup.

CommonMark (0.31) allows a backslash before any ASCII punctuation, and a code fence ends only at a
fence at least as long as its own; both are used here. GitHub's tables split cells at ``|`` and its
links need no brackets, so both are disarmed as well.
"""

import re
import textwrap
import unicodedata
from collections.abc import Sequence

# An underscore between letters or digits is text, as in chat_sft.
_MARKUP = re.compile(r"[\\`*\[\]<>#|~$&]|(?<![^\W_])_|_(?![^\W_])")
_LINK = re.compile(r"\b(https?|ftp):|\b(www)\.", re.IGNORECASE)
# What begins a bullet, a number or an underline.
_LEADING_MARKUP = re.compile(r"^(?:(?=[-+=])|(\d+)(?=[.)](?:\s|$)))")
_MIN_FENCE = 3


def inline(text: str) -> str:
    """`text` as one line of plain Markdown text, safe in a table cell as well."""
    line = " ".join(visible(text).split())
    line = _MARKUP.sub(r"\\\g<0>", line)
    line = _LINK.sub(lambda found: f"{found[0][:-1]}\\{found[0][-1]}", line)
    return _LEADING_MARKUP.sub(r"\1\\", line)


def code_span(text: str) -> str:
    """`text` as inline code on one line; not for table cells."""
    line = " ".join(visible(text).split())
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def fenced(text: str, language: str = "text") -> str:
    """`text` as a code block whose fence is longer than any run of backticks in it."""
    fence = "`" * max(_MIN_FENCE, _longest_run(text) + 1)
    return f"{fence}{language}\n{visible(text)}\n{fence}"


def labelled(label: str, text: str, *, label_width: int, width: int = 100) -> str:
    """`text` wrapped beside a label: every line after the first is indented by `label_width`."""
    indent = " " * label_width
    lines: list[str] = []
    for paragraph in visible(text).strip("\n").split("\n"):
        wrapped = textwrap.wrap(
            paragraph, width - label_width, replace_whitespace=False, drop_whitespace=True
        )
        lines += wrapped or [""]
    return "\n".join(
        (f"{label:<{label_width}}" if number == 0 else indent if line else "") + line
        for number, line in enumerate(lines)
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """A GitHub table with padded columns; cells must be escaped already.

    Args:
        header: names of the columns.
        rows: cells, as many in a row as `header` has.
        align: one letter per column, ``l`` or ``r``.
    """
    lines = [header, ["--:" if side == "r" else "---" for side in align], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "| "
        + " | ".join(
            cell.rjust(width, fill) if side == "r" else cell.ljust(width, fill)
            for cell, width, side in zip(line, widths, align, strict=True)
        )
        + " |"
        for line, fill in zip(lines, [" ", "-", *" " * len(rows)], strict=True)
    )


def visible(text: str) -> str:
    """`text` with one kind of line break, and control characters shown as U+FFFD.

    Among them are the marks that reverse the direction of what follows, and lone surrogates, which
    UTF-8 cannot hold. Joiners, of which emoji are made, and all else are left alone.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n")
    text = text.replace("\u2029", "\n")
    return "".join("\ufffd" if _is_control(character) else character for character in text)


def _is_control(character: str) -> bool:
    if character in "\n\t":
        return False
    if character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069":
        return True
    return unicodedata.category(character) in ("Cc", "Cs")


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)
