"""Every command that README.md and docs/ print is one that the settings accept."""

import re
import shlex
from pathlib import Path

import pytest
from test_config import compose

from qatlora.config import to_dataclasses
from qatlora.paths import shipped

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"-m qatlora (?!-h|--help)(.*)")
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def commands() -> list[str]:
    blocks = [block for page in PAGES for block in _BLOCK.findall(page.read_text("utf-8"))]
    return sorted({line for block in blocks for line in _COMMAND.findall(block)})


@pytest.mark.parametrize("command", commands())
def test_every_documented_command_composes(command: str) -> None:
    overrides = [word for word in shlex.split(command) if word != "-m"]
    if "hydra/launcher=joblib" in overrides:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    # Each of a sweep's values has the type of the first.
    single = [re.sub(r"^([\w.]+=[^\[{',]+),.*", r"\1", override) for override in overrides]
    to_dataclasses(compose(*single))


def test_every_recipe_is_documented() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    missing = [path.stem for path in shipped("recipes").glob("*.yaml") if path.stem not in text]
    assert not missing


def test_every_link_leads_to_a_file() -> None:
    for page in PAGES:
        for target in _LINK.findall(page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
