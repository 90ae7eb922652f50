import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(name): version for name, version in pairs}


def test_every_dependency_is_pinned_to_a_version_that_needs_no_index_of_its_own():
    extras = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    for requirement in PROJECT["dependencies"] + extras:
        name = canonical(re.match(r"[\w.-]+", requirement).group())
        assert name in pins()
    assert not [version for version in pins().values() if "+" in version]


def test_every_package_that_is_imported_is_declared():
    declared = {canonical(re.match(r"[\w.-]+", line).group()) for line in PROJECT["dependencies"]}
    installed = importlib.metadata.packages_distributions()
    nodes = [
        node
        for path in (ROOT / "qatlora").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
    ]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names
    packages -= {"qatlora", "conversion"}  # the latter is a folder of llama.cpp's source
    assert {"torch", "yaml"} < packages
    for package in packages:
        assert declared & set(map(canonical, installed[package])), package


def test_the_pins_name_no_cuda_library():
    assert not [name for name in pins() if name.startswith(("nvidia", "cuda", "triton"))]


@pytest.mark.parametrize(
    ("marker", "words"),
    [
        ("<!-- ci: tests -->", ["-c constraints.txt", "demo,test", "pytest"]),
        ("<!-- ci: main job -->", ["-c constraints.txt", "demo", "recipe=chat_sft"]),
    ],
)
def test_the_readme_installs_and_runs_with_one_line_each(marker, words):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(re.escape(marker) + r"\s*```bash\n(.*?)\n```", readme, re.DOTALL)
    assert block, f"README.md has no bash block after {marker}"
    assert "\n" not in block.group(1)
    assert all(word in block.group(1) for word in words)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=ROOT, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(folder), str(wheel)], check=True)
    return folder


def qatlora(installed: Path, cwd: Path, *arguments: str) -> str:
    """Standard output of the wheel's own `python -m qatlora ARGUMENTS`, run in another folder."""
    done = subprocess.run(
        [sys.executable, "-m", "qatlora", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_the_settings(wheel):
    listed = set(zipfile.ZipFile(wheel).namelist())
    package = [path for path in (ROOT / "qatlora").rglob("*") if "__pycache__" not in path.parts]
    settings = [path for name in ("conf", "recipes") for path in (ROOT / name).rglob("*.yaml")]
    expected = {path.relative_to(ROOT).as_posix() for path in package if path.is_file()}
    expected |= {f"qatlora/{path.relative_to(ROOT).as_posix()}" for path in settings}
    assert expected <= listed


@pytest.mark.slow
def test_the_wheel_works_in_another_folder(installed, tmp_path):
    text = qatlora(installed, tmp_path, "--help")
    for path in [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "conf").glob("*/*.yaml")]:
        assert path.stem in text
    settings = qatlora(installed, tmp_path, "recipe=chat_sft", "storage=q4_0", "--cfg", "job")
    assert "kind: q4_0" in settings
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_wheel_finds_its_own_settings_not_those_of_the_clone(installed, tmp_path):
    code = "from qatlora.paths import shipped; print(shipped('conf'), shipped('recipes'))"
    where = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert where == [str(installed / "qatlora" / name) for name in ("conf", "recipes")]
