"""The real program beside our own arithmetic: every line that it prints."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sample_text import sentences
from staging_cases import make_staging
from torch import nn
from transformers import AutoModelForCausalLM

from qatlora.data.rows import Row
from qatlora.data.windows import half_scored_windows
from qatlora.errors import ToolError
from qatlora.evaluate.logits import scored_logits
from qatlora.llamacpp import tools
from qatlora.llamacpp.convert import convert
from qatlora.llamacpp.kld_base import KldBase, read_base, write_base
from qatlora.llamacpp.kld_statistics import score_against, statistics_of
from qatlora.llamacpp.perplexity import kl_divergence, printed_statistics

WINDOW = 101
IN_FLOAT = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")
"""The cache in float32: else llama.cpp rounds it to 16 bits and its logits are others."""


@pytest.fixture(scope="module")
def gguf(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    make_staging(tiny_llama_folder, folder / "staging", deploy=False)
    convert(folder / "staging", folder / "model.gguf", "f32", {})
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def model(tiny_llama_folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def rows(model: nn.Module) -> list[Row]:
    draw = np.random.default_rng(5).integers(3, model.config.vocab_size, 400).tolist()
    return half_scored_windows([Row(draw, draw, "general")], None, WINDOW, 3)


def base_of(model: nn.Module, rows: list[Row], path: Path) -> KldBase:
    tokens = np.array([row.input_ids for row in rows], dtype=np.int32)
    return write_base(path, tokens, model.config.vocab_size, scored_logits(model, rows))


@pytest.fixture
def other_base(tiny_llama_folder: Path, rows: list[Row], tmp_path: Path) -> KldBase:
    """Of a model with other weights."""
    weights = load_file(tiny_llama_folder / "model.safetensors")
    torch.manual_seed(6)
    other = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    noisy = {name: w + 0.1 * w.abs().mean() * torch.randn_like(w) for name, w in weights.items()}
    other.load_state_dict({name: w.float() for name, w in noisy.items()})
    return base_of(other, rows, tmp_path / "other.kld")


@pytest.mark.llama_cpp
def test_every_line_that_the_program_prints_is_ours(
    gguf: Path, model: nn.Module, rows: list[Row], other_base: KldBase
):
    printed = kl_divergence(gguf, read_base(other_base.path), IN_FLOAT)
    ours = statistics_of(score_against(other_base, scored_logits(model, rows)))
    assert list(printed) == list(ours)
    assert len(printed) == 34
    assert 0.001 < printed["Mean KLD"].value < 1
    for label, line in printed.items():
        # Percentages have two or three digits; the others six, of float32 sums.
        digits = 5e-3 if label.startswith("Cor") else 6e-4 if "p" in label.split()[-1] else 1.1e-6
        relative = 1e-5 if "PPL" in label else 0
        assert ours[label].value == pytest.approx(line.value, abs=digits, rel=relative), label
        assert (ours[label].error is None) == (line.error is None), label
        if line.error is not None:
            assert ours[label].error == pytest.approx(line.error, abs=digits, rel=1e-4), label


@pytest.mark.llama_cpp
def test_the_same_weights_are_nearly_no_divergence_apart(
    gguf: Path, model: nn.Module, rows: list[Row], tmp_path: Path
):
    printed = kl_divergence(gguf, base_of(model, rows, tmp_path / "own.kld"))
    assert abs(printed["Mean KLD"].value) < 1e-5
    assert printed["Same top p"].value == 100


@pytest.mark.llama_cpp
def test_a_file_that_the_program_wrote_is_ours_but_for_a_code_here_and_there(
    gguf: Path, model: nn.Module, tmp_path: Path
):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(sentences(60)))
    written = tmp_path / "theirs.kld"
    arguments = ["-m", str(gguf), "-f", str(text), "--kl-divergence-base", str(written)]
    tools.run_tool("llama-perplexity", [*arguments, "-c", "64", "-b", "64", *IN_FLOAT], 300)
    theirs = read_base(written)
    assert len(theirs.tokens) > 2
    joined = theirs.tokens.reshape(-1).tolist()
    rows = half_scored_windows([Row(joined, joined, "general")], None, 64, len(theirs.tokens))
    ours = base_of(model, rows, tmp_path / "ours.kld")
    assert ours.path.stat().st_size == written.stat().st_size
    for mine, its in zip(ours.log_probs(), theirs.log_probs(), strict=True):
        assert np.abs(mine - its).max() < 16 / 65535


@pytest.mark.llama_cpp
def test_another_vocabulary_and_too_few_tokens_are_refused(
    gguf: Path, model: nn.Module, rows: list[Row], tmp_path: Path
):
    tokens = np.array([row.input_ids for row in rows], dtype=np.int32)
    wide = (np.pad(part, ((0, 0), (0, 1))) for part in scored_logits(model, rows))
    other = write_base(tmp_path / "wide.kld", tokens, model.config.vocab_size + 1, wide)
    with pytest.raises(ToolError, match="384 words and .* 385"):
        kl_divergence(gguf, other)
    with pytest.raises(ToolError, match="has 50 scored tokens"):
        kl_divergence(gguf, base_of(model, rows[:1], tmp_path / "short.kld"))


def test_lines_are_read_with_their_labels_errors_and_signs():
    output = """
0.12 I Mean PPL(Q): no line of the statistics
Cor(ln(PPL(Q)), ln(PPL(base))):  98.50%
Mean ln(PPL(Q)/PPL(base))     :  -0.010000 ±   0.002000
 5.0%   KLD:   0.000100
Minimum Δp: -12.345%
Same top p: 97.000 ± 1.250 %
"""
    found = {label: (line.value, line.error) for label, line in printed_statistics(output).items()}
    assert found == {
        "Cor(ln(PPL(Q)), ln(PPL(base)))": (98.5, None),
        "Mean ln(PPL(Q)/PPL(base))": (-0.01, 0.002),
        "5.0% KLD": (0.0001, None),
        "Minimum Δp": (-12.345, None),
        "Same top p": (97.0, 1.25),
    }
