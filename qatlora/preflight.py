"""What a run will need, said before it starts: memory, disk, time; a refusal if it cannot work.

The figures are estimates from the checkpoint's config and one short measurement of this machine's
matrix product; the run's report holds what it really took.
"""

import dataclasses
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qatlora.base.layout import Layout
from qatlora.base.source import Source
from qatlora.benchmark.methods import chosen_methods
from qatlora.config import BenchmarkSuite, Precision, RootConfig, Storage, Trained
from qatlora.distill import LossSettings
from qatlora.distill.cache import bytes_per_token
from qatlora.errors import ResourceError
from qatlora.memory import available_bytes

_BITS_PER_WEIGHT = {"nf4": 4.63, "q4_0": 4.5, "bf16": 16.5}
_IMPORTED_LIBRARIES_BYTES = 1.1e9
_BF16_BYTES = 2
_FP32_BYTES = 4
# Values that a layer keeps per token, in units of its widths, counted in fp32: norms, attention and
# gated MLP of Gemma 3 in autocast. Against the measured peak this is about right, not exact.
_KEPT_PER_HIDDEN = 16
_KEPT_PER_INTERMEDIATE = 10
# Streaming: two checkpoints' tensors as stored, up to fp32, and the buffers of one part.
_STREAMED_BYTES_PER_WEIGHT = 8
_PART_BYTES = 0.5e9
_REPORT_BYTES = 1e7
_SEARCHED_WEIGHTS_PER_SECOND = 1e7  # off the grid, two CPU cores; on a grid ten times as many
# Of a trained weight: itself, its gradient and two moments; all but the gradient go to disk.
_LATENT_BYTES, _CHECKPOINT_BYTES = 4 * _FP32_BYTES, 3 * _FP32_BYTES
_CACHE_CHUNKS = 4  # logits of a chunk of tokens, float32: a teacher's, a student's, two to work in
_CHECKPOINTS = 3  # two are kept, and a third is written before the oldest goes
# Share of the measured rate that whole stages reach: elementwise passes and small products.
_EFFICIENCY = 0.3


@dataclass(frozen=True)
class Needs:
    """Estimated needs of a run."""

    memory_bytes: float
    disk_bytes: float
    seconds: float


def estimate(cfg: RootConfig, source: Source, layout: Layout, device: torch.device) -> Needs:
    """Estimate peak host memory, disk below run_dir, and time without unpacking and installing."""
    if "build" in cfg.stages:
        return _estimate_build(cfg, layout)
    if "teacher_cache" in cfg.stages:
        return _estimate_cache(cfg, source, layout, device)
    if "benchmark" in cfg.stages:
        return _estimate_benchmark(cfg, source, layout, device)
    if "fidelity" in cfg.stages:
        return _estimate_fidelity(cfg, source, layout, device)
    if "load_base" not in cfg.stages:
        return _estimate_streaming(source, layout)
    text = source.config.get("text_config", source.config)
    hidden, vocab = int(text["hidden_size"]), int(text["vocab_size"])
    others = layout.num_parameters - layout.num_grid_weights
    stored = layout.num_grid_weights * _BITS_PER_WEIGHT[cfg.storage.kind.name] / 8
    student = others * _BF16_BYTES + stored + layout.num_grid_weights * _BF16_BYTES
    second_model = layout.num_parameters * _BF16_BYTES  # the teacher, later the file read back
    logits = 2 * LossSettings().chunk_tokens * vocab * _BF16_BYTES  # student's and teacher's
    memory = _IMPORTED_LIBRARIES_BYTES + student + second_model + logits
    if "train" in cfg.stages:
        memory += _activation_bytes(cfg, text)
    num_latents = layout.num_grid_weights if cfg.distill.train is Trained.weights else 0
    memory += num_latents * _LATENT_BYTES
    disk = 2 * (layout.num_grid_weights * 4.5 / 8 + others * _BF16_BYTES)
    disk += num_latents * _CHECKPOINTS * _CHECKPOINT_BYTES
    if "save_base" in cfg.stages:
        disk += layout.num_parameters * _BF16_BYTES
    flops = _flops(cfg, layout, hidden * vocab)
    return Needs(memory, disk, flops / (_EFFICIENCY * _measured_rate(device)))


