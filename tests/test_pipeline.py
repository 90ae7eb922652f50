"""The whole main path on tiny models: every storage and adapter, the guard, resume, refusals."""

import json
from pathlib import Path

import jsonschema
import pytest
from loaded_cases import built_folder, on_grid_folder

from qatlora import pipeline
from qatlora.config import AdapterKind, DataKind, RootConfig, Rounding, Storage, TeacherKind
from qatlora.errors import AdapterError, ConfigError, GuardFailed
from qatlora.report.json_report import load_schema

STAGES = [
    "preflight", "load_data", "load_base", "attach", "evaluate_base", "train", "save_adapter",
    "evaluate_trained", "write_candidate", "guard", "publish", "report",
]  # fmt: skip


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Conversations and general text, small enough for a model of two layers."""
    folder = tmp_path_factory.mktemp("data")
    chats, text = folder / "chats.jsonl", folder / "general.txt"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Say the number {number} in one short sentence."},
                {"role": "assistant", "content": f"The number is {number}, and that is all."},
            ]
        }
        for number in range(60)
    ]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    paragraphs = [
        f"Paragraph {number}. The quick brown fox jumps over {number} lazy dogs and then runs home "
        "to eat a warm supper with seven old friends who never ask where it has been all day."
        for number in range(60)
    ]
    text.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return {"chats": chats, "text": text}


def settings(base: Path, data: dict[str, Path], run_dir: Path) -> RootConfig:
    """Four steps on a tiny base, with a guard that asks for no effect."""
    cfg = RootConfig(stages=list(STAGES), run_dir=str(run_dir), seed=1)
    cfg.card.name = "chat_sft"
    cfg.base.path, cfg.base.name = str(base), "tiny"
    cfg.data.kind, cfg.data.path = DataKind.jsonl, str(data["chats"])
    cfg.data.general, cfg.data.max_length_tokens = str(data["text"]), 128
    cfg.data.eval_tokens, cfg.data.num_prompts = 64, 1
    cfg.train.max_steps, cfg.train.rows_per_step, cfg.train.micro_batch_rows = 4, 4, 2
    cfg.train.learning_rate, cfg.train.save_steps = 2e-2, 2
    cfg.evaluate.sample_max_new_tokens = 4
    cfg.guard.require_effect, cfg.guard.drift_kld_increase_max_nats = False, 10.0
    cfg.logging.progress_bars = False
    return cfg


CASES = [
    (Storage.nf4, AdapterKind.lora, Rounding.frozen),
    (Storage.q4_0, AdapterKind.lora, Rounding.frozen),
    (Storage.bf16, AdapterKind.lora, Rounding.reference),
    (Storage.q4_0, AdapterKind.steps, Rounding.frozen),
    (Storage.nf4, AdapterKind.both, Rounding.frozen),
]


@pytest.mark.llama_cpp
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(part.name for part in case))
@pytest.mark.parametrize("layout", ["tiny_gemma3_folder", "tiny_llama_folder"])
def test_what_was_trained_is_what_is_published(
    case: tuple, layout: str, files: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cfg = settings(request.getfixturevalue(layout), files, tmp_path)
    cfg.storage.kind, cfg.adapter.kind, cfg.adapter.rounding = case
    pipeline.run(cfg)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, load_schema())
    gates = {gate["name"]: gate for gate in report["guard"]["gates"]}
    assert report["guard"]["passed"]
    assert gates["identity"]["value"] == 0
    assert gates["self_kld"]["value"] == 0
    assert gates["before_after_kld_mean"]["value"] == 0
    assert gates["effect_changed"]["value"] > 0
    for text in ("task", "general"):
        perplexity = report["perplexity"][text]
        assert perplexity["merged"] == perplexity["trained"] != perplexity["base"]
    assert Path(report["export"]["path"]).is_file()
    assert report["export"]["tensor_types"]["Q4_0"] == 14
    assert not (tmp_path / ".candidate").exists()
    assert "tiny" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.llama_cpp
def test_a_saved_adapter_is_exported_again_and_refused_on_another_base(
    tiny_gemma3_folder: Path, tiny_llama_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    cfg = settings(tiny_gemma3_folder, files, tmp_path / "first")
    first = pipeline.run(cfg)
    again = settings(tiny_gemma3_folder, files, tmp_path / "again")
    again.stages = [name for name in STAGES if name not in ("train", "save_adapter")]
    again.adapter.path = str(tmp_path / "first" / "adapter")
    second = pipeline.run(again)
    assert first.export is not None
    assert second.export is not None
    assert second.texts["task"]["merged"] == first.texts["task"]["merged"]

    other = settings(tiny_llama_folder, files, tmp_path / "other")
    other.stages, other.adapter.path = again.stages, again.adapter.path
    with pytest.raises(AdapterError) as refused:
        pipeline.run(other)
    assert first.base.digest in str(refused.value)
    assert str(refused.value).count("digest") == 2


@pytest.mark.llama_cpp
def test_a_merge_that_does_nothing_publishes_nothing(
    tiny_gemma3_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    cfg = settings(tiny_gemma3_folder, files, tmp_path)
    cfg.train.learning_rate, cfg.guard.require_effect = 1e-12, True
    with pytest.raises(GuardFailed, match="effect_changed: 0 levels and steps"):
        pipeline.run(cfg)
    assert not list(tmp_path.glob("*.gguf"))
    assert json.loads((tmp_path / "report.json").read_text())["guard"]["passed"] is False


@pytest.mark.llama_cpp
def test_training_without_a_teacher_skips_the_drift_gate(
    tiny_gemma3_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    cfg = settings(tiny_gemma3_folder, files, tmp_path)
    cfg.teacher.kind, cfg.teacher.kl_weight, cfg.teacher.general_kl_weight = TeacherKind.none, 0, 0
    report = pipeline.run(cfg)
    assert report.guard is not None
    assert {gate.name: gate.status for gate in report.guard.gates}["drift"] == "skipped"
    assert report.texts["task"]["merged"].kld is None


@pytest.mark.llama_cpp
def test_an_adapter_trained_on_a_packed_build_is_exported_from_its_source_alike(
    tiny_gemma3_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    on_grid_folder(tiny_gemma3_folder, tmp_path / "bf16")
    built_folder(tmp_path / "bf16", tmp_path / "packed", "q4_0")
    cfg = settings(tmp_path / "packed", files, tmp_path / "first")
    cfg.storage.kind = Storage.q4_0
    first = pipeline.run(cfg)
    again = settings(tmp_path / "bf16", files, tmp_path / "again")
    again.storage.kind = Storage.q4_0
    again.stages = [name for name in STAGES if name not in ("train", "save_adapter")]
    again.adapter.path = str(tmp_path / "first" / "adapter")
    second = pipeline.run(again)
    assert first.base == second.base
    assert first.guard.passed
    assert first.texts["task"] == second.texts["task"]  # its teacher, too: it is on the grid
    assert first.texts["task"]["merged"].kld is not None


@pytest.mark.llama_cpp
def test_an_nf4_build_is_trained_and_published(
    tiny_llama_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    built_folder(tiny_llama_folder, tmp_path / "nf4", "nf4")
    cfg = settings(tmp_path / "nf4", files, tmp_path / "run")
    cfg.teacher.path = str(tiny_llama_folder)
    report = pipeline.run(cfg)
    assert report.guard.passed
    assert report.texts["task"]["merged"] == report.texts["task"]["trained"]


@pytest.mark.parametrize("kind", ["q4_0", "nf4"])
def test_a_build_that_has_no_bf16_values_any_more_is_no_teacher(
    kind: str, tiny_llama_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    built_folder(tiny_llama_folder, tmp_path / "build", kind)
    cfg = settings(tmp_path / "build", files, tmp_path / "run")
    cfg.storage.kind = Storage[kind]
    with pytest.raises(
        ConfigError, match="teacher.path=FOLDER of the bf16 checkpoint.*teacher=none"
    ):
        pipeline.run(cfg)


def test_a_resumed_run_equals_the_uninterrupted_one(
    tiny_gemma3_folder: Path,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages = STAGES[: STAGES.index("save_adapter") + 1]
    whole = settings(tiny_gemma3_folder, files, tmp_path / "whole")
    whole.stages = stages
    expected = pipeline.run(whole)

    class Killed(Exception):
        pass

    def dies_after_three(self, args, state, control, **_) -> None:
        if state.global_step == 3:
            raise Killed

    killed = settings(tiny_gemma3_folder, files, tmp_path / "killed")
    killed.stages = stages
    with monkeypatch.context() as patch:
        patch.setattr("qatlora.train.run.StepLog.on_step_end", dies_after_three)
        with pytest.raises(Killed):
            pipeline.run(killed)
    killed.train.resume = True
    resumed = pipeline.run(killed)
    assert expected.train is not None
    assert resumed.train is not None
    losses = [point.loss for point in expected.train.history]
    assert [point.loss for point in resumed.train.history] == losses
    adapters = [tmp_path / name / "adapter" / "identity.json" for name in ("whole", "killed")]
    deployed = [json.loads(path.read_text())["deployed"] for path in adapters]
    assert deployed[0] == deployed[1]
