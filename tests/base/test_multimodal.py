"""Multimodal checkpoints: names in the files, frozen towers, NF4 in a tower, what is left out."""

from pathlib import Path

import pytest
import torch
from loaded_cases import (
    adapted_model,
    built_folder,
    candidate_of,
    edit_tensors,
    edited_folder,
    loaded,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qatlora.base.from_gguf import config_from_gguf
from qatlora.base.layout import find_layout, plain_config
from qatlora.base.names import model_name
from qatlora.base.others import deploy_others
from qatlora.base.source import find_source, read_source
from qatlora.config import BaseConfig
from qatlora.errors import CheckpointError
from qatlora.llamacpp.gguf_read import GgufFile, read_gguf


def test_names_in_the_files_become_those_of_the_loaded_model(tiny_multimodal_folder: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_multimodal_folder)
    source = read_source(tiny_multimodal_folder, "tiny")
    tied = set(model.all_tied_weights_keys)
    assert set(source.files) == model.state_dict().keys() - tied
    shapes = source.shapes()
    for name, tensor in model.state_dict().items():
        if name not in tied:
            assert shapes[name] == tuple(tensor.shape)
            assert torch.equal(source.tensor(name).float(), tensor.float()), name


def test_the_vision_tower_of_older_gemma3_checkpoints_is_found():
    stored = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    expected = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    assert model_name(stored, "gemma3") == expected
    assert model_name(stored, "llama") == stored


def test_towers_stay_as_they_are_and_every_matrix_of_the_decoder_is_deployed(
    tiny_multimodal_folder: Path,
):
    base = loaded(tiny_multimodal_folder)
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    deploy_others(base.model, base.grid, "q8_0")
    changed = {n for n, p in base.model.named_parameters() if not torch.equal(p, before[n])}
    matrices = {
        name
        for name, parameter in base.model.named_parameters()
        if name.startswith("model.language_model.")
        and parameter.ndim == 2
        and ".router." not in name  # F32 in the file
    }
    assert changed == matrices
    assert any("embed_tokens.weight" in name for name in changed)


@pytest.mark.parametrize(
    "tiny_multimodal_folder", ["gemma3_multimodal", "gemma4_dense"], indirect=True
)
def test_a_public_nf4_build_may_have_its_tower_in_nf4_but_no_other_decoder(
    tiny_multimodal_folder: Path, tmp_path: Path
):
    base = BaseConfig(path=str(tiny_multimodal_folder))
    layout = find_layout(find_source(base), base)
    towers = [name for name in layout.not_nf4 if "_tower." in name and "layers" in name]
    assert towers
    skipped = [name for name in layout.not_nf4 if name not in towers]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skipped,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny_multimodal_folder, dtype=torch.bfloat16, quantization_config=config
    )
    model.save_pretrained(tmp_path / "nf4")
    build = BaseConfig(path=str(tmp_path / "nf4"))
    found = find_layout(find_source(build), build)
    assert set(found.nf4) == {*layout.nf4, *towers}
    assert found.trained == layout.trained


@pytest.mark.llama_cpp
@pytest.mark.parametrize("tiny_multimodal_folder", ["gemma4_per_layer"], indirect=True)
def test_keys_of_layers_that_share_them_are_not_exported(
    tiny_multimodal_folder: Path, tmp_path: Path
):
    """Some published checkpoints have them, and transformers passes over them."""
    folder = edited_folder(tiny_multimodal_folder, tmp_path / "base")
    layers = "model.language_model.layers."
    key = load_file(folder / "model.safetensors")[f"{layers}0.self_attn.k_proj.weight"]
    stray = f"{layers}3.self_attn.k_proj.weight"
    edit_tensors(folder, {stray: key.clone()})
    candidate = candidate_of(adapted_model(folder), tmp_path / "run")
    exported = read_gguf(candidate.path).tensors
    assert "blk.0.attn_k.weight" in exported
    assert "blk.3.attn_k.weight" not in exported
    built_folder(folder, tmp_path / "build", "q4_0")
    assert loaded(tmp_path / "build").digest == loaded(folder).digest


@pytest.mark.parametrize("tiny_multimodal_folder", ["gemma4_dense"], indirect=True)
def test_a_gemma4_gguf_is_read_only_if_it_is_our_own_and_beside_its_checkpoint(
    tiny_multimodal_folder: Path,
):
    beside = plain_config(tiny_multimodal_folder)
    refusal = pytest.raises(CheckpointError, match=r"Gemma 4 .*qatlora's own.*base\.path=FOLDER")
    foreign = GgufFile(Path("x.gguf"), {"general.architecture": "gemma4"}, {})
    with refusal:
        config_from_gguf(foreign, beside)
    own = GgufFile(Path("x.gguf"), foreign.metadata | {"qatlora.version": "1"}, {})
    with refusal:
        config_from_gguf(own)
    assert config_from_gguf(own, beside) is beside
