"""What a run will need, said before it starts: memory, disk, time; a refusal if it cannot work.

The figures are estimates from the checkpoint's config and one short measurement of this machine's
matrix product; the run's report holds what it really took.
"""

import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from qatlora import processes
from qatlora.base.layout import Layout, plain_config
from qatlora.base.source import Source
from qatlora.base.stores import CODE_BITS, Q4_0_BITS, STEP_BITS
from qatlora.benchmark.adapters import most_trials
from qatlora.benchmark.methods import chosen_methods
from qatlora.config import BenchmarkSuite, Precision, RootConfig, Storage, TeacherKind, Trained
from qatlora.distill import LossSettings
from qatlora.distill.cache import bytes_per_token
from qatlora.errors import ResourceError
from qatlora.llamacpp import kld_base
from qatlora.memory import available_bytes
from qatlora.plan.footprint import (
    BF16_BYTES,
    FP32_BYTES,
    LATENT_BYTES,
    MOMENTS_BYTES,
    Job,
    footprint,
)
from qatlora.plan.shape import model_shape

_IMPORTED_LIBRARIES_BYTES = 1.1e9
# Fragments of the host's allocator, tokenizer and texts: the demonstration took 4.4 GB where 3.5
# are counted.
_UNCOUNTED_SHARE = 0.3
# Streaming: two checkpoints' tensors as stored, up to fp32, and the buffers of one part.
_STREAMED_BYTES_PER_WEIGHT = 8
_PART_BYTES = 0.5e9
_REPORT_BYTES = 1e7
_CACHE_CHUNKS = 4  # logits of a chunk of tokens, float32: a teacher's, a student's, two to work in
_TEACHERS = {
    TeacherKind.bf16: "memory",
    TeacherKind.self: "self",
    TeacherKind.cache: "cache",
    TeacherKind.none: "none",
}
_SEARCHED_WEIGHTS_PER_SECOND = 1e7  # off the grid, two CPU cores; on a grid ten times as many
_CHECKPOINTS = 3  # two are kept, and a third is written before the oldest goes
_VALIDATED_MODELS = 4  # the base, the merge, and it by both ways to Q4_0
# Share of the measured rate that whole stages reach: elementwise passes and small products.
_EFFICIENCY = 0.3


@dataclass(frozen=True)
class Needs:
    """Estimated needs of a run."""

    memory_bytes: float
    disk_bytes: float
    seconds: float


def planned_job(cfg: RootConfig, on_host: bool = False) -> Job:
    """What the memory model needs to know of the settings."""
    adapter = cfg.adapter
    return Job(
        storage=cfg.storage.kind.name,
        adapter=None if cfg.distill.train is Trained.weights else adapter.kind.name,
        latent=cfg.distill.latent.name,
        optimizer=cfg.train.optimizer.name,
        rank=adapter.rank,
        steps_rank=adapter.steps_rank or adapter.rank,
        tokens=cfg.train.micro_batch_rows * cfg.data.max_length_tokens,
        checkpointing=cfg.train.gradient_checkpointing,
        keep_blocks=cfg.train.keep_blocks,
        teacher=_TEACHERS[cfg.teacher.kind],
        holds_weights=cfg.evaluate.hold_weights,
        trains="train" in cfg.stages,
        value_bytes=_value_bytes(cfg.train.precision),
        scores_in_training=cfg.train.eval_steps > 0,
        on_host=on_host,
    )


def _value_bytes(precision: Precision) -> int:
    return FP32_BYTES if precision is Precision.fp32 else BF16_BYTES


def estimate(cfg: RootConfig, source: Source, layout: Layout, device: torch.device) -> Needs:
    """Estimate peak memory of the device, disk below `target`, and time without unpacking."""
    if "build" in cfg.stages:
        needs = _estimate_build(cfg, layout)
        if "fidelity" not in cfg.stages:
            return needs
        # Of its table only the time: it is left out where there is no memory for it.
        table = estimate_fidelity(cfg, source, layout, device)
        return replace(needs, seconds=needs.seconds + table.seconds)
    if "benchmark" in cfg.stages:
        return _estimate_benchmark(cfg, source, layout, device)
    if "teacher_cache" in cfg.stages:
        return _estimate_cache(cfg, source, layout, device)
    if "validate" in cfg.stages:
        return _estimate_validate(cfg, source, layout, device)
    if "fidelity" in cfg.stages:
        return estimate_fidelity(cfg, source, layout, device)
    if "load_base" not in cfg.stages:
        return _estimate_streaming(source, layout)
    shape = model_shape(plain_config(source.folder), cfg.base.trained)
    on_host = device.type == "cpu"
    memory = footprint(shape, planned_job(cfg, on_host)).peak
    if on_host:
        memory = memory * (1 + _UNCOUNTED_SHARE) + _IMPORTED_LIBRARIES_BYTES
    others = layout.num_parameters - layout.num_grid_weights
    num_latents = layout.num_grid_weights if cfg.distill.train is Trained.weights else 0
    num_files = 3 if cfg.export.patch else 2  # the base's own is one more
    disk = num_files * (layout.num_grid_weights * Q4_0_BITS / 8 + others * BF16_BYTES)
    in_checkpoint = LATENT_BYTES[cfg.distill.latent.name] + MOMENTS_BYTES[cfg.train.optimizer.name]
    disk += num_latents * _CHECKPOINTS * in_checkpoint
    if "save_base" in cfg.stages:
        disk += layout.num_parameters * BF16_BYTES
    flops = _flops(cfg, layout, shape.hidden_size * shape.vocab_size)
    return Needs(memory, disk, flops / (_EFFICIENCY * _measured_rate(device)))


