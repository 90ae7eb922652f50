"""What the recipe teacher_cache leaves."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CachePoint:
    """What a cache of `top_k` words would keep of a divergence, on a held-out text.

    Attributes:
        text: name of the text.
        top_k: words per token.
        full: divergence of the base from the teacher, nats per token.
        kept: the same from the words kept and one bucket for the rest.
        rest_mass: the teacher's probability of the other words.
        bytes_per_million_tokens: size on disk.
    """

    text: str
    top_k: int
    full: float
    kept: float
    rest_mass: float
    bytes_per_million_tokens: int


@dataclass(frozen=True)
class CacheResult:
    """A teacher cache.

    Attributes:
        path: its folder.
        teacher: the teacher's name.
        top_k: words kept per token.
        temperature: of the softmax.
        divergence: what `points` measure.
        rows: different rows of this run that ask for the teacher.
        tokens: their scored tokens.
        added_rows: those of them that were not there before.
        added_tokens: their scored tokens.
        seconds: of running the teacher and writing, loading it included.
        bytes: of all rows in the cache.
        held_out_bytes: of held-out states and the teacher's head.
        points: what k words keep.
    """

    path: str
    teacher: str
    top_k: int
    temperature: float
    divergence: str
    rows: int
    tokens: int
    added_rows: int
    added_tokens: int
    seconds: float
    bytes: int
    held_out_bytes: int
    points: list[CachePoint]
