"""One trial: train a method at a learning rate and a seed, and measure what it became."""

import dataclasses
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qatlora.adapters.attach import AdaptedModel
from qatlora.base.load import LoadedBase
from qatlora.benchmark.build import Ground, build
from qatlora.benchmark.merged import merged_blocks, quantized_model, why_not_mergeable
from qatlora.benchmark.methods import METHODS
from qatlora.benchmark.plain_peft import PlainPeft
from qatlora.config import BenchmarkMethod, LoggingConfig, TeacherConfig, TeacherKind, TrainConfig
from qatlora.data.rows import Batches
from qatlora.errors import Interrupted
from qatlora.evaluate.models import Evaluation
from qatlora.grid import Q4Blocks
from qatlora.interrupts import interrupt
from qatlora.report.results_benchmark import Losses, MethodRun
from qatlora.train.objective import build_objective
from qatlora.train.run import train

_CROSS_ENTROPY = TeacherConfig(
    kind=TeacherKind.none, ce_weight=1.0, kl_weight=0.0, general_kl_weight=0.0
)


@dataclass(frozen=True)
class Trial:
    """What is trained.

    Attributes:
        method: which one.
        learning_rate: peak rate of the level factors, or of PEFT's own.
        steps_learning_rate: peak rate of the step factors.
        seed: of the adapter, its dither and the order of the rows.
    """

    method: BenchmarkMethod
    learning_rate: float
    steps_learning_rate: float
    seed: int


@dataclass(frozen=True)
class Bench:
    """What all trials of a run share.

    Attributes:
        ground: the base, which lies on the grid.
        base_blocks: module name -> blocks of the base, for the share of changed codes.
        evaluation: the held-out texts; its teacher is the base itself.
        train: the course; rates and device are set per trial.
    """

    ground: Ground
    base_blocks: dict[str, Q4Blocks]
    evaluation: Evaluation
    train: TrainConfig


def blocks_of(base: LoadedBase) -> dict[str, Q4Blocks]:
    """Module name -> the base's own blocks, of the trained modules."""
    return {name: base.model.get_submodule(name).base_blocks() for name in base.trained}


def run_trial(trial: Trial, bench: Bench, batches: Batches) -> MethodRun:
    """Train and measure; the model is gone afterwards.

    Raises:
        TrainError: the loss is not finite.
        Interrupted: SIGINT or SIGTERM; finished trials are kept.
        ToolError, ExportError: llama.cpp failed on a merged model.
    """
    adapted = build(METHODS[trial.method], bench.ground, trial.seed)
    settings = dataclasses.replace(
        bench.train,
        learning_rate=trial.learning_rate,
        steps_learning_rate=trial.steps_learning_rate,
        save_steps=bench.train.max_steps,
        resume=False,
        device=str(bench.ground.device),
    )
    scratch = Path(tempfile.mkdtemp(prefix="qatlora-trial-"))
    try:
        result = train(
            adapted,
            batches.train,
            build_objective(_CROSS_ENTROPY, None, bench.ground.compute_dtype),
            settings,
            LoggingConfig(progress_bars=False),
            run_dir=scratch,
            seed=trial.seed,
            bf16=bench.ground.compute_dtype == torch.bfloat16,
            on_step=lambda _: None,
        )
    except Interrupted as stopped:
        interrupt(stopped.number)  # the checkpoint that it names goes with the scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    unmerged, deployed, blocks = _measure(adapted, bench)
    codes, steps = _changed(bench.base_blocks, blocks)
    return MethodRun(
        method=trial.method.name,
        learning_rate=trial.learning_rate,
        seed=trial.seed,
        unmerged=unmerged,
        deployed=deployed,
        codes_changed=codes,
        steps_changed=steps,
        trainable_parameters=adapted.num_trainable,
        seconds=result.seconds,
    )


def measured(model: nn.Module, evaluation: Evaluation) -> Losses:
    """Mean losses of a model on the held-out texts, and the base's KLD to it."""
    evaluation.measure("trial", model, lambda _: None)
    scores = evaluation.scores.pop("trial")
    kld = scores["general"].kld
    assert kld is not None
    return Losses(
        **{text: scores[text].nll.double().mean().item() for text in scores},
        general_kld=kld.double().mean().item(),
    )


def _measure(
    adapted: AdaptedModel | PlainPeft, bench: Bench
) -> tuple[Losses, Losses | None, Iterable[tuple[str, Q4Blocks]]]:
    """Losses as trained and as deployed, and the deployed blocks."""
    evaluation, ground = bench.evaluation, bench.ground
    if isinstance(adapted, AdaptedModel):
        with adapted.held_weights(ground.compute_dtype):
            losses = measured(adapted.model, evaluation)
        return losses, losses, adapted.deployed()
    losses = measured(adapted.model, evaluation)
    blocks = merged_blocks(adapted, ground.source).items()
    if why_not_mergeable() is not None:
        return losses, None, blocks
    return losses, measured(quantized_model(adapted, ground), evaluation), blocks


def _changed(
    before: dict[str, Q4Blocks], after: Iterable[tuple[str, Q4Blocks]]
) -> tuple[float, float]:
    """Shares of levels and steps that differ, a step and its levels both negated being the same."""
    codes = steps = num_codes = num_steps = 0
    for name, blocks in after:
        if name in before:
            old_steps, old_levels = _positive(before[name])
            new_steps, new_levels = _positive(blocks)
            codes += int((old_levels != new_levels).sum())
            steps += int((old_steps != new_steps).sum())
            num_codes, num_steps = num_codes + new_levels.numel(), num_steps + new_steps.numel()
    return codes / num_codes, steps / num_steps


def _positive(blocks: Q4Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps without their sign, and the levels that go with them."""
    sign = torch.where(blocks.steps < 0, -1, 1).to(torch.int8).unsqueeze(-1)
    levels = blocks.levels.unflatten(-1, (blocks.steps.shape[-1], -1)) * sign
    return blocks.steps.abs(), levels.flatten(-2)
