import dataclasses
import re

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from qatlora.__main__ import register_recipes
from qatlora.config import (
    STAGES,
    AdapterKind,
    ChatFormat,
    DataConfig,
    DataKind,
    DivergenceKind,
    Latent,
    RootConfig,
    Rounding,
    Storage,
    TeacherKind,
    Trained,
    to_dataclasses,
)
from qatlora.config.rules import validate
from qatlora.errors import ConfigError
from qatlora.paths import shipped

RECIPES = sorted(path.stem for path in shipped("recipes").glob("*.yaml"))
CHOICES = sorted(
    f"{path.parent.name}={path.stem}"
    for path in shipped("conf").glob("*/*.yaml")
    if path.parent.name != "hydra"
)
REMEDY = r"\b(set|use|give|add|raise|change|choose|correct|reorder|did you mean|must be)\b"


def compose(*overrides: str, keep_hydra: bool = False) -> DictConfig:
    register_recipes(shipped("recipes"))
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(shipped("conf")), version_base="1.3"):
        cfg = hydra.compose("config", list(overrides), return_hydra_config=True)
    if keep_hydra:
        return cfg
    with open_dict(cfg):
        del cfg["hydra"]  # as Hydra does before it calls the run
    cfg.run_dir = "runs/test"
    return cfg


def settings(*overrides: str) -> RootConfig:
    return to_dataclasses(compose("recipe=chat_sft", *overrides))


@pytest.fixture(scope="module")
def valid() -> RootConfig:
    return settings()


def change(root: RootConfig, key: str, value: object) -> RootConfig:
    """A copy of `root` in which the setting `section.name` (or `name`) has another value."""
    section, _, name = key.rpartition(".")
    if not section:
        return dataclasses.replace(root, **{name: value})
    part = dataclasses.replace(getattr(root, section), **{name: value})
    return dataclasses.replace(root, **{section: part})


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_and_has_a_full_card_and_known_stages(recipe):
    root = to_dataclasses(compose(f"recipe={recipe}"))
    card = dataclasses.asdict(root.card)
    card.pop("example")  # a recipe may need no setting
    assert all(card.values())
    assert root.stages == [stage for stage in STAGES if stage in root.stages]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_every_group_composes_and_says_what_it_is(choice):
    group, name = choice.split("=")
    section = getattr(settings(choice), group)
    assert not hasattr(section, "kind") or section.kind.name == name
    first_line = (shipped("conf") / group / f"{name}.yaml").read_text().splitlines()[0]
    assert first_line.startswith("# ")


def test_the_default_run_is_valid_and_is_the_embedded_base_in_nf4_with_a_step_adapter(valid):
    validate(valid)
    assert valid.base.embedded == valid.base.name == "gemma3_270m"
    assert valid.storage.kind is Storage.nf4
    assert valid.adapter.kind is AdapterKind.steps
    assert valid.adapter.alpha != valid.adapter.rank


def test_an_embedded_base_brings_its_template_and_takes_it_away_when_displaced(tmp_path):
    assert settings().base.chat_template == "gemma3"
    assert settings("base=smollm2_135m").base.chat_template is None
    assert settings(f"base.path={tmp_path}").base.chat_template is None
    chosen = settings(f"base.path={tmp_path}", "base.chat_template=chatml")
    assert chosen.base.chat_template == "chatml"


def test_a_path_alone_displaces_the_embedded_base_and_names_the_run(tmp_path):
    root = settings(f"base.path={tmp_path}/Model-7B.gguf")
    assert (root.base.embedded, root.base.name) == (None, "Model-7B")


def test_a_given_name_is_kept_with_a_path(tmp_path):
    assert settings(f"base.path={tmp_path}", "base.name=mine").base.name == "mine"


def test_paths_are_read_from_the_current_folder_and_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    root = settings("base.path=models/one", "data=jsonl", 'data.path="~/chats.jsonl"')
    assert root.base.path == str(tmp_path / "models/one")
    assert root.data.path == "/home/somebody/chats.jsonl"


def test_every_setting_of_a_group_file_is_one_that_the_schema_documents():
    for path in shipped("conf").glob("*/*.yaml"):
        section = OmegaConf.structured(RootConfig)[path.parent.name]
        assert set(OmegaConf.load(path)) <= set(section)


