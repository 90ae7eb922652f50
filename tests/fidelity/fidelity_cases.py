"""Settings of a comparison on a tiny checkpoint."""

from pathlib import Path
from typing import Any

from qatlora import pipeline
from qatlora.config import DataKind, Precision, RootConfig
from qatlora.report.results import RunReport


def settings(base: Path, data: dict[str, Path], run_dir: Path, **fidelity: Any) -> RootConfig:
    """Three storages of `base` on a text file and on chats, 200 tokens each."""
    cfg = RootConfig(stages=["preflight", "fidelity", "report"], run_dir=str(run_dir))
    cfg.card.name = "fidelity"
    cfg.base.path, cfg.base.name = str(base), "tiny"
    cfg.data.kind, cfg.data.path = DataKind.jsonl, str(data["chats"])
    cfg.fidelity.texts = [str(data["text"]), "chats"]
    cfg.fidelity.tokens_per_text, cfg.fidelity.window_tokens = 400, 64
    cfg.fidelity.precision, cfg.fidelity.worst_tokens = Precision.fp32, 3
    for key, value in fidelity.items():
        setattr(cfg.fidelity, key, value)
    cfg.logging.progress_bars = False
    return cfg


def compare(base: Path, data: dict[str, Path], run_dir: Path, **fidelity: Any) -> RunReport:
    """Run the recipe."""
    return pipeline.run(settings(base, data, run_dir, **fidelity))
