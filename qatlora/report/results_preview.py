"""What the recipe data_preview leaves."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PreviewPiece:
    """Consecutive tokens of a row as text, and whether the loss falls on them."""

    text: str
    trained: bool


@dataclass(frozen=True)
class PreviewExample:
    """A row as the model will see it; `cut_tokens` did not fit into it."""

    pieces: list[PreviewPiece]
    tokens: int
    trained_tokens: int
    cut_tokens: int


@dataclass(frozen=True)
class LengthBin:
    """How many conversations (or windows of them) have `first` to `last` tokens, uncut."""

    first: int
    last: int
    count: int


@dataclass(frozen=True)
class PreviewResult:
    """A set of conversations as training would take it in.

    Attributes:
        name: the set, or the sets of a mixture.
        format: how its records are laid out.
        licence: of the text.
        conversations: all that the set has.
        examined: those that were rendered, drawn by the seed.
        rows: what they gave.
        tokens: of those rows.
        trained_tokens: those on which the loss falls.
        max_length_tokens: length of a row at most.
        cut_rows: rows that lost their end.
        cut_tokens: tokens lost so.
        dropped: reason -> conversations that gave no row.
        padding_share: of a batch whose rows are all of full length, without packing.
        packed_padding_share: the same with packing.
        lengths: histogram without empty bins at its ends.
        examples: the first rows.
    """

    name: str
    format: str
    licence: str
    conversations: int
    examined: int
    rows: int
    tokens: int
    trained_tokens: int
    max_length_tokens: int
    cut_rows: int
    cut_tokens: int
    dropped: dict[str, int]
    padding_share: float
    packed_padding_share: float
    lengths: list[LengthBin]
    examples: list[PreviewExample]
