import re
from pathlib import Path

import gguf
import pytest
import torch
from loaded_cases import (
    NUM_LINEARS,
    adapted_model,
    edit_tensors,
    edited_folder,
    loaded,
    on_grid_folder,
)
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from qatlora.base.layout import find_layout
from qatlora.base.linear import GridLinear
from qatlora.base.load import load_base, load_plain, load_tokenizer
from qatlora.base.others import deploy_others, deployed_other
from qatlora.base.source import find_source
from qatlora.base.stores import Bf16Store, Nf4Store, Q4Store
from qatlora.config import BaseConfig, Storage, StorageConfig
from qatlora.errors import CheckpointError
from qatlora.grid import digest, recover

STORES = {"nf4": Nf4Store, "q4_0": Q4Store, "bf16": Bf16Store}
LAYOUTS = ["tiny_gemma3_folder", "tiny_llama_folder"]


@pytest.fixture(params=LAYOUTS)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def layout_refusal(folder: Path, **settings: object) -> str:
    base = BaseConfig(path=str(folder), **settings)
    with pytest.raises(CheckpointError) as refused:
        find_layout(find_source(base), base)
    return str(refused.value)


@pytest.mark.parametrize("kind", STORES)
def test_exactly_the_modules_of_the_list_become_grid_linears(kind: str, folder: Path):
    base = loaded(folder, kind)
    found = [n for n, module in base.model.named_modules() if isinstance(module, GridLinear)]
    assert found == list(base.grid) == list(base.trained)
    assert len(found) == NUM_LINEARS
    assert all(re.fullmatch(r"model\.layers\.\d\.(self_attn|mlp)\.\w+_proj", n) for n in found)
    for name in found:
        linear = base.model.get_submodule(name)
        assert type(linear.store) is STORES[kind]
        assert linear.tensor_name == name
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.storage == kind


def test_a_trained_list_leaves_the_other_grid_tensors_without_adapter(folder: Path):
    base = loaded(folder, trained=[r"model\.layers\.1\.mlp\.up_proj"])
    assert base.trained == ("model.layers.1.mlp.up_proj",)
    assert len(base.grid) == NUM_LINEARS


def test_the_output_matrix_is_refused_as_a_trained_module(folder: Path):
    for pattern in ("lm_head", ".*"):
        message = layout_refusal(folder, trained=[pattern])
        assert "matches the output matrix, which is never trained" in message
        assert "Leave it out of base.trained" in message


def test_nf4_storage_is_double_quantized_nf4_in_blocks_of_64(folder: Path):
    base = loaded(folder, "nf4")
    for name in base.grid:
        weight = base.model.get_submodule(name).store.weight
        assert weight.dtype == torch.uint8
        assert weight.numel() * 2 == base.source.tensor(f"{name}.weight").numel()
        assert weight.quant_state.quant_type == "nf4"
        assert weight.quant_state.blocksize == 64
        assert weight.quant_state.nested
        assert weight.quant_state.dtype == torch.bfloat16
    assert not getattr(base.model, "is_loaded_in_4bit", False)  # Trainer and TRL act on it
    assert not hasattr(base.model.config, "quantization_config")


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
def test_a_latent_base_keeps_fractions_and_is_not_on_a_grid(kind: str, folder: Path):
    base = loaded(folder, kind)
    assert base.on_grid_share < 0.01
    assert not base.on_grid
    for name in base.grid:
        latents = base.model.get_submodule(name).store.latents()
        assert (latents - latents.round()).abs().mean() > 0.1


@pytest.mark.parametrize("kind", STORES)
def test_a_checkpoint_on_a_grid_is_recognized_in_every_storage(
    kind: str, folder: Path, tmp_path: Path
):
    blocks = on_grid_folder(folder, tmp_path / "base")
    base = loaded(tmp_path / "base", kind)
    assert base.on_grid
    assert base.on_grid_share > 0.99
    for name in base.grid:
        found = base.model.get_submodule(name).base_blocks()
        if kind == "nf4":  # its steps are the source's; levels have passed through NF4
            share = (found.levels == blocks[name].levels).float().mean()
            assert share > 0.5
        else:
            decoded = found.steps.float().repeat_interleave(32, 1) * found.levels
            assert torch.equal(decoded.bfloat16(), base.source.tensor(f"{name}.weight"))


@pytest.mark.parametrize("kind", STORES)
def test_a_new_adapter_deploys_the_blocks_of_the_base(kind: str, folder: Path):
    adapted = adapted_model(folder, kind, seed=None)
    for (name, base), (_, deployed) in zip(adapted.base_blocks(), adapted.deployed(), strict=True):
        assert digest(base) == digest(deployed)
        if kind != "nf4":
            weight = adapted.base.source.tensor(f"{name}.weight")
            assert digest(deployed) == digest(recover(weight).blocks)


