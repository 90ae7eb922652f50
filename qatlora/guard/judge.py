"""From gates to a verdict: `GuardPassed`, or `GuardFailed` with gate, figure and remedy."""

from qatlora import files
from qatlora.errors import GuardFailed
from qatlora.export.candidate import Candidate, GuardPassed
from qatlora.report.results import GateResult, GuardResult

_REMEDIES = {
    "identity": "The file is not the model that was trained: export again with recipe=export_gguf; "
    "if it fails again, the converter or the adapter's base has changed.",
    "self_kld": "The evaluation is not repeatable on this machine; no figure can be trusted.",
    "before_after_kld_mean": "The file holds other weights than were trained: look at the tensors "
    "outside the Q4_0 list (export.other_type).",
    "before_after_kld_p99": "As for the mean: look at export.other_type.",
    "before_after_same_top": "As for the mean: look at export.other_type.",
    "effect_changed": "The adapter moved nothing: raise train.learning_rate or train.max_steps, or "
    "set guard.require_effect=false for a smoke run.",
    "effect_loss": "Nothing measurable was learned: train longer (train.max_steps), raise "
    "train.learning_rate, or evaluate on more tokens (data.eval_tokens).",
    "effect_kld": "The model came no nearer to its teacher: train longer (train.max_steps), change "
    "train.learning_rate, or evaluate on more tokens (data.eval_tokens).",
    "drift": "The model forgot too much: raise teacher.general_kl_weight, lower "
    "train.learning_rate, or accept it with a larger guard.drift_kld_increase_max_nats.",
    "llama_cpp_weights": "llama.cpp computes another model from the file than was trained: the "
    "converter or the pinned version does not know this architecture as transformers does.",
    "llama_cpp": "The file runs otherwise than it was trained: look at llama_cpp_weights first, "
    "then check the pinned llama.cpp version (guard.llama_cpp=false leaves it out).",
    "llama_cpp_teacher": "As for llama_cpp; or measure more windows (guard.llama_cpp_windows).",
    "on_grid": "The merge took the base off its grid: train inside it (recipe=chat_sft).",
    "effect_kept": "Rounding to Q4_0 undoes the merge: train inside the grid (recipe=chat_sft with "
    "the same base and chats), or bring the merged checkpoint onto a grid (recipe=qat_distill).",
    "gguf_blocks": "The file was quantized anew, or to a type that cannot hold a Q4_0 grid: "
    "export the blocks themselves "
    "(recipe=export_gguf adapter.path=RUN/adapter).",
    "gguf_kld": "The file is another model than the checkpoint: look at the types of its tensors.",
}


def verdict(gates: list[GateResult], override: str | None) -> GuardResult:
    """Collect the gates; passed means that no gate failed."""
    passed = all(gate.status != "failed" for gate in gates)
    return GuardResult(passed=passed, gates=gates, override=None if passed else override)


def permit(candidate: Candidate, result: GuardResult) -> GuardPassed:
    """The proof that `publish` asks for.

    Raises:
        GuardFailed: a gate failed and no override was given; the candidate is removed.
    """
    if not result.passed and result.override is None:
        candidate.discard()
        raise GuardFailed(f"Nothing was published. {explain(result)}")
    return GuardPassed(files.sha256_of_file(candidate.path), result.override)


def explain(result: GuardResult) -> str:
    """One sentence per failed gate: which, by how much, what to change."""
    sentences = []
    for gate in result.gates:
        if gate.status == "failed":
            value = "nothing" if gate.value is None else f"{gate.value:.6g}"
            sentences.append(
                f"Gate {gate.name}: {value} {gate.unit} where the limit is {gate.limit:.6g} "
                f"({gate.message}). {_REMEDIES[gate.name]}"
            )
    return " ".join(sentences)
