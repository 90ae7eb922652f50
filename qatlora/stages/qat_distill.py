"""Stages of recipe=qat_distill: what llama.cpp alone would make of the base, and the new base."""

import dataclasses

from qatlora import __version__
from qatlora.base.to_q4_0 import by_llama_cpp
from qatlora.export.checkpoint import save_checkpoint
from qatlora.report.results import REFERENCE
from qatlora.state import Run


def evaluate_reference(state: Run) -> None:
    """Score what llama-quantize makes of the checkpoint: what a user has without this recipe."""
    adapted, evaluation = state.adapted, state.evaluation
    blocks = by_llama_cpp(state.source, state.base.grid, state.device)
    with (
        adapted.held_weights(state.dtype, blocks),
        state.bar(f"evaluate {REFERENCE}", evaluation.num_tokens, "tokens") as advance,
    ):
        evaluation.measure(REFERENCE, adapted.model, advance)


def save_base(state: Run) -> None:
    """Write the deployed model as a bf16 checkpoint on its grid: a base for later runs."""
    made_by = {
        "qatlora": __version__,
        "recipe": state.cfg.card.name,
        "base": state.base.name,
        "base_digest": state.base.digest,
        "rule": str(dataclasses.asdict(state.adapted.rule)),
    }
    with state.bar("save base", len(state.base.grid), "tensors") as advance:
        state.checkpoint = save_checkpoint(state.adapted, state.run_dir / "base", made_by, advance)
