"""The two embedded bases, converted with Q4_0 blocks and run by llama.cpp itself."""

import shutil
import time
from pathlib import Path

import gguf
import pytest
from staging_cases import make_staging
from transformers import AutoTokenizer

from qatlora.base import unpack
from qatlora.llamacpp import tools
from qatlora.llamacpp.convert import convert
from qatlora.llamacpp.gguf_read import read_gguf

GEMMA3_TEMPLATE = Path(__file__).parents[2] / "qatlora" / "data" / "templates" / "gemma3.jinja"
PAGE = (
    "Hi 😀👩‍👩‍👧‍👦🇩🇪  \t\t\tif x:\n\n\n    return {'x': [1, 2.5e-3]}\r\n<start_of_turn>user\n"
    "<unused12> <bos><eos> <table></table> <|im_start|>x<|im_end|><end_of_turn> 漢字かな交じり文 "
    "한국어 العربية \u200b\ufeff ﬁ Å Å naïve 1234567 "
    + " " * 70
    + "end"
    + "\n" * 45
    + "\t" * 40
    + "\x07🦙"
)


@pytest.mark.slow
def test_the_header_of_gemma_is_read_fast_and_as_the_reference_reader_does(tmp_path: Path):
    with unpack.assembled(unpack.EMBEDDED_BASES["gemma3_270m"]) as path:
        start = time.perf_counter()
        ours = read_gguf(path)
        assert time.perf_counter() - start < 5  # the reference reader needs 24 s
        reference = gguf.GGUFReader(path)
        for tensor in reference.tensors:
            assert ours.tensors[tensor.name].data.tobytes() == tensor.data.tobytes()
        tokens = reference.fields["tokenizer.ggml.tokens"].contents()
        scores = reference.fields["tokenizer.ggml.scores"].contents()
        assert ours.metadata["tokenizer.ggml.tokens"] == tokens
        assert ours.metadata["tokenizer.ggml.scores"] == scores


def converted(name: str, folder: Path) -> tuple[Path, Path]:
    base = unpack.embedded_base(name)
    make_staging(base, folder / "staging")
    if name == "gemma3_270m":  # a base model: its GGUF has no template
        shutil.copy(GEMMA3_TEMPLATE, folder / "staging" / "chat_template.jinja")
    convert(folder / "staging", folder / "model.gguf", "q8_0", {"qatlora.test": name})
    return base, folder / "model.gguf"


@pytest.mark.slow
@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", ["gemma3_270m", "smollm2_135m"])
def test_llama_cpp_runs_the_file_and_tokenizes_as_transformers_does(name: str, tmp_path: Path):
    base, path = converted(name, tmp_path)
    assert tools.tokenize(path, PAGE) == AutoTokenizer.from_pretrained(base)(PAGE)["input_ids"]
    metadata = read_gguf(path).metadata
    with unpack.assembled(unpack.EMBEDDED_BASES[name]) as original:
        before = read_gguf(original).metadata
    for key in ("tokens", "scores", "token_type", "merges", "pre", "model"):
        assert metadata.get(f"tokenizer.ggml.{key}") == before.get(f"tokenizer.ggml.{key}"), key
    answer = tools.generate(path, "Answer in one word: what colour is the sky?", 16)
    assert answer.strip()
    assert "<end_of_turn>" not in answer
    assert tools.complete(path, "The capital of France is", 8).strip()