def _estimate_cache(cfg: RootConfig, source: Source, layout: Layout, device: torch.device) -> Needs:
    """The teacher alone, then the base and the head kept; any teacher is counted as the base."""
    shape = model_shape(plain_config(source.folder), cfg.base.trained)
    head = shape.hidden_size * source.vocab_size
    tokens = cfg.train.max_steps * cfg.train.rows_per_step * cfg.data.max_length_tokens
    models = (layout.num_parameters + head) * BF16_BYTES
    chunk = LossSettings().chunk_tokens * source.vocab_size * FP32_BYTES
    memory = _IMPORTED_LIBRARIES_BYTES + models + _CACHE_CHUNKS * chunk
    disk = tokens * bytes_per_token(cfg.teacher.cache_top_k, source.vocab_size)
    disk += (head + 2 * cfg.data.eval_tokens * shape.hidden_size) * BF16_BYTES
    flops = 2.0 * (tokens + 4 * cfg.data.eval_tokens) * (layout.num_active_weights + head)
    return Needs(memory, disk, flops / (_EFFICIENCY * _measured_rate(device)))


def _estimate_benchmark(
    cfg: RootConfig, source: Source, layout: Layout, device: torch.device
) -> Needs:
    """Suite speed holds every method at once, suite adapters one model after the other."""
    settings = cfg.benchmark
    methods = chosen_methods(settings.suite, settings.methods)
    dense_and_logits = 2 * layout.num_parameters * BF16_BYTES
    disk = layout.num_parameters * 4 * BF16_BYTES
    if settings.suite is BenchmarkSuite.speed:
        rounds = settings.warmup_rounds + settings.rounds
        tokens = len(methods) * rounds * sum(settings.tokens_per_step)
        largest, models, disk = max(settings.tokens_per_step), len(methods), _REPORT_BYTES
    else:
        largest, models = settings.rows_per_step * cfg.data.max_length_tokens, 1
        tokens = most_trials(methods, settings) * (
            settings.max_steps * largest + settings.eval_tokens
        )
    shape = model_shape(plain_config(source.folder), cfg.base.trained)
    kept = shape.kept.total(checkpointing=cfg.train.gradient_checkpointing)
    activations = largest * kept
    memory = models * (_IMPORTED_LIBRARIES_BYTES + dense_and_logits + activations)
    flops = tokens * 8.0 * layout.num_parameters
    return Needs(memory, disk, flops / (_EFFICIENCY * _measured_rate(device)))


def estimate_fidelity(
    cfg: RootConfig, source: Source, layout: Layout, device: torch.device
) -> Needs:
    """One model at a time, a reference's head and states; on disk its logits for llama.cpp."""
    settings = cfg.fidelity
    value_bytes = _value_bytes(settings.precision)
    num_tokens = len(settings.texts) * settings.tokens_per_text
    head_weights = source.num_head_weights
    states = num_tokens * int(source.text_config["hidden_size"]) * value_bytes
    model = layout.num_parameters * (value_bytes + BF16_BYTES)  # itself and its file as it is read
    memory = _IMPORTED_LIBRARIES_BYTES + model + head_weights * value_bytes + states + _PART_BYTES
    decoder, head = 2.0 * layout.num_active_weights, 2.0 * head_weights
    flops = num_tokens * (decoder + len(settings.models) * (decoder + 2 * head))
    judged = settings.llama_cpp_tokens if settings.llama_cpp else 0
    disk = _REPORT_BYTES + judged * kld_base.bytes_per_token(source.vocab_size)
    return Needs(memory, disk, flops / (_EFFICIENCY * _measured_rate(device)))


def _estimate_streaming(source: Source, layout: Layout) -> Needs:
    """A recipe that loads no model reads one tensor at a time and writes no more than a report."""
    largest = max(math.prod(shape) for shape in source.shapes().values())
    memory = _IMPORTED_LIBRARIES_BYTES + _STREAMED_BYTES_PER_WEIGHT * largest + _PART_BYTES
    return Needs(memory, _REPORT_BYTES, layout.num_grid_weights / _SEARCHED_WEIGHTS_PER_SECOND)


