"""Imports go downward: the table of rooms, held by reading the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qatlora"

RESULTS = "report.results"
"""The dataclasses that a run report is made of: filled in by many rooms, importing none."""

FLOOR = {"errors", "files", "paths", RESULTS}
"""What every room may import: it knows nobody above itself."""

MAY_IMPORT = {
    "errors": set(),
    "files": set(),
    "paths": set(),
    "registry": set(),
    "progress": set(),
    "quiet": set(),
    "memory": set(),
    "interrupts": set(),
    "run_folder": set(),
    "processes": set(),
    "grid": set(),
    "llamacpp": {"registry"},
    "config": {"model_spec"},
    "model_spec": set(),
    "base": {"config", "grid", "llamacpp", "registry", "progress"},
    "data": {"config", "registry", "progress"},
    "distill": {"config", "progress"},
    "adapters": {"config", "grid", "base", "progress"},
    "evaluate": {"config", "distill", "adapters", "llamacpp", "memory", "progress"},
    "train": {
        "config",
        "adapters",
        "distill",
        "data",
        "evaluate",
        "progress",
        "memory",
        "interrupts",
        "processes",
    },
    "export": {"config", "grid", "adapters", "base", "data", "llamacpp", "progress"},
    "guard": {"config", "grid", "base", "adapters", "evaluate", "export", "llamacpp", "progress"},
    "report": set(),
    "tracking": {"config", "progress", "report"},
    "doctor": {"config", "registry", "llamacpp", "memory", "progress", "report", "tracking"},
    "plan": {"config", "grid", "base", "distill"},
    "preflight": {
        "config",
        "base",
        "benchmark",
        "distill",
        "llamacpp",
        "memory",
        "plan",
        "processes",
    },
    "benchmark": {
        "config",
        "interrupts",
        "grid",
        "base",
        "export",
        "llamacpp",
        "adapters",
        "distill",
        "data",
        "evaluate",
        "train",
        "memory",
        "quiet",
    },
    "inspection": {"grid", "base"},
    "validation": {"config", "grid", "base", "data", "llamacpp", "evaluate", "export", "guard"},
    "fidelity": {
        "config",
        "model_spec",
        "grid",
        "base",
        "llamacpp",
        "adapters",
        "data",
        "evaluate",
    },
    "stages": None,  # stages of single recipes, part of the main path
    "state": None,  # what a run knows, and the main path: they join the rooms
    "pipeline": None,
    "sweep": set(),
    "explained": {"config"},
    "__main__": {
        "config",
        "doctor",
        "explained",
        "interrupts",
        "pipeline",
        "quiet",
        "report",
        "sweep",
    },
}
"""Room or top-level module -> what of qatlora it may import besides FLOOR; None: anything."""

ROOT_CONFIG = {
    "config",
    "doctor",
    "preflight",
    "stages",
    "state",
    "pipeline",
    "explained",
    "__main__",
}
"""Who may see all settings at once."""

WITHOUT_TORCH = (
    "errors",
    "files",
    "paths",
    "registry",
    "config",
    "model_spec",
    "interrupts",
    "sweep",
    "explained",
    "__main__",
)
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "accelerate", "numpy"}
TORCH_ONLY = ("grid", "distill")


def rooms() -> list[str]:
    folders = [path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()]
    modules = [path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    return sorted(folders + modules)


def imports_of(room: str) -> Iterator[tuple[str, str]]:
    """(file, imported module) for each import statement of the room, also those in functions."""
    single = PACKAGE / f"{room}.py"
    for path in [single] if single.is_file() else sorted((PACKAGE / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((path.name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                yield path.name, node.module
                yield from ((path.name, f"{node.module}.{alias.name}") for alias in node.names)


def imported_rooms(room: str) -> set[tuple[str, str]]:
    """(file, other room) for each import of another room; the result dataclasses count apart."""
    found = set()
    for file, module in imports_of(room):
        package, _, inside = module.partition(".")
        other = RESULTS if inside.startswith(RESULTS) else inside.partition(".")[0]
        if package == "qatlora" and other in {*rooms(), RESULTS} and other != room:
            found.add((file, other))
    return found


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_only_what_lies_below_it(room):
    assert room in MAY_IMPORT, f"{room} is new: give it a line in MAY_IMPORT"
    allowed = MAY_IMPORT[room]
    if allowed is not None:
        found = imported_rooms(room)
        assert not {(file, other) for file, other in found if other not in allowed | FLOOR}


def test_the_result_dataclasses_import_nothing_of_qatlora():
    tree = ast.parse((PACKAGE / "report" / "results.py").read_text(encoding="utf-8"))
    froms = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    others = [module for module in froms if not module.startswith(f"qatlora.{RESULTS}")]
    assert not [module for module in others if module.startswith("qatlora")]


def test_the_table_itself_has_no_circle():
    below = {room: (allowed or set()) for room, allowed in MAY_IMPORT.items()}
    while free := [room for room, allowed in below.items() if not allowed]:
        for room in free:
            del below[room]
        below = {room: allowed - set(free) for room, allowed in below.items()}
    assert not below


@pytest.mark.parametrize("room", rooms())
def test_a_room_never_sees_the_root_config(room):
    if room in ROOT_CONFIG:
        return
    assert not [entry for entry in imports_of(room) if entry[1] == "qatlora.config.RootConfig"]


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_what_answers_help_and_typos_imports_nothing_heavy(room):
    if room in rooms():
        assert not {entry for entry in imports_of(room) if entry[1].split(".")[0] in HEAVY}


@pytest.mark.parametrize("room", TORCH_ONLY)
def test_numerics_need_torch_and_nothing_else(room):
    others = HEAVY - {"torch"}
    assert not {entry for entry in imports_of(room) if entry[1].split(".")[0] in others}
