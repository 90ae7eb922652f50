"""Gate 5 within a run: what it is given, what it leaves, and why it may be skipped."""

from pathlib import Path

import pytest
from pipeline_cases import STAGES, settings, write_data

from qatlora import pipeline
from qatlora.config import TeacherKind
from qatlora.llamacpp.tools import TOOLS_VARIABLE
from qatlora.report.console import to_console
from qatlora.report.json_report import to_json
from qatlora.report.markdown import to_markdown
from qatlora.report.results_runtime import CANDIDATE_F32, TEACHER_FP32
from qatlora.stages.runtime import announce_runtime, runtime_gates
from qatlora.state import Run, report_of

pytestmark = pytest.mark.llama_cpp


@pytest.fixture(scope="module")
def state(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run up to its candidate."""
    folder = tmp_path_factory.mktemp("run")
    cfg = settings(tiny_llama_folder, write_data(folder), folder / "run")
    cfg.data.eval_tokens, cfg.guard.llama_cpp_window_tokens = 400, 80
    cfg.stages = STAGES[: STAGES.index("write_candidate") + 1]
    run = Run.start(cfg)
    run.run_dir.mkdir()
    for name in cfg.stages:
        pipeline.STAGES[name](run)
    return run


def test_a_run_is_judged_against_its_teacher_and_its_trained_model(state: Run):
    found = {gate.name: gate for gate in runtime_gates(state)}
    assert {name: gate.status for name, gate in found.items()} == {
        "llama_cpp_weights": "passed",
        "llama_cpp": "passed",
        "llama_cpp_teacher": "passed",
    }
    assert state.runtime is not None
    without = (TEACHER_FP32, CANDIDATE_F32)
    assert all(row.to_teacher for row in state.runtime.rows if row.model not in without)
    report = report_of(state)
    assert to_json(report)["runtime"]["scored_tokens"] == 3 * 39
    assert "## In llama.cpp" in to_markdown(report)
    assert to_console(report)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("llama_cpp", False, "guard.llama_cpp=false"),
        ("llama_cpp_windows", 2, "gives 78 scored tokens in 2 windows and 100 are needed"),
    ],
)
def test_it_is_skipped_with_the_reason(
    key: str, value: object, reason: str, state: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(state.cfg.guard, key, value)
    (gate,) = runtime_gates(state)
    assert (gate.name, gate.status) == ("llama_cpp", "skipped")
    assert reason in gate.message


def test_without_tools_the_reason_names_the_command_that_builds_them(
    state: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv(TOOLS_VARIABLE, str(tmp_path))
    announce_runtime(state)
    assert "will not be judged in llama.cpp" in "".join(capsys.readouterr())
    (gate,) = runtime_gates(state)
    assert gate.status == "skipped"
    assert "llama-perplexity and llama-quantize not found" in gate.message
    assert "python -m qatlora.llamacpp.tools install" in gate.message


def test_without_a_teacher_only_the_trained_model_is_compared(
    state: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(state.cfg.teacher, "kind", TeacherKind.none)
    statuses = [gate.status for gate in runtime_gates(state)]
    assert statuses == ["passed", "passed", "skipped"]


def test_a_program_that_breaks_on_the_file_fails_the_gate(
    state: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("llama-perplexity", "llama-quantize"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\necho unknown architecture >&2; exit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv(TOOLS_VARIABLE, str(tmp_path))
    (gate,) = runtime_gates(state)
    assert gate.status == "failed"
    assert "unknown architecture" in gate.message
