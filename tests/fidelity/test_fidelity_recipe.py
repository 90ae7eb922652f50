"""recipe=fidelity as a whole, on tiny checkpoints, against full logits in float64."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import torch
from fidelity_cases import compare
from loaded_cases import adapted_model, on_grid_folder
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from qatlora.adapters.saved import save_adapter
from qatlora.base.load import load_tokenizer
from qatlora.config import DataConfig, DataKind, Precision
from qatlora.data.measured import measured_texts
from qatlora.errors import DataError
from qatlora.report.json_report import load_schema
from qatlora.report.results import RunReport


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def other_folder(tiny_gemma3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with other weights."""
    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(tiny_gemma3_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    model.save_pretrained(folder)
    load_tokenizer(tiny_gemma3_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def report(
    tiny_gemma3_folder: Path, other_folder: Path, files: dict[str, Path], run_dir: Path
) -> RunReport:
    save_adapter(adapted_model(tiny_gemma3_folder, "q4_0"), run_dir / "trained" / "adapter")
    models = ["bf16", str(other_folder), "q4_0_reference", str(run_dir / "trained")]
    return compare(tiny_gemma3_folder, files, run_dir, models=models)


def test_the_kld_is_that_of_full_logits(tiny_gemma3_folder, other_folder, files, report):
    settings = DataConfig(kind=DataKind.jsonl, path=str(files["chats"]))
    names = [str(files["text"]), "chats"]
    texts, _ = measured_texts(names, settings, load_tokenizer(tiny_gemma3_folder), 64, 400)
    both = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (tiny_gemma3_folder, other_folder)
    ]
    for text in texts:
        klds, nlls = [], []
        for row in text.rows:
            scored = [i for i in range(1, len(row.labels)) if row.labels[i] != -100]
            with torch.no_grad():
                p, q = (
                    log_softmax(model(torch.tensor([row.input_ids])).logits[0].double(), -1)
                    for model in both
                )
            before = torch.tensor(scored) - 1
            klds.append((p.exp() * (p - q)).sum(-1)[before])
            nlls.append(-q[before, torch.tensor(row.input_ids)[scored]])
        kld, nll = torch.cat(klds), torch.cat(nlls)
        figures = model_named(report, other_folder.name).texts[text.name]
        assert figures.tokens == len(kld)
        assert figures.kld.mean == pytest.approx(kld.mean().item(), rel=1e-4)
        assert figures.kld.max == pytest.approx(kld.max().item(), rel=1e-4)
        assert figures.kld.min == pytest.approx(kld.min().item(), rel=1e-3)
        assert figures.perplexity == pytest.approx(nll.mean().exp().item(), rel=1e-5)


def test_a_reference_equals_itself_to_the_last_bit(report):
    (reference,) = report.fidelity.references
    assert reference.self_kld_max == 0
    for text in model_named(report, "bf16").texts.values():
        assert (text.kld.min, text.kld.max, text.kld.rms_dp) == (0, 0, 0)
        assert (text.kld.same_top, text.ratio, text.ratio_stderr) == (1, 1, 0)
        assert text.perplexity == text.reference_perplexity


def test_an_adapter_run_stands_behind_its_base(report, run_dir):
    before, after = model_named(report, "trained, before"), model_named(report, "trained")
    assert (before.before, after.before) == (None, "trained, before")
    assert all(before.texts[name] != text for name, text in after.texts.items())
    page = (run_dir / "report.html").read_text("utf-8")
    assert "<h2>Before and after training</h2>" in page


def test_the_report_is_valid_json(report, run_dir):
    document = json.loads((run_dir / "report.json").read_text())
    jsonschema.validate(document, load_schema())
    assert [model["name"] for model in document["fidelity"]["models"]] == [
        model.name for model in report.fidelity.models
    ]


def test_the_page_needs_nothing_from_outside(report, run_dir):
    page = (run_dir / "report.html").read_text("utf-8")
    sources = re.findall(r"""(?:src|href)=["']?([^"'> ]{,22})""", page)
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?:|@import|<script|<link", page)


def test_a_checkpoint_on_its_grid_loses_nothing_in_q4_0(tiny_gemma3_folder, files, tmp_path):
    on_grid_folder(tiny_gemma3_folder, tmp_path / "base")
    report = compare(
        tmp_path / "base", files, tmp_path / "run", models=["q4_0", "nf4"], precision=Precision.bf16
    )
    ours, nf4 = model_named(report, "q4_0"), model_named(report, "nf4")
    assert {text.kld.max for text in ours.texts.values()} == {0.0}
    assert all(text.kld.min > 0 for text in nf4.texts.values())


def test_two_references_are_run_one_after_the_other(
    tiny_gemma3_folder, other_folder, files, tmp_path
):
    models = [f"{other_folder}@q4_0_reference", "q4_0_reference"]
    fidelity = compare(tiny_gemma3_folder, files, tmp_path, models=models).fidelity
    assert [each.name for each in fidelity.references] == [f"{other_folder.name}@bf16", "bf16"]
    assert [model.reference for model in fidelity.models] == [
        f"{other_folder.name}@bf16",
        "bf16",
    ]


def test_a_text_that_is_not_there_is_refused_before_any_model_is_loaded(
    tiny_gemma3_folder, files, tmp_path
):
    with pytest.raises(DataError, match="must be one of wiki"):
        compare(tiny_gemma3_folder, files, tmp_path, texts=["wikki"])


def model_named(report: RunReport, name: str):
    (found,) = [model for model in report.fidelity.models if model.name == name]
    return found
