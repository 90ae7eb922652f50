"""What a run will need, said before it starts: memory, disk, time; a refusal if it cannot work.

The figures are estimates from the checkpoint's config and one short measurement of this machine's
matrix product; the run's report holds what it really took.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from qatlora.base.layout import Layout
from qatlora.base.source import Source
from qatlora.config import RootConfig, Storage
from qatlora.errors import ResourceError
from qatlora.memory import available_bytes

_BITS_PER_WEIGHT = {"nf4": 4.63, "q4_0": 5.0, "bf16": 16.5}
_IMPORTED_LIBRARIES_BYTES = 1.1e9
_BF16_BYTES = 2
_FP32_BYTES = 4
# Share of the measured rate that whole stages reach: elementwise passes and small products.
_EFFICIENCY = 0.3
# A tensor that is being built: as stored, its levels and packed blocks, what they decode to.
_BUILD_BYTES_PER_WEIGHT = 8
_BUILD_WEIGHTS_PER_SECOND = 2e7


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
    text = source.config.get("text_config", source.config)
    hidden, vocab = int(text["hidden_size"]), int(text["vocab_size"])
    others = layout.num_parameters - layout.num_grid_weights
    stored = layout.num_grid_weights * _BITS_PER_WEIGHT[cfg.storage.kind.name] / 8
    student = others * _BF16_BYTES + stored + layout.num_grid_weights * _BF16_BYTES
    second_model = layout.num_parameters * _BF16_BYTES  # the teacher, later the file read back
    head_fp32_or_logits = 3 * cfg.evaluate.tokens_per_chunk * vocab * _FP32_BYTES
    memory = _IMPORTED_LIBRARIES_BYTES + student + second_model + head_fp32_or_logits
    disk = 2 * (layout.num_grid_weights * 4.5 / 8 + others * _BF16_BYTES)
    flops = _flops(cfg, layout, hidden * vocab)
    return Needs(memory, disk, flops / (_EFFICIENCY * _measured_rate(device)))


def _estimate_build(cfg: RootConfig, layout: Layout) -> Needs:
    """A build streams: one shard, the tensors at work and, for NF4, the model that is saved."""
    others = layout.num_parameters - layout.num_grid_weights
    bits = _BITS_PER_WEIGHT[cfg.storage.kind.name]
    built = layout.num_grid_weights * bits / 8 + others * _BF16_BYTES
    memory = _IMPORTED_LIBRARIES_BYTES + min(built, cfg.build.max_shard_gb * 1e9)
    memory += layout.max_grid_weights * _BUILD_BYTES_PER_WEIGHT
    if cfg.storage.kind is Storage.nf4:
        memory += built
    return Needs(memory, built, layout.num_grid_weights / _BUILD_WEIGHTS_PER_SECOND)


def _flops(cfg: RootConfig, layout: Layout, head_weights: int) -> float:
    """Multiply-adds times two of training and evaluation."""
    stages = set(cfg.stages)
    row_tokens = cfg.data.max_length_tokens
    trained = cfg.train.max_steps * cfg.train.rows_per_step * row_tokens if "train" in stages else 0
    evaluations = len({"evaluate_base", "evaluate_trained", "guard"} & stages) + 1
    evaluated = 2 * evaluations * cfg.data.eval_tokens
    decoder, head = 2.0 * layout.num_grid_weights, 2.0 * head_weights
    # Training: student forward, two backward products and the teacher; the head three times.
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
            "free. Close other programs, take storage=q4_0 or a smaller base, or lower "
            "evaluate.tokens_per_chunk."
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
