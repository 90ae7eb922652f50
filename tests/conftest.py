"""Shared by all tests: torch's threads, skips with their reasons, two tiny checkpoints."""

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from pipeline_cases import write_data
from sample_text import sentences
from tiny_layouts import MULTIMODAL, SPREAD
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from qatlora.errors import ToolError

TEMPLATES = Path(__file__).parents[1] / "qatlora" / "data" / "templates"
_GEMMA3_CONTROLS = ["<mask>", "<start_of_turn>", "<end_of_turn>"]
_GEMMA4_CONTROLS = [
    "<mask>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>",
    "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
]  # fmt: skip

NO_LLAMA_CPP = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("llama_cpp") and (reason := _why_no_llama_cpp(item.config)):
        pytest.skip(reason)


def _why_no_llama_cpp(config: pytest.Config) -> str:
    """Empty when llama.cpp's source and tools are at hand, fetched and built if need be."""
    if NO_LLAMA_CPP not in config.stash:
        config.stash[NO_LLAMA_CPP] = _fetch_llama_cpp()
    return config.stash[NO_LLAMA_CPP]


def _fetch_llama_cpp() -> str:
    from qatlora.llamacpp import source, tools

    try:
        source.llama_cpp_source()
        if tools.find_tool("llama-quantize") is None:
            tools.install()
    except ToolError as error:
        return str(error)
    return ""


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Conversations and general text (see `write_data`); read-only: the whole session's."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_gemma3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3 of two layers, bf16, as an HF folder with a sentencepiece tokenizer.

    Read-only: it is shared by the whole session. Widths are multiples of 32, embeddings are
    tied, one layer slides and one is full, and head_dim is not hidden_size / heads, as in the real
    ones.
    """
    folder = tmp_path_factory.mktemp("tiny_gemma3")
    _write_sentencepiece_tokenizer(folder, _GEMMA3_CONTROLS)
    torch.manual_seed(3)
    config = Gemma3TextConfig(
        vocab_size=_vocabulary_size(folder),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=512,
        initializer_range=SPREAD,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    shutil.copy(TEMPLATES / "gemma3.jinja", folder / "chat_template.jinja")
    return folder


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, bf16, as an HF folder with a byte-level BPE tokenizer.

    Read-only: it is shared by the whole session. Widths are multiples of 32, two heads share each
    key/value head, and lm_head is a tensor of its own.
    """
    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = _byte_level_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=SPREAD,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    shutil.copy(TEMPLATES / "chatml.jinja", folder / "chat_template.jinja")
    return folder


@pytest.fixture(scope="session", params=MULTIMODAL)
def tiny_multimodal_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A random checkpoint of each layout in `tiny_layouts.MULTIMODAL`, bf16; read-only.

    Gemma 4 has tokenizer.json and no tokenizer.model, as published.
    """
    folder = tmp_path_factory.mktemp(request.param)
    family = "gemma3" if request.param.startswith("gemma3") else "gemma4"
    _write_sentencepiece_tokenizer(
        folder, _GEMMA3_CONTROLS if family == "gemma3" else _GEMMA4_CONTROLS
    )
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(MULTIMODAL[request.param](_vocabulary_size(folder)))
    for name, scale in [*model.named_buffers(), *model.named_parameters()]:
        if name.endswith(("layer_scalar", "router.scale", "router.per_expert_scale")):
            scale.data.uniform_(0.5, 1.5)  # new ones are all 1, which a loss of them would not show
        elif name.endswith("router.proj.weight"):
            scale.data.mul_(20)  # else all experts are about as likely, and any rounding decides
    model.to(torch.bfloat16).save_pretrained(folder)
    if family == "gemma4":
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        (folder / "tokenizer.model").unlink()
    shutil.copy(TEMPLATES / f"{family}.jinja", folder / "chat_template.jinja")
    return folder


def _write_sentencepiece_tokenizer(folder: Path, controls: list[str]) -> None:
    """tokenizer.model and tokenizer_config.json laid out as Gemma's, 384 pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(300)),
        model_writer=model,
        model_type="bpe",
        vocab_size=384,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=controls,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _vocabulary_size(folder: Path) -> int:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return processor.vocab_size()


def _byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens of SmolLM2, 384 tokens."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=specials,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sentences(300), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
