"""Who is compared with whom, and what is refused before a weight is read."""

import shutil
from pathlib import Path

import pytest
import torch
from loaded_cases import (
    adapted_model,
    built_folder,
    candidate_of,
    edited_folder,
    on_grid_folder,
)

from qatlora.base.layout import find_layout
from qatlora.base.load import load_tokenizer
from qatlora.base.source import find_source
from qatlora.config import BaseConfig
from qatlora.errors import CheckpointError, FidelityError
from qatlora.fidelity.load import LoadSettings, load_models
from qatlora.fidelity.plan import Checkpoint, Comparison, Planner
from qatlora.model_spec import parse_models, parse_vanilla


def plan(base: Path, models: list[str], reference: str | None = None) -> list[Comparison]:
    settings = BaseConfig(path=str(base), name="tiny")
    source = find_source(settings)
    checkpoint = Checkpoint(source, find_layout(source, settings), None)
    planner = Planner(checkpoint, "QAT", load_tokenizer(base))
    named = parse_models("fidelity.reference", [reference])[0] if reference else None
    return planner.comparisons(parse_models("fidelity.models", models), named)


def names(comparisons: list[Comparison]) -> dict[str, list[str]]:
    return {each.reference.label: [model.label for model in each.models] for each in comparisons}


def test_a_rounded_checkpoint_is_compared_with_itself_and_all_else_with_the_base(
    tiny_llama_folder, tmp_path
):
    other, build = tmp_path / "other", tmp_path / "build"
    shutil.copytree(tiny_llama_folder, other)
    built_folder(tiny_llama_folder, build, "q4_0")
    found = plan(tiny_llama_folder, [f"{other}@nf4", "q4_0", f"{build}", f"{other}"])
    assert names(found) == {"other@bf16": ["other@nf4"], "bf16": ["q4_0", "build", "other"]}
    assert found[0].reference.place.source.folder == other
    assert found[0].reference.place.storage == "bf16"


def test_titles_are_those_of_model_cards(tiny_llama_folder, tmp_path):
    shutil.copytree(tiny_llama_folder, tmp_path / "other")
    models = ["nf4", "q4_0", "q4_0_reference", f"{tmp_path}/other@nf4", f"{tmp_path}/other"]
    found = plan(tiny_llama_folder, models)
    titles = {model.text: model.title for each in found for model in each.models}
    assert list(titles) == [*models[:3], models[4], models[3]]  # by reference
    assert list(titles.values()) == [
        "QAT → NF4",
        "QAT → Q4_0 ours",
        "QAT → Q4_0 reference",
        "bf16 → other",
        "other → NF4",
    ]
    vanilla = parse_vanilla(str(tmp_path / "other"))
    assert (vanilla.label, vanilla.storage) == ("vanilla@nf4", "nf4")


def test_a_named_reference_is_that_of_all(tiny_llama_folder, tmp_path):
    shutil.copytree(tiny_llama_folder, tmp_path / "other")
    found = plan(tiny_llama_folder, [f"{tmp_path}/other@nf4", "q4_0"], str(tmp_path / "other"))
    assert names(found) == {"other": ["other@nf4", "q4_0"]}


def test_models_of_one_name_are_told_apart_by_their_paths(tiny_llama_folder, tmp_path):
    for parent in ("a", "b"):
        shutil.copytree(tiny_llama_folder, tmp_path / parent / "model")
    texts = [str(tmp_path / parent / "model") for parent in ("a", "b")]
    assert names(plan(tiny_llama_folder, texts)) == {"bf16": texts}


def test_another_vocabulary_is_refused(tiny_llama_folder, tiny_gemma3_folder, tmp_path):
    with pytest.raises(FidelityError, match="token 0 is .*give models of one family"):
        plan(tiny_llama_folder, [str(tiny_gemma3_folder)])
    padded = edited_folder(tiny_llama_folder, tmp_path / "padded", vocab_size=400)
    with pytest.raises(FidelityError, match="400 rows of logits and not 384"):
        plan(tiny_llama_folder, [str(padded)])


def test_a_base_without_bf16_values_needs_a_named_reference(tiny_llama_folder, tmp_path):
    built_folder(tiny_llama_folder, tmp_path / "build", "q4_0")
    with pytest.raises(FidelityError, match="name it in fidelity.reference"):
        plan(tmp_path / "build", ["q4_0"])
    found = plan(tmp_path / "build", ["q4_0"], str(tiny_llama_folder))
    assert names(found) == {tiny_llama_folder.name: ["q4_0"]}


def test_a_build_of_a_checkpoint_on_its_grid_is_its_own_reference(tiny_llama_folder, tmp_path):
    on_grid_folder(tiny_llama_folder, tmp_path / "on_grid")
    built_folder(tmp_path / "on_grid", tmp_path / "build", "q4_0")
    assert names(plan(tmp_path / "build", ["q4_0"])) == {"bf16": ["q4_0"]}


def test_a_storage_that_a_build_cannot_have_is_refused(tiny_llama_folder, tmp_path):
    built_folder(tiny_llama_folder, tmp_path / "build", "nf4")
    for storage in ("q4_0", "q4_0_reference", "bf16"):
        with pytest.raises(CheckpointError, match="Use storage=nf4"):
            plan(tiny_llama_folder, [f"{tmp_path}/build@{storage}"])


@pytest.mark.llama_cpp
@pytest.mark.parametrize("tiny_multimodal_folder", ["gemma4_per_layer"], indirect=True)
def test_our_own_gemma4_gguf_is_loaded_beside_the_base(tiny_multimodal_folder, tmp_path):
    exported = candidate_of(adapted_model(tiny_multimodal_folder), tmp_path, version="1")
    (found,) = plan(tiny_multimodal_folder, [str(exported.path)])
    settings = LoadSettings(torch.device("cpu"), torch.float32, "q8_0")
    (loaded,) = load_models(found.models[0].place, settings, load_tokenizer(tiny_multimodal_folder))
    assert loaded.model.config.model_type == "gemma4_text"
