"""GGUF files here and in the real program: the same tokens, the same reference, the same lines."""

from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from fidelity_cases import compare, settings
from loaded_cases import adapted_model, candidate_of
from transformers import LlamaConfig

from qatlora import pipeline
from qatlora.data.rows import IGNORED, Row, Text
from qatlora.errors import FidelityError, ToolError
from qatlora.fidelity.in_llama_cpp import HalfScored, half_scored, require_judgeable
from qatlora.fidelity.plan import GgufModel
from qatlora.llamacpp.kld_statistics import MIN_TOKENS
from qatlora.llamacpp.tools import TOOLS_VARIABLE, convert_types
from qatlora.report.json_report import load_schema, to_json
from qatlora.report.results import RunReport

WINDOW = 64
OF_RUN = {"llama_cpp": True, "window_tokens": 128}


@pytest.fixture(scope="module")
def gguf(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's Q4_0 decoded to F32, which llama.cpp multiplies without rounding activations."""
    folder = tmp_path_factory.mktemp("gguf")
    candidate = candidate_of(adapted_model(tiny_llama_folder), folder)
    convert_types(candidate.path, folder / "decoded.gguf", "F32")
    return folder / "decoded.gguf"


@pytest.fixture(scope="module")
def report(
    tiny_llama_folder: Path,
    gguf: Path,
    files: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> RunReport:
    run_dir = tmp_path_factory.mktemp("run")
    report = compare(tiny_llama_folder, files, run_dir, models=["q4_0", str(gguf)], **OF_RUN)
    assert not [path for path in run_dir.iterdir() if path.is_dir()]
    assert "here and in llama.cpp" in (run_dir / "report.md").read_text("utf-8")
    assert "<h2>In llama.cpp</h2>" in (run_dir / "report.html").read_text("utf-8")
    return report


@pytest.mark.llama_cpp
def test_both_columns_are_one_model_against_one_reference(
    report: RunReport, files: dict[str, Path]
):
    stored, file = report.fidelity.models
    assert stored.llama_cpp == {}
    (found,) = file.llama_cpp.items()  # conversations are no full windows
    name, text = found
    assert name == files["text"].name
    assert text.tokens == text.windows * 63 >= MIN_TOKENS
    lines = {line.label: line for line in text.lines}
    assert len(lines) == 34
    assert lines["Mean KLD"].ours > 0.01
    for label in ("Mean KLD", "Median KLD", "Maximum KLD", "RMS Δp", "Mean PPL(Q)/PPL(base)"):
        assert lines[label].llama_cpp == pytest.approx(lines[label].ours, rel=5e-3), label
    base = lines["Mean PPL(base)"]
    assert base.llama_cpp == pytest.approx(base.ours, rel=1e-4)
    assert base.llama_cpp_error == pytest.approx(base.ours_error, rel=1e-3)


@pytest.mark.llama_cpp
def test_the_report_of_both_columns_is_valid(report: RunReport):
    jsonschema.validate(to_json(report), load_schema())


def test_the_second_halves_of_full_windows_are_found_among_the_scores():
    def row(length: int, unscored: int) -> Row:
        ids = list(range(length))
        return Row(ids, [IGNORED] * unscored + ids[unscored:], "general")

    rows = [row(WINDOW, 1), row(WINDOW, 40), row(40, 1), *[row(WINDOW, 1)] * 9]
    part = half_scored(Text("wiki", rows), WINDOW, 200)
    scored = [
        (number, position)
        for number, each in enumerate(rows)
        for position in range(1, len(each.labels))
        if each.labels[position] != IGNORED
    ]
    half = [(number, position) for number in (0, 3, 4, 5, 6, 7) for position in range(33, 64)]
    assert [scored[place] for place in part.places.tolist()] == half
    assert part.tokens.tolist() == [list(range(WINDOW))] * 6
    assert half_scored(Text("wiki", rows[:5]), WINDOW, 200) is None  # 93 tokens


def test_what_cannot_be_judged_is_refused_before_any_model_is_loaded(
    tiny_llama_folder: Path,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "llama-perplexity").touch()
    monkeypatch.setenv(TOOLS_VARIABLE, str(tmp_path))
    cfg = settings(tiny_llama_folder, files, tmp_path / "run", models=["q4_0"], **OF_RUN)
    with pytest.raises(FidelityError, match=r"no GGUF file among .*Add FILE\.gguf"):
        pipeline.run(cfg)
    monkeypatch.setenv(TOOLS_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ToolError, match="llama-perplexity is not there"):
        pipeline.run(cfg)


def test_a_file_that_begins_its_windows_with_another_token_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "llama-perplexity").touch()
    monkeypatch.setenv(TOOLS_VARIABLE, str(tmp_path))
    part = HalfScored("wiki", np.zeros((4, WINDOW), np.int32), torch.arange(124))
    for bos in (2, None):
        require_judgeable([GgufModel(tmp_path, LlamaConfig(), bos)], [part], 2)
    with pytest.raises(FidelityError, match="with token 2, and the base's tokenizer .* none"):
        require_judgeable([GgufModel(tmp_path, LlamaConfig(), 2)], [part], None)


@pytest.mark.llama_cpp
def test_texts_without_full_windows_are_refused(
    tiny_llama_folder: Path, gguf: Path, files: dict[str, Path], tmp_path: Path
):
    with pytest.raises(FidelityError, match=r"fills enough windows.*needs 100 tokens\. Add wiki"):
        compare(
            tiny_llama_folder,
            files,
            tmp_path,
            models=[str(gguf)],
            texts=["chats"],
            **OF_RUN,
        )