def test_the_digest_is_repeatable_and_tells_storages_and_bases_apart(
    tiny_gemma3_folder: Path, tiny_llama_folder: Path, tmp_path: Path
):
    changed = edited_folder(tiny_llama_folder, tmp_path / "base")
    name = "model.layers.1.mlp.down_proj.weight"
    weight = load_file(changed / "model.safetensors")[name]
    weight[0, 0] += 0.25
    edit_tensors(changed, {name: weight})
    folders = (tiny_gemma3_folder, tiny_llama_folder, changed)
    digests = {(kind, path): loaded(path, kind).digest for kind in STORES for path in folders}
    assert len(set(digests.values())) == 9
    for kind in STORES:
        assert loaded(tiny_llama_folder, kind).digest == digests[kind, tiny_llama_folder]


def test_every_layer_is_counted_while_loading(tiny_llama_folder: Path):
    settings, counted = BaseConfig(path=str(tiny_llama_folder)), []
    source = find_source(settings)
    load_base(
        source,
        find_layout(source, settings),
        StorageConfig(kind=Storage.q4_0),
        torch.device("cpu"),
        load_tokenizer(tiny_llama_folder),
        counted.append,
    )
    assert counted == [1] * NUM_LINEARS


def test_an_nf4_build_loads_with_a_warning_and_with_searched_steps(
    tiny_llama_folder: Path, tmp_path: Path
):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantizer = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    edited_folder(tiny_llama_folder, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(
        tiny_llama_folder, quantization_config=quantizer, dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="Give base.path of the bf16 checkpoint"):
        build = loaded(tmp_path / "base", "nf4")
    original = loaded(tiny_llama_folder, "nf4")
    assert build.grid == original.grid
    assert not build.on_grid
    for name in build.grid:
        stores = [base.model.get_submodule(name).store for base in (build, original)]
        assert torch.equal(stores[0].weight, stores[1].weight)


def test_a_width_that_is_no_multiple_of_32_is_refused(tmp_path: Path):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    message = layout_refusal(tmp_path)
    assert "model.layers.0.self_attn.q_proj has 48 input features" in message
    assert "no multiple of" in message
    assert "use a checkpoint whose widths are multiples of 32" in message


def test_a_trained_pattern_that_matches_nothing_is_refused(folder: Path):
    message = layout_refusal(folder, trained=["up_proj"])
    assert "No linear module matches '(?:up_proj)'" in message
    assert "must match a full module name" in message
    assert "model.layers.0.self_attn.q_proj" in message


def test_a_trained_pattern_that_is_no_regular_expression_is_refused(folder: Path):
    message = layout_refusal(folder, trained=["model.(layers"])
    assert "which is no regular expression" in message
    assert "Give patterns over full module names" in message


def test_an_unknown_model_type_is_refused(tiny_llama_folder: Path, tmp_path: Path):
    folder = edited_folder(tiny_llama_folder, tmp_path / "base", model_type="mamba")
    message = layout_refusal(folder)
    assert "model_type is 'mamba'" in message
    assert "gemma3, gemma3_text, gemma4, gemma4_text, gemma4_unified, llama" in message
    assert "add the architecture's lists" in message


def test_a_folder_that_transformers_cannot_load_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=f"could not load {tmp_path}.*folder is whole"):
        load_plain(tmp_path, torch.device("cpu"), torch.bfloat16)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no tokenizer.*Copy tokenizer.json"):
        load_tokenizer(tmp_path)


def test_embeddings_become_what_q8_0_makes_of_them(folder: Path):
    model = load_plain(folder, torch.device("cpu"), torch.bfloat16)
    kind = gguf.GGMLQuantizationType.Q8_0
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    expected = []
    for layer in layers:
        encoded = gguf.quants.quantize(layer.weight.float().numpy(), kind)
        expected.append(torch.from_numpy(gguf.quants.dequantize(encoded, kind)).bfloat16())
    before = [layer.weight.clone() for layer in layers]
    base = BaseConfig(path=str(folder))
    deploy_others(model, find_layout(find_source(base), base).grid, "q8_0")
    for layer, weight, old in zip(layers, expected, before, strict=True):
        assert torch.equal(layer.weight, weight)
        assert not torch.equal(layer.weight, old)


@pytest.mark.parametrize("other_type", ["bf16", "f32"])
def test_embeddings_in_bf16_or_f32_stay_as_they_are(other_type: str):
    weight = torch.randn(8, 64).bfloat16()
    assert torch.equal(deployed_other(weight, other_type).bfloat16(), weight)
