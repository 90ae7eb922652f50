"""Write docs/recipes/*.md and docs/settings.md: `python -m docs.recipe_pages` in the clone.

A recipe's page is its header card, its stages, the settings that it changes and those that are its
own; docs/settings.md holds the sections that recipes share. Values come from conf/ and recipes/,
meanings from the docstrings in qatlora/config and, for settings without one, from the comments in
conf/. A test compares the committed pages with what this script makes.
"""

import ast
import dataclasses
import inspect
import itertools
import json
import re
import textwrap
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qatlora.config import STAGES, RootConfig, recipes
from qatlora.files import write_text
from qatlora.paths import shipped

DOCS = Path(__file__).parent
_MADE_BY = "<!-- Made by `python -m docs.recipe_pages` from recipes/, conf/ and qatlora/config. -->"
_SECTIONS = {field.name: field for field in dataclasses.fields(RootConfig) if field.name != "card"}
_SECTIONS_OF_STAGE = {
    "load_data": ("data",),
    "preview_data": ("base", "data", "preview"),
    "teacher_cache": ("base", "storage", "teacher"),
    "load_base": ("base", "storage", "teacher"),
    "attach": ("adapter", "distill"),
    "train": ("train", "logging"),
    "evaluate_base": ("evaluate",),
    "write_candidate": ("export",),
    "guard": ("guard",),
    "inspect": ("base", "inspect"),
    "build": ("base", "storage", "build"),
    "plan": ("base", "storage", "adapter", "data", "teacher", "train", "evaluate", "plan"),
    "benchmark": ("base", "data", "train", "benchmark"),
    "validate": ("base", "evaluate", "guard", "validate"),
    "fidelity": ("base", "data", "fidelity"),
}
"""What each stage reads; one that is not named reads only what earlier ones left."""


def pages() -> dict[Path, str]:
    """Every page that this script makes, with its text."""
    made = {DOCS / "settings.md": settings_page()}
    for path in sorted(shipped("recipes").glob("*.yaml")):
        made[DOCS / "recipes" / f"{path.stem}.md"] = recipe_page(path.stem)
    return made


def recipe_page(name: str) -> str:
    """The page of one recipe, Markdown."""
    recipe = OmegaConf.load(shipped("recipes") / f"{name}.yaml")
    card, values = recipe.card, values_of(name)
    command = f"python -m qatlora recipe={name} {card.get('example', '')}".strip()
    parts = [
        f"# `recipe={name}`",
        _MADE_BY,
        str(card.purpose),
        f"```bash\n{command}\n```",
        _table(("", ""), [(key, card[key]) for key in ("hardware", "time", "expect")]),
        "## Stages",
        "\n".join(f"{i}. `{stage}` {STAGES[stage]}" for i, stage in enumerate(recipe.stages, 1)),
    ]
    if changed := [*_changed(recipe)]:
        parts += ["## What it sets", _table(("setting", "value", "meaning"), changed)]
    read = _sections_read(recipe.stages)
    own = [section for section in read if _is_of_one_recipe(section)]
    for section in own:
        parts += [f"## Its own settings: `{section}`", _settings_table(section, values)]
    if shared := [section for section in read if section not in own]:
        links = ", ".join(f"[{section}](../settings.md#{section})" for section in shared)
        parts += ["## Settings that it shares", f"{links}, `seed` and `run_dir`."]
    return "\n\n".join(parts) + "\n"


def settings_page() -> str:
    """The page of the sections that recipes share, Markdown."""
    values = values_of(None)
    parts = [
        "# Settings",
        _MADE_BY,
        "Give a setting as `section.name=value`, and a file of `conf/SECTION` as `section=choice`. "
        "The command line wins over the recipe, the recipe over the defaults below. "
        "`python -m qatlora recipe=NAME --cfg job` prints what is in force; a misspelled key is "
        "refused. Settings of single recipes are on the recipes' [own pages](recipes/).",
        "`seed=0` is of the data's order, the adapter's start and the dither. `run_dir` is the "
        "folder of everything that a run writes: `runs/RECIPE/DATE` where it is not given.",
    ]
    for section, field in _SECTIONS.items():
        if not dataclasses.is_dataclass(field.type) or _is_of_one_recipe(section):
            continue
        parts += [f"## {section}", inspect.getdoc(field.type) or ""]
        if len(choices := [*_choices(section)]) > 1:
            parts.append(_table((f"`{section}=`", "is"), choices))
        parts.append(_settings_table(section, values))
    return "\n\n".join(parts) + "\n"


