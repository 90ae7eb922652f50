"""Gates 2 to 5, each from figures to a `GateResult`; gate 1 is `qatlora.guard.identity`.

    2  before/after   the model read back from the file against the model as trained
    3  effect         something changed, and the held-out loss or the KLD to the teacher fell
    4  drift          how much further from the teacher the merged model is on general text
    5  llama_cpp      the same in the real runtime

A gate never prints and never raises: `qatlora.guard.judge` decides what follows.
"""

import math

import numpy as np

from qatlora.config import Effect, GuardConfig
from qatlora.evaluate import KldStatistics, Mean
from qatlora.report.results import GateResult
from qatlora.report.results_runtime import (
    CANDIDATE,
    CANDIDATE_F32,
    CONTROL,
    TRAINED_FP32,
    RuntimeResult,
    RuntimeRow,
)

_EFFECTS = {
    Effect.task_loss: ("effect_loss", "held-out loss"),
    Effect.teacher_kld: ("effect_kld", "KLD to the teacher on general text"),
}


def before_after_gates(
    self_kld_max: float, roundtrip: dict[str, KldStatistics], settings: GuardConfig
) -> list[GateResult]:
    """KLD from the trained model to the one read back from the candidate, on every text.

    Args:
        self_kld_max: largest KLD of the trained model to itself, measured first: anything but 0
            would mean that the figures below cannot be trusted.
        roundtrip: text name -> KLD(trained || read back).
        settings: the limits.
    """
    # numpy's maximum of anything and NaN is NaN, which fails; Python's may be the other value.
    mean = float(np.max([summary.mean for summary in roundtrip.values()]))
    p99 = float(np.max([summary.p99 for summary in roundtrip.values()]))
    same_top = float(np.min([summary.same_top for summary in roundtrip.values()]))
    worst = float(np.max([summary.max for summary in roundtrip.values()]))
    median = float(np.max([summary.median for summary in roundtrip.values()]))
    where = " and ".join(roundtrip)
    return [
        at_most("self_kld", self_kld_max, 0.0, "nats", "largest KLD of the model to itself"),
        at_most(
            "before_after_kld_mean",
            mean,
            settings.roundtrip_kld_mean_max_nats,
            "nats/token",
            f"trained model against the file read back, on {where}: "
            f"median {median:.2g}, largest {worst:.2g}",
        ),
        at_most(
            "before_after_kld_p99",
            p99,
            settings.roundtrip_kld_p99_max_nats,
            "nats/token",
            "99th percentile of the same",
        ),
        at_least(
            "before_after_same_top",
            same_top,
            settings.roundtrip_same_top_min_share,
            "share",
            "tokens whose most probable next token is the same",
        ),
    ]


def effect_gates(num_changed: int, improvement: Mean, settings: GuardConfig) -> list[GateResult]:
    """At least one code or step changed, and the merged model is better at what it was trained for.

    Args:
        num_changed: levels and steps that differ from the base's.
        improvement: the figure of `settings.effect`, base minus merged, paired by token: the loss
            on held-out chats, or the KLD to the teacher on held-out general text.
        settings: whether an effect is required, and by how many standard errors.
    """
    errors = improvement.value / improvement.stderr if improvement.stderr > 0 else 0.0
    name, figure = _EFFECTS[settings.effect]
    gates = [
        at_least("effect_changed", float(num_changed), 1.0, "levels and steps", "changed in all"),
        at_least(
            name,
            errors,
            settings.effect_min_standard_errors,
            "standard errors",
            f"{figure} fell by {improvement.value:.4f} +- {improvement.stderr:.4f} nats/token",
        ),
    ]
    if settings.require_effect:
        return gates
    return [skipped(gate, "guard.require_effect=false") for gate in gates]


def drift_gate(
    base: KldStatistics | None, merged: KldStatistics | None, settings: GuardConfig
) -> GateResult:
    """KLD to the teacher on general text: merged minus base, within the budget."""
    limit = settings.drift_kld_increase_max_nats
    if base is None or merged is None:
        gate = at_most("drift", None, limit, "nats/token", "KLD to the teacher on general text")
        return skipped(gate, "there is no teacher")
    return at_most(
        "drift",
        merged.mean - base.mean,
        limit,
        "nats/token",
        f"KLD to the teacher on general text went from {base.mean:.4f} to {merged.mean:.4f}",
    )


def llama_cpp_gates(measured: RuntimeResult, settings: GuardConfig) -> list[GateResult]:
    """The candidate in llama.cpp against the trained model, and both distances to the teacher."""
    rows = {row.model: row for row in measured.rows}
    control = _to_trained(rows[CONTROL])
    gates = [
        at_most(
            "llama_cpp_weights",
            _to_trained(rows[CANDIDATE_F32]),
            settings.llama_cpp_weights_kld_max_nats,
            "nats/token",
            "KLD from the trained model in fp32 to the file decoded to F32, in llama.cpp",
        ),
        at_most(
            "llama_cpp",
            _to_trained(rows[CANDIDATE]),
            settings.llama_cpp_kld_max_nats,
            "nats/token",
            f"the same to the file itself; to llama-quantize's Q4_0 of that model {control:.4g}",
        ),
    ]
    teacher = at_most(
        "llama_cpp_teacher",
        _teacher_difference(rows[TRAINED_FP32], rows[CANDIDATE]),
        settings.llama_cpp_teacher_kld_max_nats,
        "nats/token",
        "KLD to the teacher, llama.cpp against transformers",
    )
    without = rows[TRAINED_FP32].to_teacher is None
    return [*gates, skipped(teacher, "there is no teacher") if without else teacher]


def llama_cpp_skipped(reason: str, settings: GuardConfig) -> GateResult:
    """Nothing could be run, for a reason that says nothing about the file."""
    return skipped(llama_cpp_failed("the file in llama.cpp", settings), reason)


def llama_cpp_failed(message: str, settings: GuardConfig) -> GateResult:
    """llama.cpp was there and could not run the file."""
    limit = settings.llama_cpp_kld_max_nats
    return at_most("llama_cpp", None, limit, "nats/token", message)


def _to_trained(row: RuntimeRow) -> float:
    return math.nan if row.to_trained is None else row.to_trained.mean


def _teacher_difference(trained: RuntimeRow, candidate: RuntimeRow) -> float | None:
    if trained.to_teacher is None or candidate.to_teacher is None:
        return None
    return abs(candidate.to_teacher.mean - trained.to_teacher.mean)


def at_most(name: str, value: float | None, limit: float, unit: str, message: str) -> GateResult:
    """A gate for a figure that must not exceed its limit; None fails."""
    passed = value is not None and value <= limit
    return GateResult(name, value, limit, unit, "passed" if passed else "failed", message)


def at_least(name: str, value: float, limit: float, unit: str, message: str) -> GateResult:
    """A gate for a figure that must reach its limit; NaN fails."""
    status = "passed" if value >= limit else "failed"
    return GateResult(name, value, limit, unit, status, message)


def skipped(gate: GateResult, reason: str) -> GateResult:
    """The gate with its figure, but without a verdict."""
    message = f"{gate.message} (skipped: {reason})"
    return GateResult(gate.name, gate.value, gate.limit, gate.unit, "skipped", message)
