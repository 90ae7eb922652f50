"""What a person may type to name a model, and what is refused at once."""

from pathlib import Path

import pytest

from qatlora.errors import ConfigError
from qatlora.model_spec import STORAGES, ModelSpec, parse_models, parse_vanilla


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "odd@nf5", "run/adapter", "empty"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")  # a run keeps its settings under this name
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "file.Q4_K_M.gguf").write_bytes(b"GGUF")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "kind", "place", "storage", "label"),
    [
        ("nf4", "base", "", "nf4", "nf4"),
        ("model", "folder", "model", None, "model"),
        ("model@q4_0", "folder", "model", "q4_0", "model@q4_0"),
        ("odd@nf5", "folder", "odd@nf5", None, "odd@nf5"),
        ("odd@nf5@nf4", "folder", "odd@nf5", "nf4", "odd@nf5@nf4"),
        ("run", "adapter", "run/adapter", None, "run"),
        ("run/adapter", "adapter", "run/adapter", None, "run"),
        ("file.Q4_K_M.gguf", "gguf", "file.Q4_K_M.gguf", None, "file.Q4_K_M"),
    ],
)
def test_a_model_is_found_by_what_lies_there(places, text, kind, place, storage, label):
    (spec,) = parse_models("fidelity.models", [text])
    wanted = ModelSpec(text, kind, str(places / place) if place else "", storage)
    assert (spec, spec.label) == (wanted, label)


def test_hub_ids_and_embedded_bases_have_a_prefix():
    hub, embedded = parse_models("key", ["hub:org/model@nf4", "embedded:smollm2_135m"])
    assert (hub.kind, hub.place, hub.storage, hub.label) == ("hub", "org/model", "nf4", "model@nf4")
    assert (embedded.kind, embedded.place, embedded.storage) == ("embedded", "smollm2_135m", None)


@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage_is_a_shortcut_for_the_base(storage):
    assert parse_models("key", [storage]) == [ModelSpec(storage, "base", storage=storage)]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["nf5"], "did you mean nf4?"),
        (["model@q40"], "did you mean q4_0?"),
        (["nowhere/model"], "neither a storage of the base nor a folder"),
        (["file.Q4_K_M.gguf@nf4"], "Leave @nf4 out"),
        (["run@nf4"], "belongs to the storage that it was trained on"),
        (["nf4", "nf4"], "different models"),
        ([], "at least one"),
    ],
)
def test_what_names_no_model_is_refused_with_a_remedy(places, texts, words):
    with pytest.raises(ConfigError, match="fidelity.models") as refused:
        parse_models("fidelity.models", texts)
    assert words in str(refused.value)


@pytest.mark.parametrize("place", ["nf4", "model@nf4", "file.Q4_K_M.gguf", "run"])
def test_what_is_no_ordinary_checkpoint_is_no_vanilla_one(places, place):
    with pytest.raises(ConfigError, match=rf"^fidelity\.vanilla={place}: .*without @STORAGE"):
        parse_vanilla(place)


def test_a_vanilla_checkpoint_that_is_not_there_is_named_as_it_was_given(places):
    with pytest.raises(ConfigError, match=r"'nowhere/model' is neither"):
        parse_vanilla("nowhere/model")
