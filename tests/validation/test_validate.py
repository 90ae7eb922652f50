"""recipe=validate on tiny models: merges that pass, merges that rounding undoes, files."""

import dataclasses
import json
import shutil
from pathlib import Path

import jsonschema
import pytest
import torch
from loaded_cases import (
    RULE,
    adapted_model,
    candidate_of,
    edit_tensors,
    edited_folder,
    loaded,
    on_grid_folder,
)
from peft import LoraConfig, get_peft_model
from pipeline_cases import settings
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qatlora import pipeline
from qatlora.adapters.attach import attach
from qatlora.base.layout import find_layout
from qatlora.base.source import find_source
from qatlora.config import BaseConfig, ExportConfig, OtherType, RootConfig, ValidateConfig
from qatlora.config.rules import validate as check_rules
from qatlora.data.templates import strip_generation_markers
from qatlora.errors import AdapterError, CheckpointError, ConfigError, GuardFailed
from qatlora.evaluate import Mean
from qatlora.export.candidate import write_candidate
from qatlora.grid import decode, encode_reference
from qatlora.inspection.tensors import inspect_checkpoint
from qatlora.llamacpp.tools import convert_types
from qatlora.report.json_report import load_schema
from qatlora.report.results_validate import BY_GRID, BY_LLAMA_CPP
from qatlora.validation.gates import EffectFigures, effect_gate, kept_effect
from qatlora.validation.types import damage_by_type

STAGES = ["preflight", "load_data", "validate", "report", "decide"]


