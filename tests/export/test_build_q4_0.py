import json
from pathlib import Path

import jsonschema
import pytest
import torch
from loaded_cases import NUM_LINEARS, built_folder, edit_tensors, edited_folder, on_grid_folder
from safetensors.torch import load_file

from qatlora.base.source import find_source
from qatlora.config import BaseConfig
from qatlora.errors import CheckpointError, ConfigError
from qatlora.export.shards import ShardWriter
from qatlora.grid import encode_reference, pack, recover
from qatlora.report.json_report import load_schema


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def record_of(folder: Path) -> dict:
    return json.loads((folder / "grid.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("layout", ["tiny_gemma3_folder", "tiny_llama_folder"])
def test_listed_tensors_are_the_bytes_of_a_gguf_and_all_others_are_kept(
    layout: str, tmp_path: Path, request: pytest.FixtureRequest
):
    source = request.getfixturevalue(layout)
    built_folder(source, tmp_path / "packed", "q4_0")
    before, after = tensors_of(source), tensors_of(tmp_path / "packed")
    assert after.keys() == before.keys()
    packed = [name for name, tensor in after.items() if tensor.dtype == torch.uint8]
    assert len(packed) == NUM_LINEARS
    for name, tensor in after.items():
        expected = pack(recover(before[name]).blocks) if name in packed else before[name]
        assert torch.equal(tensor, expected)


def test_a_base_on_a_grid_is_kept_without_error(tiny_gemma3_folder: Path, tmp_path: Path):
    on_grid_folder(tiny_gemma3_folder, tmp_path / "bf16")
    report = built_folder(tmp_path / "bf16", tmp_path / "packed", "q4_0")
    assert report.build.relative_error == 0
    assert report.base.on_grid_share == 1
    assert record_of(tmp_path / "packed")["relative_error"] == 0


def test_a_latent_base_loses_less_than_by_the_reference_encoder(
    tiny_llama_folder: Path, tmp_path: Path
):
    report = built_folder(tiny_llama_folder, tmp_path / "packed", "q4_0")
    assert report.base.on_grid_share == 0
    squared_error = squared_weight = 0.0
    for name, tensor in tensors_of(tiny_llama_folder).items():
        if "_proj" in name:
            steps, levels = encode_reference(tensor.float())
            stored = (steps.float().repeat_interleave(32, 1) * levels).bfloat16()
            squared_error += (tensor.float() - stored.float()).square().sum().item()
            squared_weight += tensor.float().square().sum().item()
    reference = (squared_error / squared_weight) ** 0.5
    assert 0.05 < report.build.relative_error < reference


def test_the_report_and_the_card_tell_what_was_built(tiny_llama_folder: Path, tmp_path: Path):
    report = built_folder(tiny_llama_folder, tmp_path / "packed", "q4_0")
    document = json.loads((tmp_path / "packed-run" / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(document, load_schema())
    build = document["build"]
    assert build["modules"] == dict.fromkeys(
        [f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")], 2
    )
    assert build["bytes"] == (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert build["bytes"] < build["source_bytes"]
    assert document["base"]["digest"] == record_of(tmp_path / "packed")["base_digest"]
    card = (tmp_path / "packed" / "README.md").read_text(encoding="utf-8")
    for fact in (report.base.digest, report.build.source_digest, "storage=q4_0", "2 q_proj"):
        assert fact in card
    text = (tmp_path / "packed-run" / "report.md").read_text(encoding="utf-8")
    assert "Packed Q4_0 folder built." in text
    assert str(tmp_path / "packed") in text


def test_tokenizer_and_template_come_along_and_the_source_card_does_not(
    tiny_gemma3_folder: Path, tmp_path: Path
):
    edited_folder(tiny_gemma3_folder, tmp_path / "bf16")
    (tmp_path / "bf16" / "README.md").write_text("the source's card")
    (tmp_path / "bf16" / "pytorch_model.bin").write_text("other weights")
    built_folder(tmp_path / "bf16", tmp_path / "packed", "q4_0")
    for name in ("tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        expected = (tiny_gemma3_folder / name).read_bytes()
        assert (tmp_path / "packed" / name).read_bytes() == expected
    assert "the source's card" not in (tmp_path / "packed" / "README.md").read_text()
    assert not (tmp_path / "packed" / "pytorch_model.bin").exists()


def test_the_source_digest_does_not_depend_on_how_the_source_is_cut_into_files(
    tiny_llama_folder: Path, tmp_path: Path
):
    edited_folder(tiny_llama_folder, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").unlink()
    shards = ShardWriter(tmp_path / "cut", max_bytes=30_000)
    for name, tensor in reversed(tensors_of(tiny_llama_folder).items()):
        shards.add(name, tensor)
    shards.close()
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    records = []
    for name, folder in (("a", tiny_llama_folder), ("b", tmp_path / "cut")):
        built_folder(folder, tmp_path / name, "q4_0")
        records.append(record_of(tmp_path / name))
    assert records[0] == records[1]


def test_a_large_build_is_cut_into_numbered_files_with_an_index(
    tiny_llama_folder: Path, tmp_path: Path
):
    built_folder(tiny_llama_folder, tmp_path / "packed", "q4_0", max_shard_gb=4e-5)
    shards = sorted((tmp_path / "packed").glob("*.safetensors"))
    index = json.loads((tmp_path / "packed" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    for shard in shards:
        held = load_file(shard)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 40_000
        assert all(index["weight_map"][name] == shard.name for name in held)
    tensors = tensors_of(tmp_path / "packed")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_a_stray_lm_head_of_a_tied_model_is_left_out(tiny_gemma3_folder: Path, tmp_path: Path):
    edited_folder(tiny_gemma3_folder, tmp_path / "bf16")
    embeddings = tensors_of(tiny_gemma3_folder)["model.embed_tokens.weight"]
    edit_tensors(tmp_path / "bf16", {"lm_head.weight": embeddings + 1})
    built_folder(tmp_path / "bf16", tmp_path / "packed", "q4_0")
    assert "lm_head.weight" not in tensors_of(tmp_path / "packed")


def test_a_build_that_is_killed_leaves_nothing_at_its_place(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(self: ShardWriter) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "close", killed)
    with pytest.raises(KeyboardInterrupt):
        built_folder(tiny_llama_folder, tmp_path / "packed", "q4_0", max_shard_gb=4e-5)
    assert not (tmp_path / "packed").exists()
    assert not list(tmp_path.glob(".packed*"))


def test_a_folder_that_exists_is_not_replaced(tiny_llama_folder: Path, tmp_path: Path):
    (tmp_path / "packed").mkdir()
    with pytest.raises(ConfigError, match="exists already.*Remove it"):
        built_folder(tiny_llama_folder, tmp_path / "packed", "q4_0")


def test_a_build_of_a_build_is_refused(tiny_llama_folder: Path, tmp_path: Path):
    built_folder(tiny_llama_folder, tmp_path / "packed", "q4_0")
    with pytest.raises(CheckpointError, match="stored as packed Q4_0 already.*bf16 checkpoint"):
        built_folder(tmp_path / "packed", tmp_path / "again", "q4_0")
    assert not (tmp_path / "again").exists()


def test_an_empty_header_is_found_before_the_build(tiny_llama_folder: Path, tmp_path: Path):
    edited_folder(tiny_llama_folder, tmp_path / "bf16")
    (tmp_path / "bf16" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        find_source(BaseConfig(path=str(tmp_path / "bf16")))
