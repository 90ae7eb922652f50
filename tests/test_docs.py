"""README.md and docs/ say what is so: commands, settings, messages and links."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from test_config import RECIPES, compose

from docs.recipe_pages import pages, values_of
from qatlora.config import to_dataclasses
from qatlora.paths import shipped

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"-m qatlora (?!-h|--help)(.*)")
_LINK = re.compile(r"\]\(([^)#:]*)(?:#([^)]*))?\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_MESSAGE = re.compile(r"^### `(.+)`$", re.MULTILINE)


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


def test_every_link_leads_to_a_file_and_its_heading() -> None:
    for page in PAGES:
        for target, anchor in _LINK.findall(page.read_text("utf-8")):
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(path), f"{page.name}: {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them: lower case, no punctuation, hyphens for spaces."""
    headings = _HEADING.findall(page.read_text("utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def made() -> dict[Path, str]:
    return pages()


def test_the_made_pages_are_those_that_are_committed(made: dict[Path, str]) -> None:
    paths = [*(DOCS / "recipes").glob("*.md"), DOCS / "settings.md"]
    committed = {path: path.read_text("utf-8") for path in paths}
    assert committed == made, "write them anew: python -m docs.recipe_pages"


def test_every_setting_says_what_it_means(made: dict[Path, str]) -> None:
    lines = {line for text in made.values() for line in text.splitlines()}
    silent = [line for line in lines if line.endswith("` |  |")]
    assert not silent, "give each a docstring in qatlora/config"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_made_pages_show_the_values_that_hydra_composes(recipe: str) -> None:
    shown, composed = values_of(recipe), compose(f"recipe={recipe}")
    for section in set(shown) - {"card", "run_dir"}:
        assert shown[section] == composed[section], section


def test_the_index_leads_to_every_page() -> None:
    links = _LINK.findall((DOCS / "README.md").read_text("utf-8"))
    linked = {(DOCS / target).resolve() for target, _ in links} | {DOCS / "README.md"}
    missing = [page for page in PAGES if not {page, page.parent} & linked]
    assert not missing, "give them a line in docs/README.md"


def messages() -> set[str]:
    """Every text in the source, with … where values are filled in."""
    texts = set()
    for path in (ROOT / "qatlora").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    part.value if isinstance(part, ast.Constant) else "…" for part in node.values
                )
                texts.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
    return texts


def test_every_message_in_troubleshooting_is_one_that_the_source_can_give() -> None:
    quoted = _MESSAGE.findall((DOCS / "troubleshooting.md").read_text("utf-8"))
    assert len(quoted) == len(set(quoted)) > 30
    texts = "\n".join(messages())
    patterns = {one: ".*?".join(map(re.escape, one.split("…"))) for one in quoted}
    assert not [one for one, pattern in patterns.items() if not re.search(pattern, texts)]


def test_every_figure_is_shown_and_small() -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES)
    for path in (DOCS / "figures").iterdir():
        assert f"figures/{path.name}" in text
        assert path.stat().st_size < 100_000