def _estimate_cache(cfg: RootConfig, source: Source, layout: Layout, device: torch.device) -> Needs:
    """The teacher alone, then the base and the head kept; any teacher is counted as the base."""
    text = source.config.get("text_config", source.config)
    head = int(text["hidden_size"]) * source.vocab_size
    tokens = cfg.train.max_steps * cfg.train.rows_per_step * cfg.data.max_length_tokens
    teacher = layout.num_parameters * _BF16_BYTES
    chunk = LossSettings().chunk_tokens * source.vocab_size * _FP32_BYTES
    memory = _IMPORTED_LIBRARIES_BYTES + teacher + head * _BF16_BYTES + _CACHE_CHUNKS * chunk
    disk = tokens * bytes_per_token(cfg.teacher.cache_top_k, source.vocab_size)
    disk += head * _BF16_BYTES + 2 * cfg.data.eval_tokens * int(text["hidden_size"]) * _BF16_BYTES
    flops = 2.0 * (tokens + 4 * cfg.data.eval_tokens) * (layout.num_grid_weights + head)
    return Needs(memory, disk, flops / (_EFFICIENCY * _measured_rate(device)))


def _estimate_benchmark(
    cfg: RootConfig, source: Source, layout: Layout, device: torch.device
) -> Needs:
    """Suite speed holds every method at once, suite adapters one model after the other."""
    settings, text = cfg.benchmark, source.config.get("text_config", source.config)
    methods = len(chosen_methods(settings.suite, settings.methods))
    dense_and_logits = 2 * layout.num_parameters * _BF16_BYTES
    disk = layout.num_parameters * 4 * _BF16_BYTES
    if settings.suite is BenchmarkSuite.speed:
        rounds = settings.warmup_rounds + settings.rounds
        tokens = methods * rounds * sum(settings.tokens_per_step)
        largest, models, disk = max(settings.tokens_per_step), methods, _REPORT_BYTES
    else:
        largest, models = settings.rows_per_step * cfg.data.max_length_tokens, 1
        trials = methods * (len(settings.learning_rates) + len(settings.seeds) - 1)
        tokens = trials * (settings.max_steps * largest + settings.eval_tokens)
    rows = largest // cfg.data.max_length_tokens
    train = dataclasses.replace(cfg.train, micro_batch_rows=rows)
    activations = _activation_bytes(dataclasses.replace(cfg, train=train), text)
    memory = models * (_IMPORTED_LIBRARIES_BYTES + dense_and_logits + activations)
    flops = tokens * 8.0 * layout.num_parameters
    return Needs(memory, disk, flops / (_EFFICIENCY * _measured_rate(device)))


def _estimate_fidelity(
    cfg: RootConfig, source: Source, layout: Layout, device: torch.device
) -> Needs:
    """One model at a time, beside the head of its reference, the states and a batch at work."""
    settings, text = cfg.fidelity, source.config.get("text_config", source.config)
    value_bytes = _FP32_BYTES if settings.precision is Precision.fp32 else _BF16_BYTES
    num_tokens = len(settings.texts) * settings.tokens_per_text
    head_weights = int(text["hidden_size"]) * int(text["vocab_size"])
    states = num_tokens * int(text["hidden_size"]) * value_bytes
    model = layout.num_parameters * (value_bytes + _BF16_BYTES)  # itself and its file as it is read
    memory = _IMPORTED_LIBRARIES_BYTES + model + head_weights * value_bytes + states + _PART_BYTES
    decoder, head = 2.0 * layout.num_grid_weights, 2.0 * head_weights
    flops = num_tokens * (decoder + len(settings.models) * (decoder + 2 * head))
    return Needs(memory, _REPORT_BYTES, flops / (_EFFICIENCY * _measured_rate(device)))


