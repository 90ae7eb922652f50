"""Gate 5: the candidate in llama.cpp, beside the model that was trained and a naive control.

The trained model and the teacher run in transformers in float32 and write base files; then one
program, with the same flags, compares with them:

    candidate, decoded to F32    weights alone: activations stay in float, nothing else is rounded
    candidate                    what people run: activations are rounded to Q8_0 on a CPU
    llama-quantize control       the same model merged to bf16 and quantized by llama.cpp's rule
    base, llama-quantize         where a base's own weights were trained: what llama.cpp alone makes
                                 of that base

The trained model is made of the deployed blocks, not read from the file, so a file that holds
something else is far from it. Everything runs on the CPU, as llama.cpp's tools do here.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from qatlora.adapters.model import GridModel
from qatlora.adapters.plain import deployed_model
from qatlora.base.load import load_plain
from qatlora.evaluate import Row
from qatlora.evaluate.logits import scored_logits
from qatlora.export.candidate import Candidate
from qatlora.export.plain_gguf import write_plain_gguf
from qatlora.llamacpp.kld_base import KldBase, write_base
from qatlora.llamacpp.kld_statistics import Statistics, score_against, statistics_of
from qatlora.llamacpp.perplexity import kl_divergence
from qatlora.llamacpp.tools import convert_types, quantize
from qatlora.report.results_runtime import (
    BASE,
    CANDIDATE,
    CANDIDATE_F32,
    CONTROL,
    TEACHER_FP32,
    TRAINED_FP32,
    RuntimeKld,
    RuntimeResult,
    RuntimeRow,
)

_CPU = torch.device("cpu")

OnModel = Callable[[int], None]


@dataclass(frozen=True)
class RuntimeTask:
    """What is judged.

    Attributes:
        adapted: the trained model.
        candidate: its file.
        other_type: GGUF type of the tensors that are not Q4_0.
        teacher: folder of the teacher, None without one.
        rows: full windows, the second half of each scored.
        with_base: quantize the base by llama.cpp's rule, too, and compare that with the teacher,
            which must be there.
    """

    adapted: GridModel
    candidate: Candidate
    other_type: str
    teacher: Path | None
    rows: Sequence[Row]
    with_base: bool = False

    @property
    def num_models(self) -> int:
        """How many are measured, the trained model in transformers among them."""
        return 4 + self.with_base


@dataclass(frozen=True)
class _Bases:
    """Base files of the trained model and of the teacher."""

    trained: KldBase
    teacher: KldBase | None


@dataclass(frozen=True)
class _File:
    """A model as a file, and which of the two it is compared with."""

    name: str
    path: Path
    to_trained: bool = True
    to_teacher: bool = True


def judge_in_llama_cpp(task: RuntimeTask, on_model: OnModel) -> RuntimeResult:
    """Measure the models; `on_model(1)` is called after each.

    Raises:
        ToolError: a program of llama.cpp is missing or failed.
    """
    scratch = task.candidate.path.parent / "llama_cpp"
    scratch.mkdir()
    try:
        bases, rows = _write_bases(task, scratch)
        on_model(1)
        for file in _files(task, scratch):
            rows.append(_run(file, bases))
            on_model(1)
    finally:
        shutil.rmtree(scratch)
    num_windows, window_tokens = bases.trained.tokens.shape
    return RuntimeResult(num_windows, window_tokens, len(bases.trained.targets), rows)


def _write_bases(task: RuntimeTask, scratch: Path) -> tuple[_Bases, list[RuntimeRow]]:
    """Both base files, and what transformers finds of the two models."""
    tokens = np.array([row.input_ids for row in task.rows], dtype=np.int32)

    def write(name: str, model: PreTrainedModel) -> KldBase:
        logits = scored_logits(model, task.rows)
        vocab_size = model.get_output_embeddings().weight.shape[0]
        return write_base(scratch / name, tokens, vocab_size, logits)

    teacher = None
    if task.teacher is not None:
        teacher = write("teacher.kld", load_plain(task.teacher, _CPU, torch.float32))
    trained = write("trained.kld", deployed_model(task.adapted, task.other_type, _CPU))
    scores = score_against(teacher or trained, trained.log_probs(), normalized=True)
    statistics = statistics_of(scores)
    rows = []
    if teacher:
        rows.append(RuntimeRow(TEACHER_FP32, *_perplexity(statistics, "base"), None, None))
    to_teacher = _kld(statistics if teacher else None)
    rows.append(RuntimeRow(TRAINED_FP32, *_perplexity(statistics), None, to_teacher))
    return _Bases(trained, teacher), rows


def _files(task: RuntimeTask, scratch: Path) -> Iterator[_File]:
    """The files; a large one is removed as soon as nothing is made of it any more."""
    candidate = task.candidate.path
    decoded, merged, control = (scratch / f"{name}.gguf" for name in ("f32", "bf16", "control"))
    base = task.adapted.base
    convert_types(candidate, decoded, "F32")
    yield _File(CANDIDATE_F32, decoded, to_teacher=False)  # costs a run and tells nothing more
    yield _File(CANDIDATE, candidate)
    convert_types(decoded, merged, "BF16")
    decoded.unlink()
    quantize(merged, control, task.other_type)
    merged.unlink()
    yield _File(CONTROL, control)
    if task.with_base:
        write_plain_gguf(base.source, base.tied, merged)
        quantize(merged, control, task.other_type)
        merged.unlink()
        yield _File(BASE, control, to_trained=False)


def _run(file: _File, bases: _Bases) -> RuntimeRow:
    to_trained = to_teacher = None
    if file.to_trained:
        to_trained = kl_divergence(file.path, bases.trained)
    if file.to_teacher and bases.teacher is not None:
        to_teacher = kl_divergence(file.path, bases.teacher)
    statistics = to_trained or to_teacher
    assert statistics is not None, "a file is compared with something"
    return RuntimeRow(file.name, *_perplexity(statistics), _kld(to_trained), _kld(to_teacher))


def _perplexity(statistics: Statistics, whose: str = "Q") -> tuple[float, float]:
    figure = statistics[f"Mean PPL({whose})"]
    assert figure.error is not None
    return figure.value, figure.error


def _kld(statistics: Statistics | None) -> RuntimeKld | None:
    if statistics is None:
        return None
    mean = statistics["Mean KLD"]
    assert mean.error is not None
    return RuntimeKld(
        mean=mean.value,
        stderr=mean.error,
        median=statistics["Median KLD"].value,
        p99=statistics["99.0% KLD"].value,
        same_top=statistics["Same top p"].value / 100,
        rms_dp=statistics["RMS Δp"].value / 100,
    )
