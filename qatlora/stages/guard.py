"""The stage `guard`: the candidate read back as a model of its own, before all gates."""

from qatlora import progress
from qatlora.base.from_gguf import model_from_gguf, packed_model_from_gguf
from qatlora.base.layout import plain_config
from qatlora.config import Effect
from qatlora.errors import AdapterError
from qatlora.evaluate import Mean, mean_difference
from qatlora.guard.gates import before_after_gates, drift_gate, effect_gates
from qatlora.guard.identity import identity_gate
from qatlora.guard.judge import verdict
from qatlora.report.json_report import ReportError
from qatlora.stages.report import report
from qatlora.stages.runtime import runtime_gates
from qatlora.state import Run


def guard(state: Run) -> None:
    """Read the candidate back as a model of its own and put all gates before it."""
    cfg, evaluation, candidate = state.cfg, state.evaluation, state.candidate
    if state.recorded.keys() != set(state.base.grid):
        raise AdapterError(
            f"The adapter recorded {len(state.recorded)} deployed tensors and the base has "
            f"{len(state.base.grid)} Q4_0 tensors; they must be the same. Set base.trained as in "
            "the adapter's run."
        )
    gates = [identity_gate(candidate, state.adapted.deployed(), state.recorded, cfg.guard)]
    with state.held_weights():
        self_kld = evaluation.self_kld_max(state.adapted.model)
    read_back = model_from_gguf if cfg.evaluate.hold_weights else packed_model_from_gguf
    if not cfg.evaluate.hold_weights:
        state.adapted.model.to("cpu")  # the file takes its place on the device
    config = plain_config(state.source.folder)
    merged = read_back(candidate.path, config, state.dtype).to(state.device).eval()
    roundtrip = state.measure("merged", merged, against="trained")
    del merged
    gates += before_after_gates(self_kld, roundtrip, cfg.guard)
    gates += effect_gates(state.num_changed, _improvement(state), cfg.guard)
    before, after = evaluation.kld("base", "general"), evaluation.kld("merged", "general")
    gates.append(drift_gate(before, after, cfg.guard))
    gates += runtime_gates(state)
    state.guard = verdict(gates, cfg.guard.override)
    if not state.guard.passed:
        try:
            report(state)  # a failed run leaves its figures, too
        except ReportError as problem:  # a figure is no number: the guard says so below
            progress.say(str(problem))


def _improvement(state: Run) -> Mean:
    """What the guard's effect is measured by, base minus merged, paired by token."""
    before, after = state.evaluation.scores["base"], state.evaluation.scores["merged"]
    if state.cfg.guard.effect is Effect.task_loss:
        return mean_difference(before["task"].nll, after["task"].nll)
    base_kld, merged_kld = before["general"].kld, after["general"].kld
    assert base_kld is not None, "the rules ask for a teacher"
    assert merged_kld is not None
    return mean_difference(base_kld, merged_kld)
