"""Train adapters or latents: settings -> SFTConfig, callbacks, optimizer -> TrainResult."""

import dataclasses
import math
from pathlib import Path
from typing import Protocol

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl import SFTConfig

from qatlora import processes
from qatlora.adapters.model import ParameterGroups
from qatlora.config import LoggingConfig, TrainConfig
from qatlora.data.rows import Row
from qatlora.errors import ConfigError
from qatlora.memory import peak_rss_bytes
from qatlora.report.results import TrainPoint, TrainResult
from qatlora.report.results_curve import CurvePoint
from qatlora.train import checkpoints
from qatlora.train.interruption import Interruption
from qatlora.train.logs import EvalLog, OnEval, OnPoint, OnStep, PointFile, StepLog
from qatlora.train.optimizers import build_optimizer
from qatlora.train.trainer import GridTrainer, Objective, RowCollator, training_record


class Trainable(Protocol):
    """What can be trained: a `GridModel`, or another tool's adapters to compare with."""

    @property
    def model(self) -> torch.nn.Module:
        """The PEFT model; its trainable parameters are trained."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""

    @property
    def num_trainable(self) -> int:
        """Number of trainable parameters."""

    def parameter_groups(self) -> ParameterGroups:
        """The trainable parameters by what they move."""

    def keep_blocks(self, keep: bool) -> None:
        """Keep deployed blocks from the forward to the backward pass, or not."""


def train(
    adapted: Trainable,
    rows: list[Row],
    objective: Objective,
    settings: TrainConfig,
    logging: LoggingConfig,
    *,
    run_dir: Path,
    seed: int,
    bf16: bool,
    on_step: OnStep,
    on_point: OnPoint | None = None,
    on_eval: OnEval | None = None,
) -> TrainResult:
    """Run the optimizer over `rows` in their order, `rows_per_step` at a time.

    Checkpoints go to `run_dir`/checkpoints, one JSON line per step to `run_dir`/train_log.jsonl.
    `on_point` gets each of these lines. What `on_eval` scores, every `settings.eval_steps` and at
    both ends, goes to `run_dir`/eval_log.jsonl. With `settings.resume` the run goes on from the
    last checkpoint, where there is one.

    Raises:
        ConfigError: under torchrun, rows that cannot be shared out evenly.
        TrainError: a loss or gradient that is not finite; the last checkpoint stays.
        Interrupted: SIGINT or SIGTERM; a checkpoint was written.
    """
    checkpoint = processes.first_before_rest(
        lambda: checkpoints.begin(run_dir, resume=settings.resume)
    )
    adapted.keep_blocks(settings.keep_blocks)
    run_dir.mkdir(parents=True, exist_ok=True)
    losses = PointFile(run_dir / "train_log.jsonl", TrainPoint)
    scores = PointFile(run_dir / "eval_log.jsonl", CurvePoint)
    log, interruption = StepLog(losses, on_step, on_point), Interruption()
    scoring = [EvalLog(scores, on_eval, settings.eval_steps, log)] if on_eval else []
    trainer = GridTrainer(
        objective=objective,
        model=adapted.model,
        args=_arguments(settings, logging, run_dir, seed, bf16=bf16),
        train_dataset=Dataset.from_list([training_record(row) for row in rows]),
        data_collator=RowCollator(_pad_token_id(adapted.tokenizer)),
        processing_class=adapted.tokenizer,
        callbacks=[log, interruption, *scoring],
        optimizers=(build_optimizer(adapted.parameter_groups(), settings, seed), None),
    )
    trainer.remove_callback(PrinterCallback)
    with interruption.watching(run_dir):
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    adapted.model.eval()
    history = losses.points
    trained = rows[: trainer.state.global_step * settings.rows_per_step]
    return TrainResult(
        steps=trainer.state.global_step,
        tokens=sum(row.num_scored_tokens for row in trained),
        seconds=sum(point.seconds for point in history),
        loss_first=history[0].loss,
        loss_last=history[-1].loss,
        peak_rss_bytes=peak_rss_bytes(),
        history=history,
        curve=scores.points,
    )


def _arguments(
    settings: TrainConfig, logging: LoggingConfig, run_dir: Path, seed: int, *, bf16: bool
) -> SFTConfig:
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(run_dir / checkpoints.CHECKPOINTS),
        use_cpu=on_cpu,
        bf16=bf16,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.micro_batch_rows,
        gradient_accumulation_steps=_micro_batches_per_process(settings),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler.name,
        warmup_steps=math.ceil(settings.warmup_ratio * settings.max_steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_steps=settings.save_steps,
        logging_steps=logging.log_steps,
        logging_nan_inf_filter=False,  # a loss that is not finite must be seen, not smoothed over
        report_to="none",  # qatlora.tracking does that, and after training, too
        seed=seed,
        data_seed=seed,
        train_sampling_strategy="sequential",  # the rows come mixed and in order
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,  # the rows are already cut
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,  # all that trains takes part in every loss
        # DDP would send the packed base from the first process in every step, though all processes
        # load the same base and draw from the same seed.
        ddp_broadcast_buffers=False,
        disable_tqdm=True,
    )


def fit_to_processes(settings: TrainConfig) -> TrainConfig:
    """Make micro-batches small enough for every process to get one of each step.

    Raises:
        ConfigError: a step's rows cannot be shared out evenly.
    """
    share = settings.rows_per_step // processes.count()
    rows = min(settings.micro_batch_rows, max(1, share))
    fitted = dataclasses.replace(settings, micro_batch_rows=rows)
    _micro_batches_per_process(fitted)
    return fitted


def _micro_batches_per_process(settings: TrainConfig) -> int:
    """Of a step; `rows_per_step` are those of all processes that torchrun has started."""
    num_processes = processes.count()
    each, rest = divmod(settings.rows_per_step, settings.micro_batch_rows * num_processes)
    if rest:
        raise ConfigError(
            f"train.rows_per_step={settings.rows_per_step} with train.micro_batch_rows="
            f"{settings.micro_batch_rows} in {num_processes} processes: every process must get the "
            "same number of micro-batches. Make rows_per_step a multiple of micro_batch_rows times "
            "the processes."
        )
    return each


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
