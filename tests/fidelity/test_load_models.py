"""Every kind of model as a plain one: its weights against an independent reference, bit for bit."""

from pathlib import Path

import bitsandbytes.functional as bnb
import gguf
import pytest
import torch
from loaded_cases import (
    NUM_LINEARS,
    adapted_model,
    built_folder,
    candidate_of,
    edit_tensors,
    edited_folder,
    loaded,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from qatlora.adapters.deployed import deployed_weight
from qatlora.adapters.saved import save_adapter
from qatlora.base.from_gguf import config_from_gguf
from qatlora.base.layout import find_layout
from qatlora.base.load import load_tokenizer
from qatlora.base.names import is_stack, weight_key
from qatlora.base.nf4 import dequantized_nf4
from qatlora.base.source import find_source
from qatlora.config import BaseConfig
from qatlora.fidelity.load import BEFORE, LoadSettings, load_models
from qatlora.fidelity.plan import AdapterRun, Checkpoint, GgufModel, Place
from qatlora.grid import decode, encode_reference
from qatlora.llamacpp.gguf_read import read_gguf

FP32 = LoadSettings(torch.device("cpu"), torch.float32, "q8_0")


def checkpoint(folder: Path, storage: str | None = None) -> Checkpoint:
    settings = BaseConfig(path=str(folder), name="tiny")
    source = find_source(settings)
    return Checkpoint(source, find_layout(source, settings), storage)


def only(place: Place, tokenizer_folder: Path) -> PreTrainedModel:
    (found,) = load_models(place, FP32, load_tokenizer(tokenizer_folder))
    return found.model


def as_loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_same_weights(model: PreTrainedModel, other: PreTrainedModel) -> None:
    others = dict(other.named_parameters())
    assert dict(model.named_parameters()).keys() == others.keys()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, others[name]), name


def reference_q4_0(weight: torch.Tensor) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType.Q4_0
    encoded = gguf.quants.quantize(weight.numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(encoded, kind))


