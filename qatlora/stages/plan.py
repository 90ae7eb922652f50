"""The stage of recipe=plan: the memory of a base, without its weights."""

import dataclasses

from transformers import PreTrainedConfig

from qatlora.base.layout import plain_config
from qatlora.base.published import published_config
from qatlora.base.source import find_source
from qatlora.base.stores import Q4_0_BITS
from qatlora.config import AdapterKind, BaseConfig, RootConfig, Storage
from qatlora.plan.choose import longest_row, recommend
from qatlora.plan.footprint import Job, footprint
from qatlora.plan.shape import ModelShape, model_shape
from qatlora.preflight import planned_job
from qatlora.report.plan_text import PARTS
from qatlora.report.results import BaseResult
from qatlora.report.results_plan import Fits, PlannedStorage, PlanResult, Recommendation
from qatlora.state import Run

_PEAKS = ("load", "train", "evaluate", "export")
_TEACHERS = ("memory", "none")


def plan(state: Run) -> None:
    """Count the base, lay its memory out by part, and look for settings that fit."""
    cfg = state.cfg
    config = _config(cfg.base)
    shape = model_shape(config, cfg.base.trained)
    job = dataclasses.replace(planned_job(cfg), trains=True, loads_dense=False)
    state.plan = PlanResult(
        bf16_bytes=2 * shape.num_parameters,
        q4_0_bytes=shape.num_text_parameters * Q4_0_BITS / 8,
        micro_batch_tokens=job.tokens,
        storages=[_planned(shape, dataclasses.replace(job, storage=s.name)) for s in Storage],
        gpu_gb=list(cfg.plan.gpu_sizes_gb),
        fits=list(_fits(cfg, shape, job)),
        recommended=_recommended(cfg, shape, job),
    )
    state.base_result = BaseResult(str(cfg.base.name), None, shape.num_parameters, None, None)


def _config(base: BaseConfig) -> PreTrainedConfig:
    """Of a shipped architecture where one is named and no checkpoint is given."""
    if base.architecture is not None and base.path is None:
        return published_config(base.architecture)
    return plain_config(find_source(base).folder)


def _planned(shape: ModelShape, job: Job) -> PlannedStorage:
    needs = footprint(shape, job)
    parts = {name: value for name, value in dataclasses.asdict(needs).items() if name in PARTS}
    return PlannedStorage(job.storage, parts, {peak: getattr(needs, peak) for peak in _PEAKS})


def _fits(cfg: RootConfig, shape: ModelShape, job: Job) -> list[Fits]:
    rows = []
    for storage in Storage:
        for kind in AdapterKind:
            for teacher in ("none", "cache", "memory"):
                one = dataclasses.replace(
                    job, storage=storage.name, adapter=kind.name, teacher=teacher
                )
                lengths = [
                    longest_row(shape, one, gpu_gb, cfg.plan.row_lengths_tokens)
                    for gpu_gb in cfg.plan.gpu_sizes_gb
                ]
                rows.append(Fits(storage.name, kind.name, teacher, lengths))
    return rows


def _recommended(cfg: RootConfig, shape: ModelShape, job: Job) -> Recommendation:
    row_tokens = cfg.data.max_length_tokens
    best = recommend(shape, job, cfg.plan.gpu_gb, row_tokens, _TEACHERS)
    if best is None:
        return Recommendation(cfg.plan.gpu_gb, [], None)
    overrides = [
        f"storage={best.storage}",
        f"adapter={cfg.adapter.kind.name}",
        f"teacher={'bf16' if best.teacher == 'memory' else 'none'}",
        f"data.max_length_tokens={row_tokens}",
        f"train.micro_batch_rows={best.tokens // row_tokens}",
        f"train.gradient_checkpointing={str(best.checkpointing).lower()}",
        f"train.keep_blocks={str(best.keep_blocks).lower()}",
        f"evaluate.hold_weights={str(best.holds_weights).lower()}",
    ]
    return Recommendation(cfg.plan.gpu_gb, overrides, footprint(shape, best).peak)
