"""Runs of the whole pipeline on a tiny base: their data and their settings."""

import json
from pathlib import Path

import pytest

from qatlora import pipeline
from qatlora.config import DataKind, Effect, LatentSteps, RootConfig, Storage, Trained

STAGES = [
    "preflight", "load_data", "load_base", "attach", "evaluate_base", "train", "save_adapter",
    "evaluate_trained", "write_candidate", "guard", "publish", "report",
]  # fmt: skip

DISTILL_STAGES = [
    "preflight", "load_data", "load_base", "attach", "evaluate_base", "evaluate_reference", "train",
    "evaluate_trained", "write_candidate", "guard", "publish", "save_base", "report",
]  # fmt: skip


def write_data(folder: Path) -> dict[str, Path]:
    """Conversations and general text, small enough for a model of two layers."""
    chats, text = folder / "chats.jsonl", folder / "general.txt"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Say the number {number} in one short sentence."},
                {"role": "assistant", "content": f"The number is {number}, and that is all."},
            ]
        }
        for number in range(60)
    ]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    paragraphs = [
        f"Paragraph {number}. The quick brown fox jumps over {number} lazy dogs and then runs home "
        "to eat a warm supper with seven old friends who never ask where it has been all day."
        for number in range(60)
    ]
    text.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return {"chats": chats, "text": text}


def settings(base: Path, data: dict[str, Path], run_dir: Path) -> RootConfig:
    """Four steps on a tiny base, with a guard that asks for no effect."""
    cfg = RootConfig(stages=list(STAGES), run_dir=str(run_dir), seed=1)
    cfg.card.name = "chat_sft"
    cfg.base.path, cfg.base.name = str(base), "tiny"
    cfg.data.kind, cfg.data.path = DataKind.jsonl, str(data["chats"])
    cfg.data.general, cfg.data.max_length_tokens = str(data["text"]), 128
    cfg.data.eval_tokens, cfg.data.num_prompts = 64, 1
    cfg.train.max_steps, cfg.train.rows_per_step, cfg.train.micro_batch_rows = 4, 4, 2
    cfg.train.learning_rate, cfg.train.save_steps = 2e-2, 2
    cfg.evaluate.sample_max_new_tokens = 4
    cfg.guard.require_effect, cfg.guard.drift_kld_increase_max_nats = False, 10.0
    cfg.logging.progress_bars = False
    return cfg


def distill(base: Path, data: dict[str, Path], run_dir: Path, steps: str = "frozen") -> RootConfig:
    """Four steps of KL alone on a tiny base."""
    cfg = settings(base, data, run_dir)
    cfg.stages, cfg.card.name = list(DISTILL_STAGES), "qat_distill"
    cfg.storage.kind = Storage.bf16
    cfg.distill.train, cfg.distill.steps = Trained.weights, LatentSteps[steps]
    cfg.teacher.ce_weight, cfg.teacher.kl_weight = 0.0, 0.25
    cfg.data.replay_rows_per_step = 3
    cfg.train.learning_rate, cfg.train.steps_learning_rate = 0.07, 1e-2
    cfg.guard.effect = Effect.teacher_kld
    return cfg


def run_killed(cfg: RootConfig, after_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until this optimizer step is done, and die before it is logged, scored or saved."""

    class Killed(BaseException):
        """Ends a run as a kill does, but for this process."""

    def dies(self, args, state, control, **_) -> None:
        if state.global_step == after_step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("qatlora.train.logs.StepLog.on_step_end", dies)
        with pytest.raises(Killed):
            pipeline.run(cfg)