def nf4(weight: torch.Tensor) -> torch.Tensor:
    packed, state = bnb.quantize_4bit(
        weight.bfloat16(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return bnb.dequantize_4bit(packed, state).float()


@pytest.mark.parametrize(
    ("storage", "rounded"),
    [(None, lambda w: w), ("bf16", lambda w: w), ("q4_0_reference", reference_q4_0), ("nf4", nf4)],
)
def test_a_storage_rounds_the_decoder_linears_and_nothing_else(tiny_llama_folder, storage, rounded):
    place = checkpoint(tiny_llama_folder, storage)
    expected = as_loaded(tiny_llama_folder)
    with torch.no_grad():
        for name in place.layout.grid:
            linear = expected.get_submodule(name)
            linear.weight.copy_(rounded(linear.weight))
    assert len(place.layout.grid) == NUM_LINEARS
    assert_same_weights(only(place, tiny_llama_folder), expected)


def test_q4_0_are_the_blocks_that_training_would_start_from(tiny_gemma3_folder):
    model = only(checkpoint(tiny_gemma3_folder, "q4_0"), tiny_gemma3_folder)
    base = loaded(tiny_gemma3_folder, "q4_0")
    for name in base.grid:
        blocks = base.model.get_submodule(name).base_blocks()
        assert torch.equal(model.get_submodule(name).weight, decode(blocks, torch.float32))


@pytest.mark.parametrize("tiny_multimodal_folder", ["gemma4_experts"], indirect=True)
@pytest.mark.parametrize("kind", ["q4_0", "nf4"])
def test_experts_are_what_training_would_start_from(tiny_multimodal_folder, kind):
    model = only(checkpoint(tiny_multimodal_folder, kind), tiny_multimodal_folder)
    base = loaded(tiny_multimodal_folder, kind)
    for name in filter(is_stack, base.grid):
        stack = base.model.get_submodule(name)
        if kind == "nf4":
            expected = torch.stack([dequantized_nf4(one.store.weight) for one in stack.linears()])
        else:
            expected = decode(stack.base_blocks())
        assert torch.equal(model.get_parameter(weight_key(name)), expected.float())


@pytest.mark.parametrize("kind", ["q4_0", "nf4"])
def test_a_build_is_what_its_source_becomes_in_that_storage(tiny_llama_folder, tmp_path, kind):
    built_folder(tiny_llama_folder, tmp_path / "build", kind)
    for storage in (None, kind):
        build = only(checkpoint(tmp_path / "build", storage), tiny_llama_folder)
        assert_same_weights(build, only(checkpoint(tiny_llama_folder, kind), tiny_llama_folder))


def test_llama_cpp_rule_is_applied_to_the_decoded_weights_of_a_build(tiny_llama_folder, tmp_path):
    base = edited_folder(tiny_llama_folder, tmp_path / "base")
    generator = torch.Generator().manual_seed(1)

    def on_a_grid(weight: torch.Tensor) -> torch.Tensor:  # no level is 8, as the rule wants one
        return torch.randint(-5, 6, weight.shape, generator=generator).bfloat16() / 64

    weights = load_file(base / "model.safetensors").items()
    edit_tensors(base, {name: on_a_grid(w) for name, w in weights if "_proj.weight" in name})
    built_folder(base, tmp_path / "build", "q4_0")
    place = checkpoint(tmp_path / "build", "q4_0_reference")
    build = only(checkpoint(tmp_path / "build"), tiny_llama_folder)
    by_rule = only(place, tiny_llama_folder)
    for name in place.layout.grid:
        decoded = build.get_submodule(name).weight
        expected = decode(encode_reference(decoded), torch.float32)
        assert torch.equal(by_rule.get_submodule(name).weight, expected)
        assert not torch.equal(expected, decoded)


@pytest.mark.llama_cpp
def test_an_adapter_run_is_its_base_before_and_its_gguf_after(tiny_gemma3_folder, tmp_path):
    adapted = adapted_model(tiny_gemma3_folder, "nf4")
    save_adapter(adapted, tmp_path / "adapter")
    blocks = {name: deployed_weight(layer) for name, layer in adapted.layers()}
    before_blocks = dict(adapted.base_blocks())
    candidate = candidate_of(adapted, tmp_path)
    run = AdapterRun(tmp_path / "adapter", checkpoint(tiny_gemma3_folder))

    def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
        return {name: weight.clone() for name, weight in model.named_parameters()}

    models = load_models(run, FP32, load_tokenizer(tiny_gemma3_folder))
    (first, before), (second, after) = [(each.suffix, weights(each.model)) for each in models]
    assert (first, second) == (BEFORE, "")
    for name in blocks:
        weight = f"{name}.weight"
        assert torch.equal(before[weight], decode(before_blocks[name], torch.float32))
        assert torch.equal(after[weight], decode(blocks[name], torch.float32))
        assert not torch.equal(before[weight], after[weight])
    config = config_from_gguf(read_gguf(candidate.path))
    written = weights(only(GgufModel(candidate.path, config), tiny_gemma3_folder))
    assert written.keys() == after.keys()
    linears = {f"{name}.weight" for name in blocks} | {"model.embed_tokens.weight"}
    for name in linears:
        assert torch.equal(written[name], after[name]), name


def test_sizes_are_those_of_the_storages(tiny_llama_folder, tmp_path):
    built_folder(tiny_llama_folder, tmp_path / "build", "q4_0")
    tokenizer = load_tokenizer(tiny_llama_folder)
    places = [checkpoint(tiny_llama_folder, kind) for kind in ("q4_0", "nf4")]
    places += [checkpoint(tmp_path / "build"), checkpoint(tiny_llama_folder)]
    q4_0, nf4_size, build, bf16 = (
        next(iter(load_models(place, FP32, tokenizer))).num_bytes for place in places
    )
    assert nf4_size < q4_0 < bf16
    assert q4_0 == pytest.approx(build, rel=0.05)  # the file has a header
