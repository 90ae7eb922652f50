"""What is done with a folder that holds a run: gone on with as the same run, or refused."""

import dataclasses
import json
from pathlib import Path

import pytest
from pipeline_cases import STAGES

from qatlora import pipeline
from qatlora.config import RootConfig
from qatlora.errors import CheckpointError, ConfigError, RunFolderError
from qatlora.report.json_report import plain
from qatlora.stages.resume import SETTINGS, check_run_folder
from qatlora.state import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A second run on the folder of one that has saved a checkpoint."""
    cfg = RootConfig(stages=list(STAGES), run_dir=str(tmp_path))
    (tmp_path / SETTINGS).write_text(json.dumps(plain(dataclasses.asdict(cfg))))
    checkpoint = tmp_path / "checkpoints" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    cfg.train.resume = True
    return Run.start(cfg)


def check(run: Run) -> None:
    check_run_folder(run, plain(dataclasses.asdict(run.cfg)))


def test_a_run_is_not_written_over_unasked(run: Run) -> None:
    run.cfg.train.resume = False
    with pytest.raises(RunFolderError, match=r"checkpoint-20.*train\.resume=true.*another folder"):
        check(run)


@pytest.mark.parametrize("trains", [True, False])
def test_a_recipe_is_refused_in_the_folder_of_another_one(trains: bool, run: Run) -> None:
    run.cfg.card.name = "inspect"
    if not trains:
        run.cfg.stages = ["preflight", "inspect", "report"]
    kind = f"recipe=inspect {'with' if trains else 'without'} training"
    with pytest.raises(RunFolderError, match=rf"of recipe= with training.*{kind}.*run_dir"):
        check(run)


def test_settings_of_training_are_not_replaced_by_those_of_its_recipe_without(run: Run) -> None:
    run.cfg.stages = ["preflight", "load_data", "teacher_cache", "report"]
    with pytest.raises(RunFolderError, match="another folder"):
        check(run)
    (run.run_dir / SETTINGS).write_text(json.dumps(plain(dataclasses.asdict(run.cfg))))
    check(run)


def test_a_run_that_the_preflight_refuses_leaves_the_folder_to_others(tmp_path: Path) -> None:
    cfg = RootConfig(stages=["preflight", "inspect"], run_dir=str(tmp_path / "run"))
    cfg.base.path = str(tmp_path)
    with pytest.raises(CheckpointError, match="no config.json"):
        pipeline.run(cfg)
    assert not (tmp_path / "run" / SETTINGS).exists()


def test_a_config_of_a_checkpoint_is_not_written_over(run: Run) -> None:
    (run.run_dir / SETTINGS).write_text('{"model_type": "llama"}')
    with pytest.raises(RunFolderError, match=r"config\.json is of no run of qatlora.*run_dir"):
        check(run)


def test_a_resumed_run_keeps_its_course(run: Run) -> None:
    check(run)
    run.cfg.train.learning_rate = 0.5
    with pytest.raises(ConfigError, match=r"train\.learning_rate=0\.5: the run in .* has 0\.001"):
        check(run)


def test_a_resumed_run_keeps_the_type_that_the_embeddings_are_rounded_to(run: Run) -> None:
    run.cfg.export.file_name = "other.gguf"
    check(run)
    run.cfg.export.other_type = next(
        kind for kind in type(run.cfg.export.other_type) if kind is not run.cfg.export.other_type
    )
    with pytest.raises(ConfigError, match=r"export\.other_type=\w+: the run in .* has \w+"):
        check(run)


def test_what_leaves_training_as_it_is_may_differ(run: Run) -> None:
    run.cfg.data.num_prompts += 1
    run.cfg.teacher.cache_path = "elsewhere"
    check(run)


def test_what_changes_speed_alone_may_differ(run: Run) -> None:
    run.cfg.train.save_steps, run.cfg.train.gradient_checkpointing = 3, True
    run.cfg.guard.require_effect = False
    check(run)


def test_without_a_checkpoint_a_resumed_run_starts_and_says_so(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.run_dir / "checkpoints" / "checkpoint-20" / "trainer_state.json").unlink()
    run.cfg.train.learning_rate = 0.5
    check(run)
    assert "holds no checkpoint to go on from" in " ".join(capsys.readouterr().err.split())
