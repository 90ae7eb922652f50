"""The stage of recipe=plan: the memory of a base, without loading it."""

import dataclasses
import itertools
from collections.abc import Iterator

from transformers import PreTrainedConfig

from qatlora.base.grids import ON_GRID_SHARE
from qatlora.base.layout import find_layout, plain_config
from qatlora.base.names import weight_key
from qatlora.base.published import published_config
from qatlora.base.source import Source, find_source, hub_config
from qatlora.base.stores import Q4_0_BITS
from qatlora.base.teacher import has_bf16_values
from qatlora.config import (
    AdapterKind,
    BaseConfig,
    Holds,
    RootConfig,
    Storage,
    TeacherKind,
    Trained,
)
from qatlora.grid import detect
from qatlora.plan.choose import Allowed, longest_row, recommend
from qatlora.plan.footprint import Job, footprint
from qatlora.plan.shape import ModelShape, model_shape
from qatlora.preflight import planned_job
from qatlora.report.plan_text import PARTS
from qatlora.report.results import BaseResult
from qatlora.report.results_plan import Fits, PlannedStorage, PlanResult, Recommendation
from qatlora.stages.plan_commands import commands
from qatlora.state import Run

_PEAKS = ("load", "train", "evaluate", "export")


def plan(state: Run) -> None:
    """Count the base, lay its memory out by part, and look for settings that fit."""
    cfg = state.cfg
    config, source = _find_config(cfg.base)
    shape = model_shape(config, cfg.base.trained)
    job = dataclasses.replace(planned_job(cfg), trains=True)
    state.plan = PlanResult(
        bf16_bytes=2 * shape.num_parameters,
        q4_0_bytes=shape.num_text_parameters * Q4_0_BITS / 8,
        micro_batch_tokens=job.tokens,
        storages=[
            _planned(shape, dataclasses.replace(job, storage=one.name)) for one in _storages(cfg)
        ],
        gpu_gb=list(cfg.plan.gpu_sizes_gb),
        fits=list(_fits(cfg, shape, job)),
        recommended=_recommended(cfg, shape, job, _allowed(cfg, source)),
    )
    state.base_result = BaseResult(str(cfg.base.name), None, shape.num_parameters, None, None)


def _find_config(base: BaseConfig) -> tuple[PreTrainedConfig, Source | None]:
    """The architecture; and the checkpoint, if it is at hand, to look at one of its weights.

    Of a model on the hub config.json is fetched alone: what it weighs is what is asked.
    """
    if base.path is None and base.architecture is not None:
        return published_config(base.architecture), None
    if base.path is None and base.hub_id is not None:
        return plain_config(hub_config(base.hub_id)), None
    source = find_source(base)
    return plain_config(source.folder), source


def _planned(shape: ModelShape, job: Job) -> PlannedStorage:
    needs = footprint(shape, job)
    parts = {name: value for name, value in dataclasses.asdict(needs).items() if name in PARTS}
    return PlannedStorage(job.storage, parts, {peak: getattr(needs, peak) for peak in _PEAKS})


def _storages(cfg: RootConfig) -> list[Storage]:
    """Those that can be trained; weights themselves start from the checkpoint's own values."""
    return [Storage.bf16] if cfg.distill.train is Trained.weights else list(Storage)


def _fits(cfg: RootConfig, shape: ModelShape, job: Job) -> Iterator[Fits]:
    kinds: list[str | None] = [kind.name for kind in AdapterKind]
    teachers = ["none", "self", "cache", "memory"]
    if job.adapter is None:
        kinds, teachers = [None], ["cache", "memory"]
    for storage, kind, teacher in itertools.product(_storages(cfg), kinds, teachers):
        if teacher == "self" and storage is Storage.nf4:
            continue
        one = dataclasses.replace(job, storage=storage.name, adapter=kind, teacher=teacher)
        lengths = [
            longest_row(shape, one, gpu_gb, cfg.plan.row_lengths_tokens)
            for gpu_gb in cfg.plan.gpu_sizes_gb
        ]
        yield Fits(storage.name, kind or Trained.weights.name, teacher, lengths)


def _allowed(cfg: RootConfig, source: Source | None) -> Allowed:
    """Teachers and storages that the base can have, by its folder or what is said of it."""
    holds = cfg.base.holds if source is None else _held_by(source)
    has_values = holds is not Holds.nf4 if source is None else has_bf16_values(source)
    other = cfg.teacher.kind is TeacherKind.bf16 and cfg.teacher.path is not None
    if cfg.distill.train is Trained.weights:  # held to a teacher, and to nothing else
        return Allowed(("memory", "cache") if has_values or other else (), ("bf16",))
    teachers = ["memory"] if has_values or other else []
    teachers += ["self"] if holds is Holds.on_grid else []
    teachers += ["cache"] if has_values or other else []
    storages = ("q4_0",) if source and source.packed_modules else ("q4_0", "nf4")
    return Allowed((*teachers, "none"), ("nf4",) if holds is Holds.nf4 else storages)


def _held_by(source: Source) -> Holds:
    """By its record, else by the first weight of its Q4_0 list."""
    if source.nf4_modules:
        return Holds.nf4
    if source.record is not None:
        share = source.record.on_grid_share
    else:
        name = find_layout(source, BaseConfig()).grid[0]  # whatever is trained
        share = float(detect(source.tensor(weight_key(name))).float().mean())
    return Holds.on_grid if share >= ON_GRID_SHARE else Holds.bf16


def _recommended(cfg: RootConfig, shape: ModelShape, job: Job, allowed: Allowed) -> Recommendation:
    row_tokens = cfg.data.max_length_tokens
    best = recommend(shape, job, cfg.plan.gpu_gb, row_tokens, allowed)
    if best is None:
        return Recommendation(cfg.plan.gpu_gb, [], None)
    peak = footprint(shape, best).peak
    return Recommendation(cfg.plan.gpu_gb, commands(cfg, best, row_tokens), peak)
