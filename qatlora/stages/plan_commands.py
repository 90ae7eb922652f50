"""The command lines of a run as recipe=plan recommends it: complete, whatever else was typed."""

import shlex
from collections.abc import Iterator

from qatlora.config import BaseConfig, RootConfig, TeacherKind, Trained
from qatlora.plan.footprint import Job

_CACHE = "teacher_cache"
# What trains, and what writes the teacher's cache for the rows of just that recipe.
_RECIPES = {
    Trained.adapters: (["recipe=chat_sft"], ["recipe=teacher_cache"]),
    Trained.weights: (
        ["recipe=qat_distill"],
        ["recipe=qat_distill", "stages=[preflight,load_data,teacher_cache,report]"],
    ),
}
# Said anew, whatever was typed for the plan.
_SETTLED = {
    "recipe", "run_dir", "base", "base.path", "base.hub_id", "base.name", "storage", "storage.kind",
    "teacher", "teacher.kind", "teacher.path", "teacher.cache_path",
}  # fmt: skip


def commands(cfg: RootConfig, job: Job, row_tokens: int) -> list[str]:
    """What to type, in order; a cached teacher is written first, where there is memory for it.

    Args:
        cfg: the plan's settings.
        job: what was found to fit.
        row_tokens: length of a row.
    """
    settings = [*_base(cfg.base), *_sizes(cfg, job, row_tokens)]
    settled = _SETTLED | {_key(one) for one in settings}
    others = ("plan.", "teacher.") if job.teacher == "none" else ("plan.",)
    typed = [one for one in cfg.overrides if _key(one) not in settled]
    run = [*settings, *(one for one in typed if not _key(one).startswith(others))]
    other = cfg.teacher.path if cfg.teacher.kind is TeacherKind.bf16 else None
    path = [] if other is None else [f"teacher.path={other}"]
    train, write = _RECIPES[cfg.distill.train]
    if job.teacher == "memory":
        return [_command(*train, *run, "teacher=bf16", *path)]
    if job.teacher == "cache":
        writing = [*run, *path, f"teacher.cache_path={_CACHE}", "train.device=cpu"]
        reading = [*run, "teacher=cache", f"teacher.path={_CACHE}"]
        return [_command(*write, *writing), _command(*train, *reading)]
    return [_command(*train, *run, f"teacher={job.teacher}")]


def _base(base: BaseConfig) -> Iterator[str]:
    if base.path is not None:
        yield f"base.path={base.path}"
    elif base.hub_id is not None and base.architecture is None:
        yield f"base.hub_id={base.hub_id}"
    else:
        yield f"base={base.name}"


def _sizes(cfg: RootConfig, job: Job, row_tokens: int) -> list[str]:
    adapter = [] if job.adapter is None else [f"adapter={job.adapter}"]
    return [
        f"storage={job.storage}",
        *adapter,
        f"data.max_length_tokens={row_tokens}",
        f"train.micro_batch_rows={job.tokens // row_tokens}",
        f"train.rows_per_step={_rows_per_step(cfg, job.tokens // row_tokens)}",
        f"train.gradient_checkpointing={str(job.checkpointing).lower()}",
        f"train.keep_blocks={str(job.keep_blocks).lower()}",
        f"evaluate.hold_weights={str(job.holds_weights).lower()}",
    ]


def _rows_per_step(cfg: RootConfig, micro_batch_rows: int) -> int:
    """Those of the settings, up to whole micro-batches."""
    return -(-cfg.train.rows_per_step // micro_batch_rows) * micro_batch_rows


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _command(*overrides: str) -> str:
    return shlex.join(["python", "-m", "qatlora", *overrides])
