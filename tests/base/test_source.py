import json
from pathlib import Path

import pytest
import torch
from loaded_cases import edit_tensors, edited_folder, loaded
from safetensors.torch import save_file

from qatlora.base.layout import find_layout
from qatlora.base.source import Source, find_source
from qatlora.config import BaseConfig
from qatlora.errors import CheckpointError

NF4_SUFFIX = ".weight.quant_state.bitsandbytes__nf4"
DECODER_LINEARS = [
    f"model.layers.{layer}.{name}_proj"
    for layer in range(2)
    for name in (
        *(f"self_attn.{part}" for part in "qkvo"),
        *(f"mlp.{part}" for part in ("gate", "up", "down")),
    )
]


def source_of(path: Path) -> Source:
    return find_source(BaseConfig(path=str(path)))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        source_of(path)
    return str(refused.value)


def nf4_build(folder: Path, target: Path, modules: list[str]) -> Path:
    """A checkpoint whose headers say that `modules` are stored as NF4."""
    edited_folder(folder, target)
    state = torch.zeros(4, dtype=torch.uint8)
    edit_tensors(target, {f"{name}{NF4_SUFFIX}": state.clone() for name in modules})
    return target


def test_a_folder_is_described_by_its_headers(tiny_gemma3_folder: Path):
    source = source_of(tiny_gemma3_folder)
    assert source.name == tiny_gemma3_folder.name
    assert source.model_type == "gemma3_text"
    assert source.nf4_modules == frozenset()
    assert source.weight_bytes == (tiny_gemma3_folder / "model.safetensors").stat().st_size
    assert source.tensor("model.norm.weight").shape == (64,)


def test_a_tensor_that_the_checkpoint_lacks_is_named(tiny_gemma3_folder: Path):
    with pytest.raises(CheckpointError, match="no tensor 'model.other.weight'.*download it again"):
        source_of(tiny_gemma3_folder).tensor("model.other.weight")


def test_no_base_at_all_is_refused():
    with pytest.raises(CheckpointError, match=r"No base was given: set base=NAME"):
        find_source(BaseConfig())


def test_a_path_that_is_neither_folder_nor_gguf_is_refused(tmp_path: Path):
    (tmp_path / "model.bin").write_bytes(b"pickle")
    for path in (tmp_path / "absent", tmp_path / "model.bin", tmp_path / "absent.gguf"):
        message = refusal(path)
        assert f"base.path is '{path}'" in message
        assert "neither a folder nor a .gguf file. Give the folder" in message


def test_a_folder_without_config_json_is_refused(tmp_path: Path):
    message = refusal(tmp_path)
    assert f"{tmp_path} has no config.json" in message
    assert "Give the folder that holds" in message


@pytest.mark.parametrize("text", ['{"model_type": ', "[]", "{}", "\udcff"])
def test_a_config_json_that_cannot_be_used_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    message = refusal(tmp_path)
    assert f"{path} cannot be used" in message
    assert "must be a JSON object with a model_type. Download the checkpoint again." in message


def test_a_folder_without_safetensors_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    message = refusal(tmp_path)
    assert f"{tmp_path} holds no .safetensors file" in message
    assert "convert the checkpoint with transformers' save_pretrained" in message


@pytest.mark.parametrize("kept_bytes", [0, 5, 200, -1])
def test_a_safetensors_file_that_was_cut_off_is_refused(
    kept_bytes: int, tiny_gemma3_folder: Path, tmp_path: Path
):
    folder = edited_folder(tiny_gemma3_folder, tmp_path / "base")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    message = refusal(folder)
    assert f"{path} is no whole safetensors file" in message
    assert "fetch it again" in message


def test_one_broken_shard_of_several_is_named(tiny_gemma3_folder: Path, tmp_path: Path):
    folder = edited_folder(tiny_gemma3_folder, tmp_path / "base")
    broken = folder / "model-00002-of-00002.safetensors"
    save_file({"x": torch.zeros(64)}, broken)
    broken.write_bytes(broken.read_bytes()[:-8])
    assert f"{broken} is no whole safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    ("stored", "example"),
    [
        ([*DECODER_LINEARS, "lm_head"], "it quantizes lm_head"),
        (DECODER_LINEARS[1:], f"it leaves {DECODER_LINEARS[0]} unquantized"),
    ],
    ids=["one too many", "one too few"],
)
def test_an_nf4_build_of_other_modules_than_the_list_is_refused(
    stored: list[str], example: str, tiny_llama_folder: Path, tmp_path: Path
):
    folder = nf4_build(tiny_llama_folder, tmp_path / "base", stored)
    source = source_of(folder)
    assert source.nf4_modules == frozenset(stored)
    with pytest.raises(CheckpointError) as refused:
        find_layout(source, BaseConfig())
    message = str(refused.value)
    assert f"{folder} stores {len(stored)} modules as NF4" in message
    assert "the list of its architecture has 14" in message
    assert example in message
    assert "build it again from the bf16 checkpoint" in message


@pytest.mark.parametrize("kind", ["q4_0", "bf16"])
def test_an_nf4_build_is_refused_for_a_storage_that_would_keep_a_grid(
    kind: str, tiny_llama_folder: Path, tmp_path: Path
):
    folder = nf4_build(tiny_llama_folder, tmp_path / "base", DECODER_LINEARS)
    with pytest.raises(CheckpointError) as refused:
        loaded(folder, kind)
    message = str(refused.value)
    assert f"{folder} is stored as NF4 and storage={kind} was asked for" in message
    assert "Use storage=nf4, or give the bf16 checkpoint." in message
