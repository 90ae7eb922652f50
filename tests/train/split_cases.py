"""The same two steps on a tiny model, with the rows of a step cut in different ways.

Run as a script by torchrun it is one process of several: FOLDER BASE MICRO_BATCH_ROWS.
"""

import sys
from pathlib import Path

import torch
from loaded_cases import adapted_model
from safetensors.torch import load_file
from sample_text import sentences

from qatlora.adapters.attach import AdaptedModel
from qatlora.base.load import load_plain
from qatlora.config import LoggingConfig, LrScheduler, TeacherConfig, TrainConfig
from qatlora.data.rows import IGNORED, Row
from qatlora.report.results import TrainPoint
from qatlora.train.checkpoints import CHECKPOINTS
from qatlora.train.objective import build_objective
from qatlora.train.run import train
from qatlora.train.teachers import RunningTeacher

NUM_STEPS, ROWS_PER_STEP = 2, 4


def rows_of(adapted: AdaptedModel) -> list[Row]:
    """Rows of different lengths with different shares of scored tokens, every fourth general."""
    rows = []
    for number, sentence in enumerate(sentences(NUM_STEPS * ROWS_PER_STEP)):
        ids = adapted.tokenizer(sentence * (1 + number % 3)).input_ids[: 20 + 7 * number]
        is_general = number % ROWS_PER_STEP == 3
        unscored = 1 if is_general else 2 + 3 * (number % 3)
        labels = [IGNORED] * unscored + ids[unscored:]
        rows.append(Row(ids, labels, "general" if is_general else "chat"))
    return rows


def trained(base: Path, run_dir: Path, micro_batch_rows: int) -> list[TrainPoint]:
    """Train in float32; the parameters after the last step lie in its checkpoint."""
    adapted = adapted_model(base, storage="bf16", kind="both")
    for parameter in adapted.model.parameters():  # embeddings and norms: no activation in bf16
        parameter.data = parameter.data.float()
    teacher = RunningTeacher(load_plain(base, torch.device("cpu"), torch.float32))
    settings = TrainConfig(
        max_steps=NUM_STEPS,
        rows_per_step=ROWS_PER_STEP,
        micro_batch_rows=micro_batch_rows,
        lr_scheduler=LrScheduler.constant,
        warmup_ratio=0.0,
        save_steps=NUM_STEPS,
        device="cpu",
    )
    weights = TeacherConfig(ce_weight=1.0, kl_weight=0.5, general_kl_weight=2.0)
    return train(
        adapted,
        rows_of(adapted),
        build_objective(weights, teacher, torch.float32),
        settings,
        LoggingConfig(progress_bars=False),
        run_dir=run_dir,
        seed=0,
        bf16=False,
        on_step=lambda _: None,
    ).history


def parameters(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / CHECKPOINTS / f"checkpoint-{NUM_STEPS}" / "trainable.safetensors")


if __name__ == "__main__":
    folder, base, rows = sys.argv[1:]
    trained(Path(base), Path(folder), int(rows))
