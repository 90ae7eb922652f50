import json
from pathlib import Path

import pytest
from loaded_cases import (
    NUM_LINEARS,
    adapted_model,
    candidate_of,
    copied,
    edit_tensors,
    edited_folder,
)
from safetensors.torch import load_file, save_file

from qatlora.adapters.attach import AdaptedModel
from qatlora.data.templates import has_generation_markers, training_template
from qatlora.errors import ExportError
from qatlora.export import candidate as candidate_module
from qatlora.export.candidate import Candidate, GuardPassed
from qatlora.export.publish import publish
from qatlora.files import sha256_of_file
from qatlora.llamacpp.convert import ConvertResult, TensorPlace
from qatlora.llamacpp.gguf_read import read_gguf

STAMP = {"recipe": "a test", "base_digest": "0" * 64}
MOSTLY_Q4_0 = 2
"""LLAMA_FTYPE_MOSTLY_Q4_0 of llama.h."""


@pytest.fixture(scope="module")
def gemma3(tiny_gemma3_folder: Path) -> AdaptedModel:
    return adapted_model(tiny_gemma3_folder)


@pytest.fixture(scope="module")
def written(gemma3: AdaptedModel, tmp_path_factory: pytest.TempPathFactory) -> Candidate:
    """A candidate whose tokenizer had the template that training needs."""
    tokenizer = gemma3.base.tokenizer
    tokenizer.chat_template = training_template(tokenizer)
    assert has_generation_markers(tokenizer.chat_template)
    return candidate_of(gemma3, tmp_path_factory.mktemp("run"), **STAMP)


def permitted(candidate: Candidate) -> GuardPassed:
    return GuardPassed(sha256_of_file(candidate.path), None)


@pytest.mark.llama_cpp
def test_the_candidate_lies_hidden_and_nothing_at_the_final_path(written: Candidate):
    assert written.path.is_file()
    assert written.path.parent.name == ".candidate"
    assert written.final_path.parent == written.path.parent.parent
    assert not written.final_path.exists()
    assert not (written.path.parent / "staging").exists()


@pytest.mark.llama_cpp
def test_the_file_says_what_made_it_and_of_which_type_it_is(written: Candidate):
    opened = read_gguf(written.path)
    assert {key: opened.metadata[f"qatlora.{key}"] for key in STAMP} == STAMP
    assert opened.metadata["general.file_type"] == MOSTLY_Q4_0
    types = [tensor.type_name for tensor in opened.tensors.values()]
    assert types.count("Q4_0") == NUM_LINEARS
    assert types.count("Q8_0") == 1
    assert set(types) == {"Q4_0", "Q8_0", "F32"}
    assert opened.tensors["token_embd.weight"].type_name == "Q8_0"


@pytest.mark.llama_cpp
def test_the_template_in_the_file_has_no_marks_that_only_training_knows(
    written: Candidate, gemma3: AdaptedModel
):
    template = read_gguf(written.path).metadata["tokenizer.chat_template"]
    assert not has_generation_markers(template)
    tokenizer = gemma3.base.tokenizer
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    expected = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False) == expected


@pytest.mark.llama_cpp
def test_publishing_leaves_exactly_the_final_file(written: Candidate, tmp_path: Path):
    mine = copied(written, tmp_path)
    sha256, size = sha256_of_file(mine.path), mine.path.stat().st_size
    result = publish(mine, permitted(mine))
    assert list(tmp_path.iterdir()) == [mine.final_path]
    assert (result.path, result.sha256) == (str(mine.final_path), sha256)
    assert result.bytes == size == mine.final_path.stat().st_size
    assert sha256_of_file(mine.final_path) == sha256
    assert result.tensor_types["Q4_0"] == NUM_LINEARS


@pytest.mark.llama_cpp
def test_publishing_replaces_the_file_of_an_earlier_run(written: Candidate, tmp_path: Path):
    mine = copied(written, tmp_path)
    mine.final_path.write_bytes(b"old")
    publish(mine, permitted(mine))
    assert read_gguf(mine.final_path).metadata["qatlora.recipe"] == "a test"


