"""The checkpoint on its grid: what is read from it is what was deployed, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from loaded_cases import adapted_model, loaded
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qatlora.adapters.deployed import LatentRule
from qatlora.adapters.latents import LatentModel, attach_latents
from qatlora.errors import ExportError
from qatlora.export.checkpoint import save_checkpoint
from qatlora.grid import decode, recover
from qatlora.grid.format import pack


def trained(folder: Path, steps: str) -> LatentModel:
    model = attach_latents(loaded(folder, "bf16"), LatentRule(steps))
    generator = torch.Generator().manual_seed(6)
    groups = model.parameter_groups()
    with torch.no_grad():
        for parameter in [*groups.levels, *groups.steps]:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.settle()
    return model


@pytest.mark.parametrize("layout", ["tiny_gemma3_folder", "tiny_llama_folder"])
@pytest.mark.parametrize("steps", ["frozen", "recomputed", "learned"])
def test_loading_the_saved_base_gives_the_trained_blocks_bit_for_bit(
    steps: str, layout: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    require_same_blocks(trained(request.getfixturevalue(layout), steps), tmp_path / "base")


@pytest.mark.parametrize("tiny_multimodal_folder", ["gemma4_experts"], indirect=True)
def test_the_experts_of_a_saved_base_come_back_bit_for_bit(
    tiny_multimodal_folder: Path, tmp_path: Path
) -> None:
    require_same_blocks(trained(tiny_multimodal_folder, "learned"), tmp_path / "base")


def require_same_blocks(model: LatentModel, folder: Path) -> None:
    """Save the model and load it again."""
    result = save_checkpoint(model, folder, {}, lambda _: None)
    assert result.on_grid_share == 1
    assert result.differing_blocks == 0
    again = loaded(folder, "q4_0")
    assert again.on_grid_share == 1
    deployed = dict(model.deployed())
    for name in again.grid:
        blocks = again.model.get_submodule(name).base_blocks()
        assert torch.equal(pack(blocks), pack(deployed[name]))
    identity = json.loads((folder / "qatlora.json").read_text())
    assert identity["blocks"] == model.deployed_digests()


def test_the_folder_is_an_ordinary_checkpoint_with_the_other_tensors_untouched(
    tiny_gemma3_folder: Path, tmp_path: Path
) -> None:
    model = trained(tiny_gemma3_folder, "frozen")
    save_checkpoint(model, tmp_path / "base", {}, lambda _: None)
    before = load_file(tiny_gemma3_folder / "model.safetensors")
    after = load_file(tmp_path / "base" / "model.safetensors")
    grid = {f"{name}.weight": decode(blocks, torch.bfloat16) for name, blocks in model.deployed()}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], grid.get(name, before[name])) for name in after)
    assert all(recover(after[name]).on_grid.all() for name in grid)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert plain.dtype is torch.bfloat16
    assert {path.name for path in tmp_path.joinpath("base").iterdir()} >= {
        "config.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip


def test_adapters_are_saved_with_the_bf16_values_that_they_trained_with(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    model = adapted_model(tiny_llama_folder, "bf16", kind="both")
    result = save_checkpoint(model, tmp_path / "base", {}, lambda _: None)
    assert result.on_grid_share == 1
    stored = load_file(tmp_path / "base" / "model.safetensors")
    for name, blocks in model.deployed():
        assert torch.equal(stored[f"{name}.weight"], decode(blocks, torch.bfloat16))


def test_shards_keep_their_names_and_index(tiny_llama_folder: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.bfloat16)
    sharded = tmp_path / "sharded"
    plain.save_pretrained(sharded, max_shard_size="100KB")
    for path in tiny_llama_folder.iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            (sharded / path.name).write_bytes(path.read_bytes())
    assert len(list(sharded.glob("*.safetensors"))) > 1
    model = trained(sharded, "frozen")
    save_checkpoint(model, tmp_path / "base", {}, lambda _: None)
    index = "model.safetensors.index.json"
    assert (tmp_path / "base" / index).read_text() == (sharded / index).read_text()
    assert loaded(tmp_path / "base", "q4_0").on_grid_share == 1


def test_an_nf4_source_is_refused_before_anything_is_written(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    model = trained(tiny_llama_folder, "frozen")
    object.__setattr__(model.base.source, "nf4_modules", frozenset({"x"}))
    with pytest.raises(ExportError, match=r"base\.path of the bf16 checkpoint"):
        save_checkpoint(model, tmp_path / "base", {}, lambda _: None)
    assert not (tmp_path / "base").exists()
