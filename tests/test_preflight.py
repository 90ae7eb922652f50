"""What a run is said to need before it starts."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qatlora import pipeline, preflight
from qatlora.base.layout import find_layout, plain_config
from qatlora.base.source import find_source
from qatlora.config import Latent, Optimizer, RootConfig, Storage, Trained
from qatlora.distill.cache import bytes_per_token
from qatlora.errors import ConfigError, ResourceError
from qatlora.plan.shape import model_shape
from qatlora.state import Run


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
    shape, kind = model_shape(plain_config(tiny_llama_folder)), cfg.adapter.kind.name
    adapter = shape.adapter_parameters(kind, 16, 16)
    more = layout.num_grid_weights - adapter
    assert weights.memory_bytes - adapters.memory_bytes > 16 * more
    assert weights.disk_bytes - adapters.disk_bytes == 36 * layout.num_grid_weights
    cfg.stages = ["load_base", "train", "save_base"]
    saved = preflight.estimate(cfg, source, layout, torch.device("cpu"))
    assert saved.disk_bytes - weights.disk_bytes == 2 * layout.num_parameters
    cfg.distill.latent, cfg.train.optimizer = Latent.bf16, Optimizer.adamw_8bit
    lean = preflight.estimate(cfg, source, layout, torch.device("cpu"))
    # Latent and gradient lose two bytes each, the moments six, less their scales.
    assert saved.memory_bytes - lean.memory_bytes > 9.9 * layout.num_grid_weights
    less_in_checkpoints = saved.disk_bytes - lean.disk_bytes
    assert less_in_checkpoints == pytest.approx(24 * layout.num_grid_weights, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "bits"), [("q4_0", 4.5), ("nf4", 4 + 8 / 64 + 32 / 64 / 256 + 16 / 32)]
)
def test_a_build_counts_what_it_writes_and_nothing_of_a_run(
    kind: str, bits: float, tiny_llama_folder: Path
) -> None:
    cfg = RootConfig(stages=["preflight", "build", "report"])
    cfg.base.path, cfg.storage.kind = str(tiny_llama_folder), Storage[kind]
    source = find_source(cfg.base)
    layout = find_layout(source, cfg.base)
    needs = preflight.estimate(cfg, source, layout, torch.device("cpu"))
    others = layout.num_parameters - layout.num_grid_weights
    assert needs.disk_bytes == layout.num_grid_weights * bits / 8 + 2 * others
    assert needs.memory_bytes < 1.11e9  # the libraries


def test_a_cache_counts_its_tokens_its_head_and_the_teacher_alone(tiny_llama_folder: Path) -> None:
    cfg = RootConfig(stages=["preflight", "load_data", "teacher_cache", "report"])
    cfg.base.path, cfg.data.eval_tokens = str(tiny_llama_folder), 1
    source = find_source(cfg.base)
    layout = find_layout(source, cfg.base)
    needs = preflight.estimate(cfg, source, layout, torch.device("cpu"))
    cfg.train.max_steps *= 2
    longer = preflight.estimate(cfg, source, layout, torch.device("cpu"))
    tokens = cfg.train.rows_per_step * cfg.train.max_steps / 2 * cfg.data.max_length_tokens
    added = tokens * bytes_per_token(cfg.teacher.cache_top_k, 384)
    assert longer.disk_bytes - needs.disk_bytes == added
    assert needs.disk_bytes - added == 2 * 64 * (384 + 2)
    assert longer.memory_bytes == needs.memory_bytes


@pytest.mark.parametrize("stage", ["teacher_cache", "train"])
def test_a_full_disk_is_looked_for_where_the_run_writes(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = RootConfig(stages=["preflight", stage], run_dir=str(tmp_path / "small" / "run"))
    cfg.teacher.cache_path = str(tmp_path / "large" / "cache")
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
    free = {tmp_path / "small": 10, tmp_path / "large": 1000}
    monkeypatch.setattr(
        "shutil.disk_usage", lambda folder: SimpleNamespace(free=free[Path(folder)])
    )
    written_to = preflight.target(cfg)
    cached = stage == "teacher_cache"
    enough = 1000 if cached else 10
    preflight.require(preflight.Needs(0, enough, 0), written_to, torch.device("cpu"))
    setting = r"teacher\.cache_path" if cached else "run_dir"
    with pytest.raises(ResourceError, match=f"set {setting} to another disk"):
        preflight.require(preflight.Needs(0, enough + 1, 0), written_to, torch.device("cpu"))


def test_processes_of_one_machine_need_the_memory_of_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qatlora.preflight.available_bytes", lambda: 10e9)
    needs, written_to = preflight.Needs(4e9, 0, 0), preflight.Target(tmp_path, "run_dir")
    monkeypatch.setenv("WORLD_SIZE", "4")  # on two machines
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    preflight.require(needs, written_to, torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(
        ResourceError,
        match=r"12\.0 GB of memory are needed \(3 processes of 4\.0 GB\) .* free.*start fewer",
    ):
        preflight.require(needs, written_to, torch.device("cpu"))


def test_a_validation_counts_one_model_in_fp32_and_its_merge_in_bf16(
    tiny_llama_folder: Path,
) -> None:
    cfg = RootConfig(stages=["preflight", "load_data", "validate", "report"])
    cfg.base.path = str(tiny_llama_folder)
    source = find_source(cfg.base)
    layout = find_layout(source, cfg.base)
    needs = preflight.estimate(cfg, source, layout, torch.device("cpu"))
    streaming = RootConfig(stages=["preflight", "inspect"])
    libraries = 1.1e9
    assert needs.memory_bytes - libraries == pytest.approx(6 * layout.num_parameters)
    assert needs.disk_bytes == 5 * layout.num_parameters
    assert (
        needs.seconds > preflight.estimate(streaming, source, layout, torch.device("cpu")).seconds
    )


def test_a_comparison_counts_the_base_file_of_one_text_where_llama_cpp_judges(
    tiny_llama_folder: Path,
) -> None:
    cfg = RootConfig(stages=["preflight", "fidelity", "report"])
    cfg.base.path, cfg.fidelity.llama_cpp_tokens = str(tiny_llama_folder), 500
    source = find_source(cfg.base)
    layout = find_layout(source, cfg.base)
    needs = preflight.estimate(cfg, source, layout, torch.device("cpu"))
    cfg.fidelity.llama_cpp = True
    judged = preflight.estimate(cfg, source, layout, torch.device("cpu"))
    assert judged.disk_bytes - needs.disk_bytes == 500 * 2 * (384 + 4)


def test_a_gpu_that_is_not_there_is_refused_before_anything_long() -> None:
    cfg = RootConfig(stages=["preflight"])
    cfg.train.device = "cuda:64"
    with pytest.raises(ConfigError, match=r"train\.device=cuda:64: .* GPUs.*train\.device=auto"):
        pipeline.run(cfg)


def test_a_gpu_whose_driver_does_not_suit_pytorch_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Run.start(RootConfig()).device == torch.device("cpu")


def test_an_unknown_choice_of_kernels_is_refused_before_anything_long(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = RootConfig(stages=["preflight"], run_dir=str(tmp_path))
    cfg.base.path, cfg.train.device = str(tiny_llama_folder), "cpu"
    monkeypatch.setenv("QATLORA_COMPILE", "maybe")
    with pytest.raises(ConfigError, match="QATLORA_COMPILE is 'maybe'"):
        pipeline.run(cfg)
