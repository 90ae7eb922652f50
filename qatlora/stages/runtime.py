"""Part of the stage `guard`: the candidate in llama.cpp itself, where that can be had."""

import shutil
from pathlib import Path

from qatlora import progress
from qatlora.config import TeacherKind, Trained
from qatlora.data.encode import expected_bos
from qatlora.data.rows import Row
from qatlora.data.windows import half_scored_windows
from qatlora.errors import ToolError
from qatlora.guard.gates import llama_cpp_failed, llama_cpp_gates, llama_cpp_skipped
from qatlora.guard.runtime import RuntimeTask, judge_in_llama_cpp
from qatlora.llamacpp.kld_base import bytes_per_token
from qatlora.llamacpp.kld_statistics import MIN_TOKENS
from qatlora.llamacpp.tools import INSTALL, find_tool
from qatlora.memory import available_bytes
from qatlora.report.results import GateResult
from qatlora.state import Run

_TOOLS = ("llama-perplexity", "llama-quantize")
# Per parameter: the model in fp32, and as much again in llama.cpp; on disk F32, BF16 and Q4_0.
_MEMORY_BYTES, _DISK_BYTES = 8, 7
_BASE_FILES = 2


def runtime_gates(state: Run) -> list[GateResult]:
    """Gate 5, or why it was skipped; leaves the figures for the report."""
    cfg = state.cfg
    rows = _windows(state)
    reason = _why_not(state, rows)
    if reason is not None:
        return [llama_cpp_skipped(reason, cfg.guard)]
    teacher = _teacher(state)
    task = RuntimeTask(
        adapted=state.adapted,
        candidate=state.candidate,
        other_type=cfg.export.other_type.name,
        teacher=teacher,
        rows=rows,
        with_base=cfg.distill.train is Trained.weights and teacher is not None,
    )
    try:
        with state.bar("judge in llama.cpp", task.num_models, "models") as advance:
            state.runtime = judge_in_llama_cpp(task, advance)
    except ToolError as problem:
        return [llama_cpp_failed(str(problem), cfg.guard)]
    return llama_cpp_gates(state.runtime, cfg.guard)


def announce_runtime(state: Run) -> None:
    """Say before the long work that gate 5 will be skipped for want of tools."""
    reason = _absent(state)
    if reason is not None:
        progress.say(f"The file will not be judged in llama.cpp: {reason}.")


def _windows(state: Run) -> list[Row]:
    (general,) = (text for text in state.batches.texts if text.name == "general")
    settings = state.cfg.guard
    return half_scored_windows(
        general.rows,
        expected_bos(state.tokenizer),
        settings.llama_cpp_window_tokens,
        settings.llama_cpp_windows,
    )


def _teacher(state: Run) -> Path | None:
    """Its checkpoint; None without one, as for a cache, which is there to spare its memory."""
    teacher = state.cfg.teacher
    if teacher.kind in (TeacherKind.none, TeacherKind.cache):
        return None
    return Path(teacher.path) if teacher.path else state.source.folder


def _absent(state: Run) -> str | None:
    if not state.cfg.guard.llama_cpp:
        return "guard.llama_cpp=false"
    missing = [name for name in _TOOLS if find_tool(name) is None]
    return f"{' and '.join(missing)} not found; build with `{INSTALL}`" if missing else None


def _why_not(state: Run, rows: list[Row]) -> str | None:
    absent = _absent(state)
    if absent is not None:
        return absent
    num_scored = sum(row.num_scored_tokens for row in rows)
    if num_scored < MIN_TOKENS:
        return (
            f"the held-out general text gives {num_scored} scored tokens in {len(rows)} windows "
            f"and {MIN_TOKENS} are needed; raise data.eval_tokens"
        )
    return _too_large(state, num_scored)


def _too_large(state: Run, num_scored: int) -> str | None:
    parameters = state.base.num_parameters
    vocab_size = state.base.model.get_output_embeddings().weight.shape[0]
    disk = _DISK_BYTES * parameters + _BASE_FILES * bytes_per_token(vocab_size) * num_scored
    for what, needed, free in (
        ("memory", _MEMORY_BYTES * parameters, available_bytes()),
        ("disk", disk, shutil.disk_usage(state.candidate.path.parent).free),
    ):
        if needed > free:
            return f"{needed / 1e9:.1f} GB of {what} are needed and {free / 1e9:.1f} GB are free"
    return None