@pytest.mark.llama_cpp
def test_a_file_that_changed_after_the_guard_is_not_published(written: Candidate, tmp_path: Path):
    mine = copied(written, tmp_path)
    passed = permitted(mine)
    content = bytearray(mine.path.read_bytes())
    content[-1] ^= 1
    mine.path.write_bytes(content)
    with pytest.raises(ExportError) as refused:
        publish(mine, passed)
    message = str(refused.value)
    assert passed.candidate_sha256 in message
    assert sha256_of_file(mine.path) in message
    assert "changed in between. Run recipe=export_gguf again." in message
    assert not mine.final_path.exists()


def test_a_crash_while_writing_leaves_nothing_at_the_final_path(
    gemma3: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def dies(staging: Path, output: Path, *_: object) -> ConvertResult:
        output.write_bytes(b"half a file")
        raise ExportError("llama.cpp's converter failed")

    monkeypatch.setattr(candidate_module, "convert", dies)
    with pytest.raises(ExportError, match="converter failed"):
        candidate_of(gemma3, tmp_path)
    assert not list(tmp_path.glob("*.gguf"))
    assert [path.name for path in tmp_path.iterdir()] in ([], [".candidate"])


def test_a_tensor_that_the_converter_dropped_is_an_error(
    gemma3: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def forgets(staging: Path, output: Path, *_: object) -> ConvertResult:
        names = sorted(load_file(staging / "deployed.safetensors"))
        return ConvertResult({name: TensorPlace(name, None) for name in names[1:]}, output)

    monkeypatch.setattr(candidate_module, "convert", forgets)
    with pytest.raises(ExportError, match=f"wrote 13 of {NUM_LINEARS} Q4_0 tensors.*is missing"):
        candidate_of(gemma3, tmp_path)
    assert not list(tmp_path.glob("*.gguf"))


class Staged(Exception):
    """Carries what lay in the staging folder."""


def staged(
    folder: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[set[str], set[str]]:
    """Names of the other tensors and of the files handed to the converter."""

    def looks(staging: Path, *_: object) -> ConvertResult:
        tensors = [set(load_file(path)) for path in staging.glob("model*.safetensors")]
        raise Staged(set().union(*tensors), {path.name for path in staging.iterdir()})

    monkeypatch.setattr(candidate_module, "convert", looks)
    with pytest.raises(Staged) as found:
        candidate_of(adapted_model(folder), run_dir)
    return found.value.args


def test_no_decoder_linear_is_staged_beside_its_blocks(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tensors, names = staged(tiny_llama_folder, tmp_path, monkeypatch)
    assert not any("_proj" in name for name in tensors)
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= tensors
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= names


@pytest.mark.parametrize("silent", [False, True], ids=["says so", "by its class"])
def test_a_stray_lm_head_of_a_tied_checkpoint_is_not_staged(
    silent: bool, tiny_gemma3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = edited_folder(tiny_gemma3_folder, tmp_path / "base", tie_word_embeddings=True)
    if silent:  # as the published config.json of Gemma 3, whose class ties by default
        path = folder / "config.json"
        path.write_text(path.read_text().replace('"tie_word_embeddings": true,', ""))
        path.write_text(path.read_text().replace(', "tie_word_embeddings": true', ""))
        assert "tie_word_embeddings" not in path.read_text()
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(folder, {"lm_head.weight": embedding.clone()})
    tensors, _ = staged(folder, tmp_path / "run", monkeypatch)
    assert "lm_head.weight" not in tensors
    assert "model.embed_tokens.weight" in tensors


def test_the_shards_of_a_checkpoint_are_staged_as_shards(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = edited_folder(tiny_llama_folder, tmp_path / "base")
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = [sorted(whole)[:10], sorted(whole)[10:]]
    index = {"metadata": {}, "weight_map": {}}
    for number, names in enumerate(halves, start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({n: whole[n] for n in names}, folder / shard, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors, names = staged(folder, tmp_path / "run", monkeypatch)
    assert tensors == {name for name in whole if "_proj" not in name}
    assert not any("index" in name for name in names)


def test_a_quantization_config_does_not_reach_the_converter(
    gemma3: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = {}

    def looks(staging: Path, *_: object) -> ConvertResult:
        seen["config"] = (staging / "config.json").read_text()
        raise Staged

    monkeypatch.setattr(candidate_module, "convert", looks)
    gemma3.base.source.config["quantization_config"] = {"quant_method": "bitsandbytes"}
    with pytest.raises(Staged):
        candidate_of(gemma3, tmp_path)
    del gemma3.base.source.config["quantization_config"]
    assert "quantization_config" not in seen["config"]
