"""The doctor on this machine, and where torch is broken and keys are stored."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from packaging.requirements import Requirement

from qatlora import registry
from qatlora.doctor import Patient
from qatlora.doctor.files import findings as file_findings
from qatlora.doctor.packages import judge, pinned_versions, required_packages
from qatlora.report.json_report import load_schema
from qatlora.report.results_doctor import MISSING, NOTE, OK

ROOT = Path(__file__).parents[2]
SECRET = "0123456789abcdef" * 3


def doctor(run_dir: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m qatlora recipe=doctor` as a person starts it, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "qatlora", "recipe=doctor", f"run_dir={run_dir}"],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, dict]:
    """A run where `import torch` fails, the cache is empty, and keys of wandb and the hub exist."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "torch.py").write_text("raise ImportError('libcudart.so.99 not found')\n")
    done = doctor(
        folder / "run",
        PYTHONPATH=str(folder),
        QATLORA_CACHE=str(folder / "cache"),
        WANDB_API_KEY=SECRET,
        HF_TOKEN=f"hf_{SECRET}",
    )
    return done, json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))


def test_a_torch_that_cannot_be_imported_is_a_line_with_the_command_that_helps(broken) -> None:
    done, _ = broken
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "libcudart.so.99 not found" in done.stderr
    assert "pip install -c constraints.txt torch" in done.stderr


def test_the_report_of_a_broken_machine_follows_the_schema(broken) -> None:
    _, report = broken
    jsonschema.validate(report, load_schema())
    found = {one["name"]: one["status"] for one in report["doctor"]["findings"]}
    assert found["torch"] == MISSING
    assert found["wandb"] == found["Hugging Face hub"] == OK


def test_no_key_is_ever_shown(broken) -> None:
    done, report = broken
    assert SECRET not in done.stdout + done.stderr + json.dumps(report)


def test_what_an_empty_cache_lacks_is_named_with_the_pip_command_and_not_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QATLORA_CACHE", str(tmp_path / "cache"))
    found = {one.name: one for one in file_findings(Patient(tmp_path, "none"))}
    package = registry.PACKAGES["llama-cpp-python"]
    line = found[f"{package.name} {package.version}"]
    assert line.status == NOTE
    assert line.remedy is not None
    assert f"--no-binary :all: --dest {tmp_path}/cache/packages" in line.remedy
    assert found["converter"].status == NOTE
    assert "empty" in found["cache"].found
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("requirement", "pin", "status", "words"),
    [
        ("no-such-package>=1", "1.5", MISSING, ["not installed", "'no-such-package==1.5'"]),
        ("packaging>=9999", "9999.1", MISSING, ["not >=9999", "'packaging==9999.1'"]),
        ("packaging>=1", "1.0", NOTE, ["tested 1.0", "'packaging==1.0'"]),
    ],
)
def test_a_package_is_judged_by_its_bound_and_by_the_tested_version(
    requirement: str, pin: str, status: str, words: list[str]
) -> None:
    wanted = Requirement(requirement)
    finding = judge(wanted, {wanted.name: pin})
    assert finding is not None
    assert finding.status == status
    assert all(word in f"{finding.found} {finding.remedy}" for word in words)


def test_every_required_package_has_a_tested_version_and_no_extra_is_required() -> None:
    names = {one.name for one in required_packages()}
    assert {"torch", "transformers", "trl"} <= names
    assert "pytest" not in names
    assert names <= pinned_versions().keys()


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_nothing_is_missing_where_these_tests_run(tmp_path: Path) -> None:
    done = doctor(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Nothing that the default run needs is missing." in done.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, load_schema())
    assert {one["area"] for one in report["doctor"]["findings"]} == {
        "packages", "machine", "files", "logins",
    }  # fmt: skip