@pytest.fixture(scope="module")
def base(tiny_gemma3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that lies on its grid."""
    folder = tmp_path_factory.mktemp("base") / "base"
    on_grid_folder(tiny_gemma3_folder, folder)
    return folder


def run(base: Path, files: dict[str, Path], run_dir: Path, **given: object) -> dict:
    """The report, whether the run passed or not."""
    cfg = settings(base, files, run_dir)
    cfg.stages, cfg.card.name = list(STAGES), "validate"
    cfg.validate = ValidateConfig(**{key: str(value) for key, value in given.items()})
    try:
        pipeline.run(cfg)
        failure = None
    except GuardFailed as stopped:
        failure = stopped
    report = json.loads((run_dir / "report.json").read_text())
    jsonschema.validate(report, load_schema())
    assert report["guard"]["passed"] is (failure is None)
    meaning = "the GGUF is not" if "gguf" in given else "a Q4_0 export would not keep"
    assert failure is None or f": {meaning} this model. Gate " in str(failure)
    assert (run_dir / "report.md").is_file()
    return report


def gates(report: dict) -> dict[str, str]:
    return {gate["name"]: gate["status"] for gate in report["guard"]["gates"]}


def moved(base: Path, target: Path, steps: float) -> Path:
    """A copy of the base with its weights moved by noise of so many steps."""
    shutil.copytree(base, target)
    generator = torch.Generator().manual_seed(3)
    changed = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if "_proj.weight" in name:
            step = encode_reference(weight).steps.float().abs().repeat_interleave(32, -1)
            noise = torch.randn(weight.shape, generator=generator)
            changed[name] = (weight.float() + steps * step * noise).to(torch.bfloat16)
    edit_tensors(target, changed)
    return target


def test_a_merge_on_the_grid_passes(base: Path, files: dict[str, Path], tmp_path: Path):
    merged = moved(base, tmp_path / "merged", 1.5)
    weights = load_file(merged / "model.safetensors")
    on_grid = {
        name: decode(encode_reference(weight), torch.bfloat16)
        for name, weight in weights.items()
        if "_proj.weight" in name
    }
    edit_tensors(merged, on_grid)
    template = merged / "chat_template.jinja"  # our exports leave marks for training out
    template.write_text(strip_generation_markers(template.read_text()))
    report = run(base, files, tmp_path / "run", merged=merged)
    assert gates(report) == {"on_grid": "passed", "effect_kept": "passed"}
    kept = report["validate"]["kept"][BY_GRID]
    assert kept["by_kld"] > 0.95
    assert report["validate"]["warnings"] == []
    assert report["validate"]["advice"] is None
    assert report["inspect"]["on_grid_share"] == 1


def test_a_naive_merge_fails_and_names_the_share_kept(
    base: Path, files: dict[str, Path], tmp_path: Path
):
    merged = moved(base, tmp_path / "merged", 0.1)
    report = run(base, files, tmp_path / "run", merged=merged)
    assert gates(report) == {"on_grid": "failed", "effect_kept": "failed"}
    gate = report["guard"]["gates"][1]
    kept = report["validate"]["kept"][BY_LLAMA_CPP]
    assert kept["by_kld"] < 0.5
    assert gate["value"] < gate["limit"] == 0.8
    assert "llama-quantize's Q4_0 keeps" in gate["message"]
    assert "recipe=chat_sft base.path=" in report["validate"]["advice"]
    types = [damage["type"] for damage in report["validate"]["types"]]
    assert types[:3] == [BY_LLAMA_CPP, BY_GRID, "Q8_0"]


def test_a_plain_lora_is_merged_by_peft_and_judged_and_leaves_no_checkpoint(
    base: Path, files: dict[str, Path], tmp_path: Path
):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    torch.manual_seed(1)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.002)
    adapted.save_pretrained(tmp_path / "lora")
    report = run(base, files, tmp_path / "run", adapter=tmp_path / "lora")
    assert gates(report) == {"on_grid": "failed", "effect_kept": "failed"}
    edited = {edit["name"] for edit in report["inspect"]["comparison"]["edits"]}
    assert len(edited) == 4
    assert not [path for path in (tmp_path / "run").iterdir() if path.is_dir()]


def test_what_else_a_merge_changed_is_warned_of(base: Path, files: dict[str, Path], tmp_path: Path):
    merged = moved(base, tmp_path / "merged", 0.1)
    weights = load_file(merged / "model.safetensors")
    edit_tensors(merged, {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    (merged / "chat_template.jinja").write_text("{{ messages[0].content }}")
    warnings = run(base, files, tmp_path / "run", merged=merged)["validate"]["warnings"]
    assert len(warnings) == 2
    assert "lm_head.weight lies in the merged checkpoint" in warnings[0]
    assert "chat template is another one" in warnings[1]


@pytest.mark.llama_cpp
def test_a_gguf_of_the_blocks_passes_and_one_of_another_type_fails(
    base: Path, files: dict[str, Path], tmp_path: Path
):
    adapted = attach(loaded(base), dataclasses.replace(RULE, rank=1))
    good = write_candidate(
        adapted, ExportConfig(other_type=OtherType.bf16), tmp_path, {}, lambda _: None
    )
    report = run(base, files, tmp_path / "good_run", gguf=good.path)
    assert gates(report) == {"gguf_blocks": "passed", "gguf_kld": "passed"}
    assert report["kld"]["general"]["gguf"]["mean"] == 0
    other = tmp_path / "other.gguf"
    convert_types(good.path, other, "Q8_0")
    report = run(base, files, tmp_path / "other_run", gguf=other)
    assert gates(report)["gguf_blocks"] == "failed"
    assert "reproduced by the file's Q8_0" in report["guard"]["gates"][0]["message"]
    assert report["validate"]["what"] == "gguf"


@pytest.mark.llama_cpp
def test_our_gguf_is_judged_against_a_multimodal_base(
    tiny_multimodal_folder: Path, files: dict[str, Path], tmp_path: Path
):
    on_grid_folder(tiny_multimodal_folder, tmp_path / "base")
    adapted = adapted_model(tmp_path / "base", seed=None)
    exported = candidate_of(adapted, tmp_path / "export", version="1")
    report = run(tmp_path / "base", files, tmp_path / "run", gguf=exported.path)
    assert gates(report)["gguf_blocks"] == "passed"
    (found,) = report["validate"]["types"]
    assert (found["exact_share"], found["relative_error"]) == (1, 0)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("tiny_multimodal_folder", ["gemma4_dense"], indirect=True)
def test_a_gguf_that_could_be_misread_or_does_not_fit_is_refused_before_any_model_is_loaded(
    tiny_multimodal_folder: Path, base: Path, files: dict[str, Path], tmp_path: Path
):
    adapted = adapted_model(tiny_multimodal_folder, seed=None)
    foreign = candidate_of(adapted, tmp_path / "export")  # without our stamp
    with pytest.raises(CheckpointError, match="another writer did"):
        run(tiny_multimodal_folder, files, tmp_path / "run", gguf=foreign.path)
    own = candidate_of(adapted, tmp_path / "own", version="1")
    with pytest.raises(CheckpointError, match="loaded with a configuration of gemma3_text"):
        run(base, files, tmp_path / "run", gguf=own.path)


@pytest.mark.llama_cpp
def test_every_type_is_measured_on_a_multimodal_checkpoint(tiny_multimodal_folder: Path):
    source = find_source(BaseConfig(path=str(tiny_multimodal_folder), name="tiny"))
    layout = find_layout(source, BaseConfig())
    inspection = inspect_checkpoint(source, layout.trained, torch.device("cpu"))
    found = {each.type: each for each in damage_by_type(source, layout, inspection)}
    assert list(found) == [BY_LLAMA_CPP, BY_GRID, "Q8_0", "Q4_K_M", "Q6_K"]
    for name in ("Q4_K_M", "Q6_K"):
        assert 1e-4 < found[name].relative_error < 0.2


@pytest.mark.llama_cpp
@pytest.mark.parametrize("tiny_multimodal_folder", ["gemma3_multimodal"], indirect=True)
def test_a_stray_head_is_left_out_by_the_name_it_has_in_the_file(
    tiny_multimodal_folder: Path, tmp_path: Path
):
    folder = edited_folder(tiny_multimodal_folder, tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    embeddings = weights["language_model.model.embed_tokens.weight"]
    edit_tensors(folder, {"language_model.lm_head.weight": embeddings.clone()})
    source = find_source(BaseConfig(path=str(folder), name="tiny"))
    assert "lm_head.weight" in source.files
    layout = find_layout(source, BaseConfig())
    inspection = inspect_checkpoint(source, layout.trained, torch.device("cpu"))
    assert damage_by_type(source, layout, inspection)[-1].type == "Q6_K"


@pytest.mark.llama_cpp
def test_on_a_grid_only_q4_0_is_exact(base: Path):
    source = find_source(BaseConfig(path=str(base), name="tiny"))
    layout = find_layout(source, BaseConfig())
    inspection = inspect_checkpoint(source, layout.trained, torch.device("cpu"))
    found = {each.type: each for each in damage_by_type(source, layout, inspection)}
    assert list(found) == [BY_LLAMA_CPP, BY_GRID, "Q8_0", "Q4_K_M", "Q6_K"]
    assert found[BY_GRID].exact_share == 1
    for name in ("Q8_0", "Q4_K_M", "Q6_K"):
        assert found[name].exact_share < 1
        assert 1e-4 < found[name].relative_error < 0.2


def test_the_loss_decides_where_it_fell_clearly_and_the_kld_else():
    limits = ValidateConfig(min_share_kept=0.8)
    clear = kept_effect(EffectFigures(Mean(1.0, 0.1), Mean(0.85, 0.1), 0.4, 0.3))
    assert (clear.by_loss, clear.by_kld) == (0.85, pytest.approx(0.25))
    assert effect_gate(clear, clear, limits).status == "passed"
    vague = kept_effect(EffectFigures(Mean(0.1, 0.1), Mean(0.1, 0.1), 0.4, 0.3))
    assert vague.by_loss is None
    gate = effect_gate(vague, vague, limits)
    assert (gate.status, gate.value) == ("failed", pytest.approx(0.25))
    assert effect_gate(vague, clear, limits).status == "passed"
    nothing = kept_effect(EffectFigures(Mean(0.0, 0.0), Mean(0.0, 0.0), 0.0, 0.0))
    gate = effect_gate(nothing, nothing, limits)
    assert gate.status == "failed"
    assert "nothing was merged" in gate.message


def test_an_adapter_of_ours_and_a_folder_without_one_are_refused(
    base: Path, files: dict[str, Path], tmp_path: Path
):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=r"adapter_config\.json cannot be used"):
        run(base, files, tmp_path / "run", adapter=tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text('{"peft_type": "QATLORA"}')
    with pytest.raises(AdapterError, match=r"recipe=merge adapter\.path="):
        run(base, files, tmp_path / "run", adapter=tmp_path / "empty")


def test_an_adapter_whose_names_are_others_is_refused(
    base: Path, files: dict[str, Path], tmp_path: Path
):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    renamed = {
        name.replace("layers", "language_model.layers"): t for name, t in load_file(path).items()
    }
    save_file(renamed, path, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="cannot put .* on .*missing adapter keys"):
        run(base, files, tmp_path / "run", adapter=tmp_path / "lora")


def test_nothing_or_two_merges_at_once_are_refused(tmp_path: Path):
    cfg = RootConfig(stages=list(STAGES))
    cfg.base.embedded = "gemma3_270m"
    with pytest.raises(ConfigError, match="there is nothing to judge"):
        check_rules(cfg)
    cfg.validate = ValidateConfig(merged=str(tmp_path), adapter=str(tmp_path))
    with pytest.raises(ConfigError, match="one merge is judged at a time"):
        check_rules(cfg)
    cfg.validate = ValidateConfig(gguf=str(tmp_path / "absent.gguf"))
    with pytest.raises(ConfigError, match="there is no such file"):
        check_rules(cfg)
