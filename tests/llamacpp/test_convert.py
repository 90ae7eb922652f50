from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from staging_cases import decoded, edit_json, make_staging
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qatlora.base.from_gguf import model_from_gguf, packed_model_from_gguf
from qatlora.base.linear import GridLinear
from qatlora.base.unpack import unpack_gguf
from qatlora.errors import ExportError
from qatlora.llamacpp import tools
from qatlora.llamacpp.convert import ConvertResult, convert
from qatlora.llamacpp.gguf_read import GgufFile, dequantize, read_gguf
from qatlora.llamacpp.source import check_converter

TEXT = "The fox runs home.  <mask> Why? 12345 naïve 🦊 狐\n\n"


class Conversion(NamedTuple):
    source: Path
    path: Path
    packed: dict[str, Tensor]
    result: ConvertResult
    gguf: GgufFile


def run_conversion(source: Path, folder: Path, other_type: str, deploy: bool = True) -> Conversion:
    packed = make_staging(source, folder / "staging", deploy)
    path = folder / "model.gguf"
    result = convert(folder / "staging", path, other_type, {"qatlora.stamp": "made by a test"})
    return Conversion(source, path, packed, result, read_gguf(path))


@pytest.fixture(scope="module")
def gemma3(tiny_gemma3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return run_conversion(tiny_gemma3_folder, tmp_path_factory.mktemp("gemma3"), "q8_0")


@pytest.fixture(scope="module")
def llama(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return run_conversion(tiny_llama_folder, tmp_path_factory.mktemp("llama"), "f32")


@pytest.fixture(params=["gemma3", "llama"])
def conversion(request: pytest.FixtureRequest) -> Conversion:
    return request.getfixturevalue(request.param)


@pytest.mark.llama_cpp
def test_the_converter_is_found_before_it_is_needed():
    check_converter()


@pytest.mark.llama_cpp
def test_every_deployed_tensor_lies_in_the_file_byte_for_byte(conversion: Conversion):
    assert conversion.packed
    assert set(conversion.result.tensor_map) == set(conversion.packed)
    for name, blocks in conversion.packed.items():
        place = conversion.result.tensor_map[name]
        written = conversion.gguf.tensors[place.gguf_name]
        assert written.type_name == "Q4_0"
        expected = blocks if place.row_order is None else blocks[place.row_order]
        assert written.data.tobytes() == expected.numpy().tobytes()


@pytest.mark.llama_cpp
def test_only_the_rows_of_llamas_q_and_k_change_places(gemma3: Conversion, llama: Conversion):
    moved = [name for name, place in llama.result.tensor_map.items() if place.row_order]
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "k_proj"}
    assert len(moved) == 4
    for name in moved:
        order = llama.result.tensor_map[name].row_order
        assert sorted(order) == list(range(len(order)))
    assert all(place.row_order is None for place in gemma3.result.tensor_map.values())


@pytest.mark.llama_cpp
def test_the_other_tensors_have_the_chosen_type_and_norms_stay_f32(
    gemma3: Conversion, llama: Conversion
):
    assert {t.type_name for t in gemma3.gguf.tensors.values()} == {"Q4_0", "Q8_0", "F32"}
    assert gemma3.gguf.tensors["token_embd.weight"].type_name == "Q8_0"
    assert gemma3.gguf.tensors["output_norm.weight"].type_name == "F32"
    assert "output.weight" not in gemma3.gguf.tensors
    assert llama.gguf.tensors["output.weight"].type_name == "F32"


@pytest.mark.llama_cpp
def test_the_file_says_what_it_is_and_what_made_it(conversion: Conversion):
    metadata = conversion.gguf.metadata
    assert metadata["general.file_type"] == 2  # MOSTLY_Q4_0
    assert metadata["qatlora.stamp"] == "made by a test"
    assert metadata["general.name"] == "model"
    assert "tokenizer.chat_template" in metadata
    assert conversion.result.log.read_text()


@pytest.mark.llama_cpp
def test_the_reloaded_model_computes_what_the_decoded_checkpoint_computes(conversion: Conversion):
    expected = AutoModelForCausalLM.from_pretrained(conversion.source, dtype=torch.float32)
    state = expected.state_dict()
    for name, blocks in conversion.packed.items():
        state[name].copy_(decoded(blocks))
    if conversion.gguf.tensors["token_embd.weight"].type_name == "Q8_0":
        embedding = torch.from_numpy(dequantize(conversion.gguf.tensors["token_embd.weight"]))
        state["model.embed_tokens.weight"].copy_(embedding)
    config = AutoConfig.from_pretrained(conversion.source)
    reloaded = model_from_gguf(conversion.path, config, torch.float32)
    for name, weight in reloaded.state_dict().items():
        assert torch.equal(weight, state[name]), name
    ids = torch.arange(40).reshape(1, 40)
    assert torch.equal(reloaded(ids).logits, expected.eval()(ids).logits)
    packed = packed_model_from_gguf(conversion.path, config, torch.float32)
    assert torch.equal(packed(ids).logits, reloaded(ids).logits)
    stored = [module for module in packed.modules() if isinstance(module, GridLinear)]
    assert len(stored) == len(conversion.packed)


def assert_unpacks_to(made: Conversion, folder: Path, deployed: dict[str, Tensor]) -> None:
    """The file unpacks to its source checkpoint, deployed tensors decoded, in bf16."""
    again = load_file(unpack_gguf(made.path, folder, None) / "model.safetensors")
    original = load_file(made.source / "model.safetensors")
    assert set(again) == set(original)
    for name, weight in original.items():
        if name in deployed:
            weight = decoded(deployed[name]).to(torch.bfloat16)
        # llama.cpp stores 1 + w for Gemma's norms in fp32: of a tiny w the last bits go. The
        # embedding of the Gemma file is Q8_0, that of the Llama file F32.
        shifted = "output.weight" not in made.gguf.tensors and name.endswith("norm.weight")
        tolerance = 2**-24 if shifted else 0.0
        if made.gguf.tensors["token_embd.weight"].type_name == "Q8_0" and "embed" in name:
            tolerance = float(weight.abs().max()) / 127
        assert torch.allclose(again[name], weight, rtol=0, atol=tolerance), name
    before, after = (AutoTokenizer.from_pretrained(path) for path in (made.source, folder))
    assert after(TEXT)["input_ids"] == before(TEXT)["input_ids"]
    assert after.chat_template == before.chat_template


@pytest.mark.llama_cpp
def test_unpacking_a_converted_checkpoint_gives_its_values_back(
    conversion: Conversion, tmp_path: Path
):
    assert_unpacks_to(conversion, tmp_path / "unpacked", conversion.packed)


@pytest.mark.slow
@pytest.mark.llama_cpp
@pytest.mark.parametrize(("name", "other_type"), [("gemma3", "bf16"), ("llama", "f32")])
def test_a_checkpoint_without_deployed_tensors_converts_as_usual(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, other_type: str
):
    source = request.getfixturevalue(f"tiny_{name}_folder")
    made = run_conversion(source, tmp_path / "made", other_type, deploy=False)
    assert made.result.tensor_map == {}
    assert made.gguf.metadata["general.file_type"] == {"bf16": 32, "f32": 0}[other_type]
    assert_unpacks_to(made, tmp_path / "unpacked", {})


@pytest.mark.llama_cpp
def test_llama_cpp_tokenizes_the_file_as_transformers_does(conversion: Conversion):
    tokenizer = AutoTokenizer.from_pretrained(conversion.source)
    assert tools.tokenize(conversion.path, TEXT) == tokenizer(TEXT)["input_ids"]


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_a_tensor_that_the_converter_does_not_know_is_named(
    tiny_llama_folder: Path, tmp_path: Path
):
    packed = make_staging(tiny_llama_folder, tmp_path / "staging")
    name, blocks = next(iter(packed.items()))
    save_file(
        {name.replace("layers", "storeys"): blocks}, tmp_path / "staging/deployed.safetensors"
    )
    with pytest.raises(ExportError, match="Can not map tensor"):
        convert(tmp_path / "staging", tmp_path / "out.gguf", "q8_0", {})
    assert "storeys" in (tmp_path / "out.gguf.log").read_text()


def test_gemma_without_its_sentencepiece_model_is_refused(tiny_gemma3_folder: Path, tmp_path: Path):
    make_staging(tiny_gemma3_folder, tmp_path / "staging")
    (tmp_path / "staging" / "tokenizer.model").unlink()
    with pytest.raises(ExportError, match=r"no tokenizer\.model"):
        convert(tmp_path / "staging", tmp_path / "out.gguf", "q8_0", {})


def test_a_quantization_config_is_refused(tiny_llama_folder: Path, tmp_path: Path):
    make_staging(tiny_llama_folder, tmp_path / "staging")
    edit_json(tmp_path / "staging" / "config.json", quantization_config={"quant_method": "x"})
    with pytest.raises(ExportError, match="quantization_config"):
        convert(tmp_path / "staging", tmp_path / "out.gguf", "q8_0", {})


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_stray_lm_head_of_a_tied_model_is_refused(
    name: str, tiny_gemma3_folder: Path, tmp_path: Path
):
    make_staging(tiny_gemma3_folder, tmp_path / "staging")
    weights = load_file(tmp_path / "staging" / "model.safetensors")
    weights[name] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "staging" / "model.safetensors")
    with pytest.raises(ExportError, match=f"has a {name} although"):
        convert(tmp_path / "staging", tmp_path / "out.gguf", "q8_0", {})


def test_an_unknown_type_and_a_missing_config_are_refused(tiny_llama_folder: Path, tmp_path: Path):
    make_staging(tiny_llama_folder, tmp_path / "staging")
    with pytest.raises(ExportError, match="'q2_k' cannot be written"):
        convert(tmp_path / "staging", tmp_path / "out.gguf", "q2_k", {})
    (tmp_path / "staging" / "config.json").unlink()
    with pytest.raises(ExportError, match=r"config\.json is missing"):
        convert(tmp_path / "staging", tmp_path / "out.gguf", "q8_0", {})