def test_every_section_says_what_it_is_for():
    for field in dataclasses.fields(RootConfig):
        if dataclasses.is_dataclass(field.type):
            automatic = f"{field.type.__name__}("  # dataclass repeats the signature
            assert not (field.type.__doc__ or automatic).startswith(automatic)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("adapter.rank", 0, "at least 1"),
        ("adapter.rank", -3, "at least 1"),
        ("adapter.steps_rank", 0, "at least 1"),
        ("adapter.alpha", 0.0, "greater than 0"),
        ("adapter.alpha", float("nan"), "greater than 0"),
        ("train.max_steps", 0, "at least 1"),
        ("train.learning_rate", float("inf"), "greater than 0"),
        ("train.micro_batch_rows", 3, "must divide train.rows_per_step=4"),
        ("train.warmup_ratio", 1.0, "below 1"),
        ("logging.log_steps", 10_000, "at most that"),
        ("train.device", "gpu", "auto, cpu, cuda"),
        ("teacher.kl_weight", -0.1, "at least 0"),
        ("teacher.kind", TeacherKind.none, "need a teacher"),
        ("teacher.kind", TeacherKind.cache, "Give teacher.path=FOLDER"),
        ("teacher.kind", TeacherKind.self, "NF4 has rounded"),
        ("teacher.temperature", 0.0, "greater than 0"),
        ("teacher.beta", 1.0, "between 0 and 1"),
        ("teacher.cache_top_k", 0, "at least 1"),
        ("data.replay_rows_per_step", 0, "replayed rows"),
        ("data.path", "/nowhere.jsonl", "reads no file"),
        ("base.path", "/nowhere", "no such file or folder"),
        ("base.embedded", None, "needs a base"),
        ("base.trained", ["("], "no regular expression"),
        ("adapter.path", "/nowhere", "adapter_config.json"),
        ("export.file_name", "../x.gguf", "plain name"),
        ("export.file_name", "model.bin", "ends in .gguf"),
        ("stages", [], "recipe=NAME"),
        ("stages", ["load_bases"], "did you mean load_base?"),
        ("stages", ["train", "attach"], "only in the order"),
        ("stages", ["train", "train"], "once each"),
        ("stages", ["publish"], "passed the guard"),
        ("stages", ["doctor", "report"], "runs alone"),
    ],
)
def test_a_broken_rule_names_key_value_and_remedy(valid, key, value, words):
    with pytest.raises(ConfigError) as caught:
        validate(change(valid, key, value))
    message = str(caught.value)
    assert words in message
    assert key.rpartition(".")[2] in message
    assert re.search(REMEDY, message.lower())


def test_jsonl_data_needs_a_file(valid, tmp_path):
    jsonl = change(valid, "data.kind", DataKind.jsonl)
    for path in (None, str(tmp_path / "absent.jsonl"), str(tmp_path)):
        with pytest.raises(ConfigError, match=r"data\.path=.*JSONL|give data\.path="):
            validate(change(jsonl, "data.path", path))


@pytest.mark.parametrize(
    ("kind", "keys", "words"),
    [
        (DataKind.files, {"path": "chats.txt"}, "by its suffix, one of .jsonl, .json, .parquet"),
        (DataKind.jsonl, {"path": "chats.csv"}, "CSV is not read"),
        (DataKind.files, {"path": "a.jsonl", "paths": ["a.jsonl"]}, "data.paths together"),
        (DataKind.files, {"paths": ["a.jsonl"], "weights": [0.0]}, "greater than 0"),
        (DataKind.files, {"paths": ["a.jsonl", "a.jsonl"]}, "named twice"),
        (DataKind.files, {"paths": ["a.jsonl"], "weights": [1.0, 2.0]}, "one weight per file"),
        (DataKind.files, {"paths": ["a.jsonl", "absent.jsonl"]}, "absent.jsonl: no such"),
        (DataKind.files, {"path": "a.jsonl", "hub_id": "x/y"}, "data.hub_id=x/y with data=files"),
        (DataKind.hub, {}, "data=hub without data.hub_id"),
        (DataKind.hub, {"hub_id": "x/y", "path": "a.jsonl"}, "with data=hub"),
        (DataKind.chitchat, {"paths": ["a.jsonl"]}, "data=chitchat"),
        (DataKind.chitchat, {"format": ChatFormat.alpaca}, "data.format=alpaca"),
    ],
)
def test_each_kind_of_data_has_its_own_keys(valid, tmp_path, monkeypatch, kind, keys, words):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "chats.txt", "chats.csv"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError) as refused:
        validate(dataclasses.replace(valid, data=DataConfig(kind=kind, **keys)))
    assert words in str(refused.value)
    assert re.search(REMEDY, str(refused.value).lower())


def test_several_files_are_given_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    names = ("a.jsonl", "sub/b-2.parquet")
    for name in names:
        (tmp_path / name).touch()
    root = settings("data=files", "data.paths=[a.jsonl,sub/b-2.parquet]", "data.weights=[2,0.5]")
    validate(root)
    assert root.data.paths == [str(tmp_path / name) for name in names]
    assert root.data.weights == [2.0, 0.5]


def test_exporting_without_training_needs_a_saved_adapter(valid):
    with pytest.raises(ConfigError, match="adapter.path=RUN_FOLDER/adapter"):
        validate(change(valid, "stages", ["attach", "write_candidate"]))


def test_the_reference_rule_is_for_lora_only(valid):
    lora = change(valid, "adapter.kind", AdapterKind.lora)
    reference = change(lora, "adapter.rounding", Rounding.reference)
    validate(reference)
    for kind in (AdapterKind.steps, AdapterKind.both):
        with pytest.raises(ConfigError, match="adapter.rounding=reference"):
            validate(change(reference, "adapter.kind", kind))


