"""What the kill test kills: runs on a tiny base, and what kills must not change of their end."""

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loaded_cases import adapted_model
from pipeline_cases import STAGES, distill, settings, write_data
from safetensors.torch import load_file

from qatlora import pipeline
from qatlora.__main__ import main as command_line
from qatlora.adapters.saved import save_adapter
from qatlora.config import RootConfig, Storage
from qatlora.distill import cache
from qatlora.files import sha256_of_file

NUM_STEPS = 24
SHARD_TOKENS = 256  # of a cache that is written in a second
SHARD_GB = 4e-5  # of a build: nearly every tensor in a file of its own
EVALUATED = STAGES[: STAGES.index("evaluate_trained") + 1]
TRAINED = {"checkpoint": "checkpoints/checkpoint-*", "training": "train_log.jsonl"}
REPORTED = {"reported": "report.json"}
EXPORTED = {"published": "*.gguf", "candidate": ".candidate"}
RUN_FIGURES = ("status", "task_perplexity", "general_perplexity", "general_kld_nats")


@dataclass(frozen=True)
class Case:
    """What the runs of all targets share."""

    base: Path
    data: dict[str, Path]
    adapter: Path

    @classmethod
    def make(cls, base: Path, folder: Path) -> "Case":
        """Write data and an adapter of the base into `folder`."""
        save_adapter(adapted_model(base), folder / "adapter")
        return cls(base, write_data(folder), folder / "adapter")


@dataclass(frozen=True)
class Target:
    """One kind of run.

    run: starts it in a run folder, or goes on there.
    work: files that are written in its long part alone.
    traces: name -> files that a run leaves in the folder, the furthest first; with these it ends.
    outcome: what of a finished folder is the same however often it was killed.
    """

    run: Callable[[Case, Path], object]
    work: str
    traces: dict[str, str]
    outcome: Callable[[Path], dict[str, Any]]


def chat_sft(case: Case, run_dir: Path) -> RootConfig:
    return resuming(settings(case.base, case.data, run_dir))


def qat_distill(case: Case, run_dir: Path) -> RootConfig:
    return resuming(distill(case.base, case.data, run_dir))


def resuming(cfg: RootConfig) -> RootConfig:
    cfg.train.max_steps, cfg.train.resume = NUM_STEPS, True
    return cfg


def export_gguf(case: Case, run_dir: Path) -> RootConfig:
    cfg = settings(case.base, case.data, run_dir)
    cfg.stages = [stage for stage in STAGES if stage not in ("train", "save_adapter", "report")]
    cfg.card.name, cfg.storage.kind = "export_gguf", Storage.q4_0
    cfg.adapter.path = str(case.adapter)
    return cfg


def q4_0_build(case: Case, run_dir: Path) -> RootConfig:
    cfg = settings(case.base, case.data, run_dir)
    cfg.stages, cfg.card.name = ["preflight", "build", "report"], "q4_0_build"
    cfg.storage.kind, cfg.build.max_shard_gb = Storage.q4_0, SHARD_GB
    return cfg


def teacher_cache(case: Case, run_dir: Path) -> RootConfig:
    cache._SHARD_TOKENS = SHARD_TOKENS
    cfg = settings(case.base, case.data, run_dir)
    cfg.stages = ["preflight", "load_data", "teacher_cache", "report"]
    cfg.card.name, cfg.train.max_steps = "teacher_cache", 2 * NUM_STEPS
    return cfg


def by_pipeline(settings_of: Callable[[Case, Path], RootConfig]) -> Callable[[Case, Path], object]:
    return lambda case, run_dir: pipeline.run(settings_of(case, run_dir))


def sweep(case: Case, folder: Path) -> None:
    """Two runs by the command line, which is the only way to start a sweep."""
    sys.argv = [
        "qatlora", "-m", "recipe=chat_sft", f"run_dir={folder}", f"base.path={case.base}",
        "data=jsonl", f"data.path={case.data['chats']}", f"data.general={case.data['text']}",
        "data.max_length_tokens=128", "data.eval_tokens=64", "data.num_prompts=0",
        "train.max_steps=8", "train.rows_per_step=4", "train.save_steps=2", "train.resume=true",
        "logging.progress_bars=false", f"stages=[{','.join(EVALUATED)},report]",
        "adapter.rank=4,8",
    ]  # fmt: skip
    command_line()


def digests(*patterns: str) -> Callable[[Path], dict[str, Any]]:
    """SHA-256 of the files, and the losses where the run has trained."""

    def outcome(run_dir: Path) -> dict[str, Any]:
        paths = [path for pattern in patterns for path in sorted(run_dir.glob(pattern))]
        logs = sorted(run_dir.rglob("train_log.jsonl"))
        return {str(path.relative_to(run_dir)): sha256_of_file(path) for path in paths} | {
            str(log.relative_to(run_dir)): _losses(log) for log in logs
        }

    return outcome


def cached_rows(folder: Path) -> dict[str, Any]:
    """Row -> its tensors, whatever file they are in; and the files of held-out texts."""
    found: dict[str, Any] = digests("teacher_cache/text-*", "teacher_cache/head*")(folder)
    for path in sorted(folder.glob("teacher_cache/rows-*")):
        tensors = load_file(path)
        counts, keys = tensors.pop("counts").tolist(), tensors.pop("keys").tolist()
        parts = {name: tensor.split(counts) for name, tensor in sorted(tensors.items())}
        for number, key in enumerate(keys):
            assert str(key) not in found, "a row lies in two files"
            found[str(key)] = {name: one[number].tolist() for name, one in parts.items()}
    return found


def table(folder: Path) -> dict[str, Any]:
    """Adapters and losses of a sweep's runs, and its table without times."""
    with (folder / "sweep.csv").open(newline="") as file:
        rows = [{key: row[key] for key in RUN_FIGURES} for row in csv.DictReader(file)]
    return digests("*/adapter/adapter_model.safetensors")(folder) | {"table": rows}


def _losses(log: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in log.read_text("utf-8").splitlines()]


TARGETS = {
    "chat_sft": Target(
        by_pipeline(chat_sft),
        "train_log.jsonl",
        REPORTED | EXPORTED | {"adapter": "adapter"} | TRAINED,
        digests("*.gguf", "adapter/*"),
    ),
    "qat_distill": Target(
        by_pipeline(qat_distill),
        "train_log.jsonl",
        REPORTED | {"saved": "base"} | EXPORTED | TRAINED,
        digests("*.gguf", "base/*"),
    ),
    "export_gguf": Target(by_pipeline(export_gguf), ".candidate", EXPORTED, digests("*.gguf")),
    "q4_0_build": Target(
        by_pipeline(q4_0_build),
        ".*.partial/*",
        REPORTED | {"built": "tiny-Q4_0", "building": ".*.partial"},
        digests("tiny-Q4_0/*"),
    ),
    "teacher_cache": Target(
        by_pipeline(teacher_cache),
        "teacher_cache/rows-*",
        REPORTED | {"rows": "teacher_cache/rows-*", "begun": "teacher_cache"},
        cached_rows,
    ),
    "sweep": Target(
        sweep,
        "*/train_log.jsonl",
        {"table": "sweep.csv", "second run": "1/train_log.jsonl", "first run": "0/train_log.jsonl"},
        table,
    ),
}