def _activation_bytes(cfg: RootConfig, text: dict[str, Any]) -> float:
    """What a micro-batch keeps from the forward for the backward pass."""
    tokens = cfg.train.micro_batch_rows * cfg.data.max_length_tokens
    hidden, layers = int(text["hidden_size"]), int(text["num_hidden_layers"])
    one_layer = _FP32_BYTES * (
        _KEPT_PER_HIDDEN * hidden + _KEPT_PER_INTERMEDIATE * int(text["intermediate_size"])
    )
    if cfg.train.gradient_checkpointing:
        return float(tokens * (layers * hidden * _BF16_BYTES + one_layer))
    return float(tokens * layers * one_layer)


def _estimate_streaming(source: Source, layout: Layout) -> Needs:
    """A recipe that loads no model reads one tensor at a time and writes no more than a report."""
    largest = max(math.prod(shape) for shape in source.shapes().values())
    memory = _IMPORTED_LIBRARIES_BYTES + _STREAMED_BYTES_PER_WEIGHT * largest + _PART_BYTES
    return Needs(memory, _REPORT_BYTES, layout.num_grid_weights / _SEARCHED_WEIGHTS_PER_SECOND)


def _estimate_build(cfg: RootConfig, layout: Layout) -> Needs:
    """A build streams: one shard, the tensor at work and, for NF4, the model that is saved."""
    others = layout.num_parameters - layout.num_grid_weights
    bits = _BITS_PER_WEIGHT[cfg.storage.kind.name]
    built = layout.num_grid_weights * bits / 8 + others * _BF16_BYTES
    memory = _IMPORTED_LIBRARIES_BYTES + min(built, cfg.build.max_shard_gb * 1e9)
    memory += layout.max_grid_weights * _STREAMED_BYTES_PER_WEIGHT
    if cfg.storage.kind is Storage.nf4:
        memory += built
    return Needs(memory, built, layout.num_grid_weights / _SEARCHED_WEIGHTS_PER_SECOND)


def _flops(cfg: RootConfig, layout: Layout, head_weights: int) -> float:
    """Multiply-adds times two of training and evaluation."""
    stages = set(cfg.stages)
    row_tokens = cfg.data.max_length_tokens
    trained = cfg.train.max_steps * cfg.train.rows_per_step * row_tokens if "train" in stages else 0
    evaluations = len({"evaluate_base", "evaluate_trained", "guard"} & stages) + 1
    evaluated = 2 * evaluations * cfg.data.eval_tokens
    decoder, head = 2.0 * layout.num_grid_weights, 2.0 * head_weights
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


def require(needs: Needs, run_dir: Path) -> None:
    """Refuse a run that this machine cannot hold.

    Raises:
        ResourceError: too little memory or disk, with both figures and a remedy.
    """
    available = available_bytes()
    if needs.memory_bytes > available:
        raise ResourceError(
            f"This run needs about {_gb(needs.memory_bytes)} of memory and {_gb(available)} are "
            "free. Close other programs, take storage=q4_0 or a smaller base, lower "
            "train.micro_batch_rows, or set train.gradient_checkpointing=true."
        )
    existing = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needs.disk_bytes > free:
        raise ResourceError(
            f"This run writes about {_gb(needs.disk_bytes)} below {run_dir} and {_gb(free)} are "
            "free there. Make room, or set run_dir to another disk."
        )


def describe(needs: Needs) -> str:
    """One line for the person who waits."""
    minutes = max(1, round(needs.seconds / 60))
    return (
        f"about {minutes} min, {_gb(needs.memory_bytes)} of memory, {_gb(needs.disk_bytes)} of disk"
    )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