def test_a_run_that_would_train_nothing_is_refused(valid):
    nothing = change(change(valid, "teacher.kl_weight", 0.0), "teacher.general_kl_weight", 0.0)
    validate(nothing)
    with pytest.raises(ConfigError, match="nothing would be trained"):
        validate(change(nothing, "teacher.ce_weight", 0.0))


def test_the_divergence_and_the_mixture_are_settings():
    teacher = settings("teacher.divergence=jsd", "teacher.beta=0.2").teacher
    assert (teacher.divergence, teacher.beta) == (DivergenceKind.jsd, 0.2)


def test_a_base_is_its_own_teacher_only_where_its_weights_stay(valid, tmp_path):
    own = change(change(valid, "storage.kind", Storage.bf16), "teacher.kind", TeacherKind.self)
    validate(own)
    with pytest.raises(ConfigError, match="teacher is the base itself"):
        validate(change(own, "teacher.path", str(tmp_path)))
    with pytest.raises(ConfigError, match="weights are what is trained"):
        validate(change(own, "distill.train", Trained.weights))


def test_the_precision_of_trained_weights_is_refused_where_none_are_trained(valid):
    with pytest.raises(ConfigError, match="distill.latent=bf16 with distill.train=adapters"):
        validate(change(valid, "distill.latent", Latent.bf16))


def test_only_a_bf16_teacher_writes_a_cache_for_any_recipe():
    root = to_dataclasses(compose("recipe=teacher_cache"))
    validate(root)
    other = compose("recipe=qat_distill", "stages=[preflight,load_data,teacher_cache,report]")
    validate(to_dataclasses(other))
    with pytest.raises(ConfigError, match=r"Use teacher=bf16"):
        validate(change(root, "teacher.kind", TeacherKind.self))


@pytest.mark.parametrize("recipe", ["plan", "chat_sft"])
def test_a_path_displaces_a_published_base_with_all_that_was_known_of_it(recipe, tmp_path):
    root = to_dataclasses(
        compose(f"recipe={recipe}", "base=gemma4_12b_it_qat", f"base.path={tmp_path}")
    )
    validate(root)
    assert (root.base.hub_id, root.base.architecture) == (None, None)
    assert root.base.name == tmp_path.name


def test_another_hub_id_is_not_taken_for_the_published_base():
    other = to_dataclasses(compose("recipe=plan", "base.hub_id=org/model")).base
    assert (other.hub_id, other.architecture, other.name) == ("org/model", None, "model")
    published = to_dataclasses(compose("recipe=plan")).base
    assert published.architecture == published.name.removesuffix("_it_qat")


def test_a_path_and_a_hub_id_together_are_refused(valid, tmp_path):
    both = change(change(valid, "base.path", str(tmp_path)), "base.hub_id", "org/model")
    with pytest.raises(ConfigError, match="one base"):
        validate(both)


def test_a_key_that_the_schema_lacks_cannot_be_added():
    with pytest.raises(ConfigError, match=r"train\.speed.*no such setting"):
        settings("+train.speed=9")


def test_an_interpolation_that_leads_nowhere_names_its_key():
    with pytest.raises(ConfigError, match=r"train\.max_steps"):
        settings("train.max_steps=${nowhere}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("benchmark.tokens_per_step", [300]),
        ("benchmark.tokens_per_step", []),
        ("benchmark.learning_rates", [1e-3, 1e-3]),
        ("benchmark.learning_rates", [0.0]),
        ("benchmark.seeds", [-1]),
        ("benchmark.rounds", 0),
    ],
)
def test_a_benchmark_that_would_measure_nothing_is_refused(key, value):
    root = to_dataclasses(compose("recipe=benchmark"))
    validate(root)
    with pytest.raises(ConfigError, match=re.escape(key)) as refused:
        validate(change(root, key, value))
    assert re.search(REMEDY, str(refused.value), re.IGNORECASE)


@pytest.mark.parametrize("given", [[], ["patch.base=base.gguf"], ["patch.path=no.safetensors"]])
def test_a_patch_is_applied_to_files_that_exist(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.gguf").touch()
    root = to_dataclasses(compose("recipe=apply_patch", *given))
    with pytest.raises(ConfigError, match=r"patch\.path.*export\.patch=true") as refused:
        validate(root)
    assert re.search(REMEDY, str(refused.value), re.IGNORECASE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fidelity.models", []),
        ("fidelity.models", ["nf5"]),
        ("fidelity.models", ["nf4", "nf4"]),
        ("fidelity.reference", "nowhere/model"),
        ("fidelity.texts", []),
        ("fidelity.texts", ["wiki", "wiki"]),
        ("fidelity.tokens_per_text", 1),
        ("fidelity.window_tokens", 4),
    ],
)
def test_a_comparison_that_would_compare_nothing_is_refused(key, value):
    root = to_dataclasses(compose("recipe=fidelity"))
    validate(root)
    with pytest.raises(ConfigError, match=re.escape(key)) as refused:
        validate(change(root, key, value))
    assert re.search(REMEDY, str(refused.value), re.IGNORECASE)
