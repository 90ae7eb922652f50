"""What messages are made of."""

import pytest

from qatlora.errors import first_line


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (OSError("no such file\n\nHint: ..."), "no such file"),
        (RuntimeError(""), "RuntimeError"),
        (EOFError(), "EOFError"),
    ],
)
def test_an_exception_without_a_message_says_its_class(problem: Exception, said: str) -> None:
    assert first_line(problem) == said
