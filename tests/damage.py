"""Damaged copies of a file: cut off and with single bits flipped, at every class of position."""

import random
from collections.abc import Iterator

from fuzzing import TIMES

_FLIPS_PER_CLASS = 2 * TIMES


def damaged(content: bytes, header: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """(what was done, content) for truncations and flips.

    Args:
        content: of the whole file.
        header: bytes before its data; the classes are its first 8 bytes, the rest of the header,
            the data and the last byte.
        seed: of the positions.
    """
    draw, size = random.Random(seed), len(content)
    for end in sorted({0, 1, 7, header // 2, header, (header + size) // 2, size - 1}):
        if 0 <= end < size:
            yield f"cut off at {end} of {size}", content[:end]
    classes = (range(0, 8), range(8, header), range(header, size - 1), range(size - 1, size))
    for positions in classes:
        for _ in range(_FLIPS_PER_CLASS if positions else 0):
            position, bit = draw.choice(positions), draw.randrange(8)
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            yield f"bit {bit} of byte {position} of {size}", bytes(changed)
