"""Gates of recipe=validate: from figures to `GateResult`s, as the guard's."""

from collections.abc import Collection
from dataclasses import dataclass

from qatlora.base.grids import ON_GRID_SHARE
from qatlora.config import ValidateConfig
from qatlora.evaluate import Mean
from qatlora.guard.gates import at_least, at_most, skipped
from qatlora.report.results import GateResult
from qatlora.report.results_validate import KeptEffect

_CLEAR_EFFECT = 2.0
"""Standard errors by which the loss must have fallen to be the measure of the effect."""


@dataclass(frozen=True)
class EffectFigures:
    """One export of a merged model on the held-out chats.

    Attributes:
        gain: loss of the base minus loss of the merged model, in bf16.
        export_gain: loss of the base minus loss of the export.
        moved: mean KL(merged || base): how far the merge moved the model.
        lost: mean KL(merged || export).
    """

    gain: Mean
    export_gain: Mean
    moved: float
    lost: float


def kept_effect(figures: EffectFigures) -> KeptEffect:
    """Share of the effect that the export keeps, by the loss and by the KLD.

    The loss decides where it fell by two standard errors. By the KLD, 0 means that the export is as
    far from the merged model as the base is: the usual fate of a merge that rounding undoes.
    """
    clear = figures.gain.value > _CLEAR_EFFECT * figures.gain.stderr
    by_loss = figures.export_gain.value / figures.gain.value if clear else None
    by_kld = 1 - figures.lost / figures.moved if figures.moved > 0 else None
    return KeptEffect(by_loss=by_loss, by_kld=by_kld, kld=figures.lost)


def effect_gate(
    by_llama_cpp: KeptEffect, by_grid: KeptEffect, settings: ValidateConfig
) -> GateResult:
    """The better of both ways to Q4_0 keeps enough of the effect."""
    shares = [deciding_share(kept) for kept in (by_llama_cpp, by_grid)]
    if shares[0] is None or shares[1] is None:
        nothing = "the merged model is the base: nothing was merged"
        return at_least("effect_kept", 0.0, settings.min_share_kept, "share", nothing)
    measure = "KLD" if by_grid.by_loss is None else "loss"
    return at_least(
        "effect_kept",
        max(shares[0], shares[1]),
        settings.min_share_kept,
        "share",
        f"of the merge's effect by the {measure} on held-out chats, llama-quantize's Q4_0 keeps "
        f"{shares[0]:.1%} and qatlora's {shares[1]:.1%}",
    )


def deciding_share(kept: KeptEffect) -> float | None:
    """By the loss where the merge clearly lowered it, else by the KLD."""
    return kept.by_kld if kept.by_loss is None else kept.by_loss


def on_grid_gate(base_share: float, merged_share: float) -> GateResult:
    """A merge of a base on a grid is on a grid, too."""
    gate = at_least(
        "on_grid",
        merged_share,
        ON_GRID_SHARE,
        "share",
        f"of the trained blocks lie on a Q4_0 grid; in the base {base_share:.1%}",
    )
    if base_share >= ON_GRID_SHARE:
        return gate
    return skipped(gate, "the base lies on no grid")


def gguf_gates(
    kld_mean: float,
    exact_share: float,
    on_grid_share: float,
    types: Collection[str],
    settings: ValidateConfig,
) -> list[GateResult]:
    """A finished GGUF beside the checkpoint that it was made from.

    Args:
        kld_mean: KL(checkpoint || GGUF), both in transformers.
        exact_share: share of the trained blocks that the file reproduces to the last bit of bf16.
        on_grid_share: share of them that a Q4_0 file could reproduce.
        types: in which the file stores the matrices of its layers.
        settings: the limits.
    """
    message = f"of the trained blocks are reproduced by the file's {', '.join(sorted(types))}"
    blocks = at_least("gguf_blocks", exact_share, ON_GRID_SHARE, "share", message)
    if on_grid_share < ON_GRID_SHARE:
        blocks = skipped(blocks, "the checkpoint lies on no grid")
    limit = settings.gguf_kld_max_nats
    kld = at_most("gguf_kld", kld_mean, limit, "nats/token", "KLD from the checkpoint to the GGUF")
    return [blocks, kld]
