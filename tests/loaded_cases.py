"""Loaded bases, adapters and candidates made of the tiny checkpoints, for several test folders."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qatlora import pipeline
from qatlora.adapters.attach import AdaptedModel, attach
from qatlora.adapters.deployed import AdapterRule
from qatlora.base.layout import find_layout
from qatlora.base.load import LoadedBase, load_base, load_tokenizer
from qatlora.base.names import is_stack, weight_key
from qatlora.base.source import find_source
from qatlora.config import (
    BaseConfig,
    BuildConfig,
    ExportConfig,
    FidelityConfig,
    RootConfig,
    Storage,
    StorageConfig,
)
from qatlora.export.candidate import Candidate, write_candidate
from qatlora.grid import Q4Blocks, decode, encode_reference
from qatlora.report.results import RunReport

RULE = AdapterRule(
    kind="lora", rank=4, alpha=8.0, steps_rank=4, rounding="frozen", dither="auto", seed=5
)
NUM_LINEARS = 14
"""Decoder linears of a tiny checkpoint: two layers of seven."""


def loaded(folder: Path, kind: str = "q4_0", **settings: Any) -> LoadedBase:
    base = BaseConfig(path=str(folder), name="tiny", **settings)
    source = find_source(base)
    return load_base(
        source,
        find_layout(source, base),
        StorageConfig(kind=Storage[kind]),
        torch.device("cpu"),
        load_tokenizer(folder),
    )


def fill(adapted: AdaptedModel, seed: int) -> None:
    """Random parameters where a new adapter has zeros, wide enough to move many levels."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name or "lora_steps_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def adapted_model(
    folder: Path, storage: str = "q4_0", seed: int | None = 1, **changes: Any
) -> AdaptedModel:
    """A base with an adapter; `seed` of its parameters, None leaves it without effect."""
    adapted = attach(loaded(folder, storage), dataclasses.replace(RULE, **changes))
    if seed is not None:
        fill(adapted, seed)
    return adapted


def candidate_of(adapted: AdaptedModel, run_dir: Path, **stamp: str) -> Candidate:
    return write_candidate(adapted, ExportConfig(), run_dir, stamp, lambda _: None)


def copied(candidate: Candidate, run_dir: Path) -> Candidate:
    """A candidate of one's own to break."""
    shutil.copytree(candidate.path.parent, run_dir / ".candidate")
    path = run_dir / ".candidate" / candidate.path.name
    return Candidate(path, run_dir / candidate.final_path.name, candidate.places)


def edited_folder(source: Path, target: Path, **config: Any) -> Path:
    """A copy of a checkpoint with some values of config.json changed."""
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def edit_tensors(folder: Path, changes: dict[str, Tensor]) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | changes, path, metadata={"format": "pt"})


def on_grid_folder(source: Path, target: Path) -> dict[str, Q4Blocks]:
    """Copy a checkpoint with its decoder's weights moved onto a Q4_0 grid; returns the blocks."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    blocks = {
        name.removesuffix(".weight"): encode_reference(tensor.float())
        for name, tensor in tensors.items()
        if "_proj.weight" in name or is_stack(name)
    }
    moved = {weight_key(name): decode(block, torch.bfloat16) for name, block in blocks.items()}
    edit_tensors(target, moved)
    return blocks


def built_folder(
    source: Path,
    target: Path,
    kind: str,
    *,
    stages: Sequence[str] = ("preflight", "build", "report"),
    fidelity: Mapping[str, Any] | None = None,
    **settings: Any,
) -> RunReport:
    """Build `target` from a checkpoint, by default without the recipe's table; its report."""
    cfg = RootConfig(stages=list(stages), run_dir=f"{target}-run")
    cfg.card.name = f"{kind}_build"
    cfg.base.path, cfg.base.name, cfg.storage.kind = str(source), "tiny", Storage[kind]
    cfg.build = BuildConfig(**{"path": str(target), "max_new_tokens": 4} | settings)
    cfg.fidelity = FidelityConfig(**(fidelity or {}))
    cfg.train.device, cfg.logging.progress_bars = "cpu", False
    return pipeline.run(cfg)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
