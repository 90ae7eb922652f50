"""What a run is said to need before it starts."""

from pathlib import Path

import torch

from qatlora import preflight
from qatlora.base.layout import find_layout
from qatlora.base.source import find_source
from qatlora.config import RootConfig, Storage, Trained


def test_trained_weights_count_with_gradient_moments_and_checkpoints(
    tiny_llama_folder: Path,
) -> None:
    cfg = RootConfig(stages=["load_base", "train"])
    cfg.base.path, cfg.storage.kind = str(tiny_llama_folder), Storage.bf16
    source = find_source(cfg.base)
    layout = find_layout(source, cfg.base)
    adapters = preflight.estimate(cfg, source, layout, torch.device("cpu"))
    cfg.distill.train = Trained.weights
    weights = preflight.estimate(cfg, source, layout, torch.device("cpu"))
    assert weights.memory_bytes - adapters.memory_bytes == 16 * layout.num_grid_weights
    assert weights.disk_bytes - adapters.disk_bytes == 36 * layout.num_grid_weights
    cfg.stages = ["load_base", "train", "save_base"]
    saved = preflight.estimate(cfg, source, layout, torch.device("cpu"))
    assert saved.disk_bytes - weights.disk_bytes == 2 * layout.num_parameters
