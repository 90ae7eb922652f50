"""Python packages: what is installed, against the versions that the tests ran with."""

import importlib.metadata
import platform
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import qatlora
from qatlora.doctor import Patient
from qatlora.paths import shipped
from qatlora.report.results_doctor import MISSING, NOTE, OK, Finding

_AREA = "packages"
_TESTED_PYTHON = "3.11"


def findings(_: Patient) -> Iterator[Finding]:
    """Python, each required package that is not the tested one, and how many are."""
    found = platform.python_version()
    tested = found.startswith(f"{_TESTED_PYTHON}.")
    yield Finding(_AREA, "Python", OK if tested else NOTE, f"{found}, tested {_TESTED_PYTHON}")
    pins = pinned_versions()
    required = required_packages()
    others = [finding for one in required if (finding := judge(one, pins))]
    yield from others
    as_tested = f"{len(required) - len(others)} of {len(required)} at their tested versions"
    yield Finding(_AREA, "required", OK, as_tested)


def required_packages() -> list[Requirement]:
    """Of the installed qatlora, or of the clone that this is."""
    try:
        lines = importlib.metadata.requires("qatlora") or []
    except importlib.metadata.PackageNotFoundError:
        project = Path(qatlora.__file__).parents[1] / "pyproject.toml"
        lines = tomllib.loads(project.read_text("utf-8"))["project"]["dependencies"]
    requirements = [Requirement(line) for line in lines]
    return [one for one in requirements if "extra" not in str(one.marker)]


def pinned_versions() -> dict[str, str]:
    """Canonical name -> version, from constraints.txt."""
    lines = shipped("constraints.txt").read_text("utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def judge(required: Requirement, pins: dict[str, str]) -> Finding | None:
    """What differs from the tested version; None where nothing does."""
    pin = pins.get(canonicalize_name(required.name), "")
    remedy = f"pip install '{required.name}=={pin}'" if pin else f"pip install '{required}'"
    try:
        found = importlib.metadata.version(required.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(_AREA, required.name, MISSING, "not installed", remedy)
    if not required.specifier.contains(found, prereleases=True):
        return Finding(_AREA, required.name, MISSING, f"{found}, not {required.specifier}", remedy)
    if Version(found).public != pin:  # a CPU build of torch is the tested version, too
        return Finding(_AREA, required.name, NOTE, f"{found}, tested {pin or 'none'}", remedy)
    return None
