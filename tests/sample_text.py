"""Reproducible English-looking sentences for tiny tokenizers and tiny data."""

import random

WORDS = (
    "the a quick brown fox jumps over one lazy dog and then runs home to eat warm supper with "
    "seven old friends who never ask where it was all day because they know that rivers are cold"
)


def sentences(num: int, seed: int = 0) -> list[str]:
    """`num` reproducible English-looking sentences."""
    draw = random.Random(seed)
    chosen = (draw.choices(WORDS.split(), k=draw.randint(5, 12)) for _ in range(num))
    return [" ".join(words).capitalize() + "." for words in chosen]
