"""Lint, format and types, by the tools of the extra `test` as pyproject.toml sets them up."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TYPED_ROOMS = ("grid", "adapters", "guard", "export")


def run(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing():
    run("ruff", "check", ".")


def test_every_file_is_formatted():
    run("ruff", "format", "--check", ".")


@pytest.mark.slow
def test_types_of_the_numeric_rooms_are_complete():
    run("mypy", *(f"qatlora/{room}" for room in TYPED_ROOMS))