def values_of(recipe: str | None) -> DictConfig:
    """Every setting with its value: schema, then the chosen files of conf/, then the recipe."""
    chosen = _default_choices()
    own = OmegaConf.load(shipped("recipes") / f"{recipe}.yaml") if recipe else OmegaConf.create()
    chosen.update(_overrides(own))
    files = {group: OmegaConf.load(_file(group, choice)) for group, choice in chosen.items()}
    own.pop("defaults", None)
    return OmegaConf.merge(OmegaConf.structured(RootConfig), files, own)


def _default_choices() -> dict[str, str]:
    defaults = OmegaConf.load(shipped("conf") / "config.yaml").defaults
    pairs = [pair for entry in defaults if isinstance(entry, DictConfig) for pair in entry.items()]
    return {group: choice for group, choice in pairs if group in _SECTIONS}


def _overrides(recipe: DictConfig) -> dict[str, str]:
    """Choices of groups that the recipe takes in place of the defaults."""
    entries = (entry for override in recipe.get("defaults", []) for entry in override.items())
    return {key.removeprefix("override /"): choice for key, choice in entries}


def _file(group: str, choice: str) -> Path:
    return shipped("conf") / group / f"{choice}.yaml"


def _changed(recipe: DictConfig) -> Iterator[tuple[str, str, str]]:
    for group, choice in _overrides(recipe).items():
        yield f"`{group}`", f"`{choice}`", _head_comment(_file(group, choice))
    for section in (key for key in recipe if key not in ("defaults", "card", "stages")):
        meanings = _meanings(section)
        for key, value in recipe[section].items():
            yield f"`{section}.{key}`", f"`{_shown(value)}`", meanings[key]


def _sections_read(stages: list[str]) -> list[str]:
    read = {section for stage in stages for section in _SECTIONS_OF_STAGE.get(stage, ())}
    return [section for section in _SECTIONS if section in read]


def _is_of_one_recipe(section: str) -> bool:
    return getattr(_SECTIONS[section].type, "__module__", "") == recipes.__name__


def _settings_table(section: str, values: DictConfig) -> str:
    held = OmegaConf.to_container(values[section], enum_to_str=True)
    meanings = _meanings(section)
    rows = [(f"`{section}.{key}`", f"`{_shown(held[key])}`", meanings[key]) for key in meanings]
    return _table(("setting", "default", "meaning"), rows)


def _meanings(section: str) -> dict[str, str]:
    """What each setting of a section means: its docstring, else its enum's, else the comment."""
    settings = _SECTIONS[section].type
    said, comments = _attribute_docstrings(settings), _comments(section)
    meanings = {}
    for field in dataclasses.fields(settings):
        words = said.get(field.name, "")
        if isinstance(field.type, type) and issubclass(field.type, Enum):
            choices = ", ".join(f"`{member.name}`" for member in field.type)
            words = f"{words or inspect.getdoc(field.type)} One of {choices}."
        meanings[field.name] = words or comments.get(field.name, "")
    return meanings


def _attribute_docstrings(settings: type) -> dict[str, str]:
    """The strings that follow the fields of a dataclass, which Python itself does not keep."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
    found = {}
    for node, after in itertools.pairwise(tree.body):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
            found[node.target.id] = " ".join(ast.literal_eval(after.value).split())
    return found


def _comments(section: str) -> dict[str, str]:
    """Comments beside the settings in the section's default file of conf/."""
    choice = _default_choices().get(section)
    text = _file(section, choice).read_text("utf-8") if choice else ""
    found = re.findall(r"^(\w+):[^#\n]*# (.+)$", text, re.MULTILINE)
    return {key: f"{comment[0].upper()}{comment[1:]}." for key, comment in found}


def _choices(group: str) -> Iterator[tuple[str, str]]:
    for path in sorted((shipped("conf") / group).glob("*.yaml")):
        yield f"`{path.stem}`", _head_comment(path)


def _head_comment(path: Path) -> str:
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


def _shown(value: Any) -> str:
    """A value as it is typed on the command line."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, *rows]
    cells = ([str(cell).replace("|", r"\|") for cell in line] for line in lines)
    first, *rest = (f"| {' | '.join(line)} |" for line in cells)
    return "\n".join([first, "|---" * len(header) + "|", *rest])


def main() -> None:
    """Write all pages and remove those of recipes that are gone."""
    made = pages()
    for path in (DOCS / "recipes").glob("*.md"):
        if path not in made:
            path.unlink()
    for path, text in made.items():
        write_text(path, text)


if __name__ == "__main__":
    main()
