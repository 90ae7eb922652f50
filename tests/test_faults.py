"""What ends a run early, and how the next start goes on: kills, signals, NaN, a full disk."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from kill_targets import TARGETS
from pipeline_cases import STAGES, settings, write_data
from safetensors.torch import load_file

from qatlora import pipeline
from qatlora.config import RootConfig
from qatlora.errors import Interrupted, TrainError
from qatlora.interrupts import interrupt
from qatlora.report.results import RunReport
from qatlora.train.checkpoints import last_checkpoint

TESTS = Path(__file__).parent
ON_STEP_END = "qatlora.train.run.StepLog.on_step_end"


class Died(BaseException):
    """Ends a run as a kill does, but for this process."""


def die() -> None:
    raise Died


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def course(
    tiny_gemma3_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], RootConfig]:
    """Settings up to the saved adapter, for a run folder."""
    data = write_data(tmp_path_factory.mktemp("data"))

    def make(run_dir: Path) -> RootConfig:
        cfg = settings(tiny_gemma3_folder, data, run_dir)
        cfg.stages = STAGES[: STAGES.index("save_adapter") + 1]
        return cfg

    return make


@pytest.fixture(scope="module")
def whole(
    course: Callable[[Path], RootConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RunReport]:
    run_dir = tmp_path_factory.mktemp("whole")
    return run_dir, pipeline.run(course(run_dir))


@pytest.mark.parametrize(
    ("ends", "error", "last_step"), [(die, Died, 2), (terminate, Interrupted, 3)]
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    ends: Callable[[], None],
    error: type[BaseException],
    last_step: int,
    course: Callable[[Path], RootConfig],
    whole: tuple[Path, RunReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = course(tmp_path)

    def end_after_three(self, args, state, control, **_) -> None:
        if state.global_step == 3:
            ends()

    with monkeypatch.context() as patch:
        patch.setattr(ON_STEP_END, end_after_three)
        with pytest.raises(error) as ended:
            pipeline.run(cfg)
    last = last_checkpoint(tmp_path)
    assert last is not None
    assert last.name == f"checkpoint-{last_step}"
    if error is Interrupted:
        assert ended.value.exit_code == 128 + signal.SIGTERM
        assert f"{last} holds its last step" in str(ended.value)
        assert f"train.resume=true run_dir={tmp_path}" in str(ended.value)
    (tmp_path / "train_log.jsonl").open("a").write('{"step": 3, "lo')  # a kill cuts a line
    cfg.train.resume = True
    resumed = pipeline.run(cfg)
    run_dir, expected = whole
    assert [point.loss for point in resumed.train.history] == [
        point.loss for point in expected.train.history
    ]
    assert resumed.train.tokens == expected.train.tokens
    for name in ("adapter_model.safetensors", "identity.json"):
        files = [folder / "adapter" / name for folder in (tmp_path, run_dir)]
        assert files[0].read_bytes() == files[1].read_bytes()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"checkpoint-{last_step}", "checkpoint-4"]


def test_a_second_signal_ends_at_once(
    course: Callable[[Path], RootConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(self, args, state, control, **_) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ON_STEP_END, twice)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as ended:
        pipeline.run(course(tmp_path))
    assert ended.value.exit_code == 128 + signal.SIGINT
    assert last_checkpoint(tmp_path) is None
    assert signal.getsignal(signal.SIGINT) is before


def test_a_loss_that_is_not_finite_names_its_batch_and_leaves_a_finite_checkpoint(
    course: Callable[[Path], RootConfig], tmp_path: Path
) -> None:
    cfg = course(tmp_path)
    cfg.train.learning_rate, cfg.train.save_steps, cfg.train.warmup_ratio = 1e30, 1, 0.0
    with pytest.raises(
        TrainError, match=r"Step 2: the (loss of micro-batch \d|norm .*) is (nan|inf)"
    ) as stopped:
        pipeline.run(cfg)
    last = last_checkpoint(tmp_path)
    assert str(last) in str(stopped.value)
    kept = load_file(last / "trainable.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_a_signal_outside_of_training_says_how_each_kind_of_run_goes_on() -> None:
    with pytest.raises(
        Interrupted, match=r"SIGTERM.*Training .* train\.resume=true; a teacher cache .* without it"
    ):
        interrupt(signal.SIGTERM)


LIMITED = """\
import resource, sys
from pathlib import Path
from pipeline_cases import settings, write_data
from qatlora import pipeline
from qatlora.errors import TrainError
folder, base, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
cfg = settings(base, write_data(folder), folder / "run")
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    pipeline.run(cfg)
except TrainError as error:
    print(error)
"""


def test_a_checkpoint_that_the_system_refuses_is_one_paragraph_and_leaves_none(
    tiny_gemma3_folder: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), str(tiny_gemma3_folder), "20000"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [TESTS.parent, TESTS]))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "The checkpoint of step 2 could not be written" in done.stdout, done.stderr
    assert "(os error 27)" in done.stdout  # EFBIG
    assert last_checkpoint(tmp_path / "run") is None


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_runs_killed_at_random_moments_end_as_uninterrupted_ones(
    tiny_gemma3_folder: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(TESTS / "kill_runs.py"), str(tiny_gemma3_folder), str(tmp_path), "2"],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {report["target"]: report["kills"] for report in reports} == dict.fromkeys(TARGETS, 2)