def _estimate_build(cfg: RootConfig, layout: Layout) -> Needs:
    """A build streams: one shard and the tensor at work; an NF4 build is then loaded and asked."""
    coded = layout.num_grid_weights
    if cfg.storage.kind is Storage.nf4:  # experts stay bf16 in its folder
        coded -= layout.num_expert_weights
    bits = CODE_BITS[cfg.storage.kind.name]
    built = coded * bits / 8 + (layout.num_parameters - coded) * BF16_BYTES
    built += layout.num_grid_weights * STEP_BITS / 8
    memory = min(built, cfg.build.max_shard_gb * 1e9)
    memory += layout.max_grid_weights * _STREAMED_BYTES_PER_WEIGHT
    if cfg.storage.kind is Storage.nf4:
        memory = max(memory + layout.num_grid_weights * STEP_BITS / 8, built)
    memory += _IMPORTED_LIBRARIES_BYTES
    return Needs(memory, built, layout.num_grid_weights / _SEARCHED_WEIGHTS_PER_SECOND)


def _estimate_validate(
    cfg: RootConfig, source: Source, layout: Layout, device: torch.device
) -> Needs:
    """One model after the other: in bf16, and in fp32 where an adapter is merged or types read."""
    decoder = 2.0 * (layout.num_active_weights + source.num_head_weights)
    tokens = 2 * _VALIDATED_MODELS * cfg.data.eval_tokens  # of two texts
    memory = _IMPORTED_LIBRARIES_BYTES + layout.num_parameters * (FP32_BYTES + BF16_BYTES)
    disk = layout.num_parameters * (2 * BF16_BYTES + 1)  # in the temporary folder
    seconds = tokens * decoder / (_EFFICIENCY * _measured_rate(device))
    return Needs(memory, disk, seconds + layout.num_grid_weights / _SEARCHED_WEIGHTS_PER_SECOND)


def _flops(cfg: RootConfig, layout: Layout, head_weights: int) -> float:
    """Multiply-adds times two of training and evaluation."""
    stages = set(cfg.stages)
    row_tokens = cfg.data.max_length_tokens
    trained = cfg.train.max_steps * cfg.train.rows_per_step * row_tokens if "train" in stages else 0
    evaluations = len({"evaluate_base", "evaluate_trained", "guard"} & stages) + 1
    evaluated = 2 * evaluations * cfg.data.eval_tokens
    decoder, head = 2.0 * layout.num_active_weights, 2.0 * head_weights
    # Training: student forward, one backward product of the inputs and another of the weights or
    # factors, and the teacher; the head three times.
    return trained * (4 * decoder + 3 * head) + evaluated * (2 * decoder + 2 * head)


def _measured_rate(device: torch.device) -> float:
    """Operations per second of a bf16 matrix product on this device."""
    left = torch.randn(512, 1024, device=device).bfloat16()
    right = torch.randn(1024, 4096, device=device).bfloat16()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (left @ right).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * 512 * 1024 * 4096 / best


class Target(NamedTuple):
    """The folder that a run writes most to, and the setting that chooses it."""

    folder: Path
    setting: str


def target(cfg: RootConfig) -> Target:
    """Where the disk that `estimate` counts is taken."""
    if "teacher_cache" in cfg.stages and cfg.teacher.cache_path is not None:
        return Target(Path(cfg.teacher.cache_path), "teacher.cache_path")
    return Target(Path(cfg.run_dir), "run_dir")


def lacking_memory(needs: Needs, device: torch.device) -> str | None:
    """How much is needed and free, as a clause; None where it suffices."""
    on_gpu = device.type == "cuda"
    available = torch.cuda.mem_get_info(device)[0] if on_gpu else available_bytes()
    sharing = _sharing(device)
    needed = sharing * needs.memory_bytes
    if needed <= available:
        return None
    each = f" ({sharing} processes of {_gb(needs.memory_bytes)})" if sharing > 1 else ""
    return f"about {_gb(needed)} of memory are needed{each} and {_gb(available)} are free"


def _sharing(device: torch.device) -> int:
    """Processes of this run in the same memory."""
    return 1 if device.type == "cuda" else processes.count_here()


def require(needs: Needs, written_to: Target, device: torch.device) -> None:
    """Refuse a run that this machine cannot hold.

    Every process holds a base of its own: on a GPU of its own, on a CPU in the same memory.

    Raises:
        ResourceError: too little memory or disk, with both figures and a remedy.
    """
    lacking = lacking_memory(needs, device)
    if lacking is not None:
        fewer = "start fewer processes, " if _sharing(device) > 1 else ""
        raise ResourceError(
            f"For this run, {lacking}. Close other programs, {fewer}take storage=q4_0 or a smaller "
            "base, lower train.micro_batch_rows, or set train.gradient_checkpointing=true or "
            "evaluate.hold_weights=false; recipe=plan shows what each part takes."
        )
    places = (written_to.folder, *written_to.folder.absolute().parents)
    existing = next(folder for folder in places if folder.exists())
    free = shutil.disk_usage(existing).free
    if needs.disk_bytes > free:
        raise ResourceError(
            f"This run writes about {_gb(needs.disk_bytes)} below {written_to.folder} and "
            f"{_gb(free)} are free there. Make room, or set {written_to.setting} to another disk."
        )


def describe(needs: Needs) -> str:
    """One line for the person who waits."""
    minutes = max(1, round(needs.seconds / 60))
    return (
        f"about {minutes} min, {_gb(needs.memory_bytes)} of memory, {_gb(needs.disk_bytes)} of disk"
    )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
