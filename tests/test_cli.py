import csv
import errno
import os
import resource
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from qatlora.__main__ import main
from qatlora.config import RootConfig
from qatlora.errors import GuardFailed, RunFolderError
from qatlora.paths import shipped

ROOT = Path(__file__).parents[1]


class Pipeline:
    """Stands where `qatlora.pipeline` would be imported: records the runs, fails on request."""

    def __init__(self) -> None:
        self.runs: list[RootConfig] = []
        self.fails_with: Callable[[RootConfig], BaseException | None] = lambda cfg: None

    def run(self, cfg: RootConfig) -> None:
        self.runs.append(cfg)
        if error := self.fails_with(cfg):
            raise error


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pipeline:
    """An empty current folder and a pipeline that only records."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QATLORA_TRACEBACK", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main() sets it; this takes it back afterwards
    stand_in = Pipeline()
    module = types.ModuleType("qatlora.pipeline")
    module.run = stand_in.run
    monkeypatch.setitem(sys.modules, "qatlora.pipeline", module)
    return stand_in


@pytest.fixture
def command(pipeline, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Runs `qatlora ARGUMENTS` in this process; returns exit code and stderr."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["qatlora", *arguments])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["No recipe", "recipe=NAME", "chat_sft"]),
        (["-m"], ["No recipe"]),
        (["recipe=null"], ["recipe=null", "chat_sft"]),
        (["recipe=chat_stf"], ["recipe=chat_stf", "did you mean chat_sft?", "export_gguf"]),
        (["recip=chat_sft"], ["recipe=NAME"]),
        (["recipe=chat_sft", "train.max_stps=3"], ["train.max_stps", "did you mean max_steps?"]),
        (["recipe=chat_sft", "trian.max_steps=3"], ["did you mean train?"]),
        (["recipe=chat_sft", "sed=3"], ["sed", "did you mean seed?"]),
        (["recipe=chat_sft", "base=gemma3_27m"], ["base=gemma3_27m", "did you mean gemma3_270m?"]),
        (["recipe=chat_sft", "base=null"], ["base=null", "smollm2_135m"]),
        (["recipe=chat_sft", "storage=q8"], ["storage=q8", "bf16, nf4, q4_0"]),
        (["recipe=chat_sft", "storage.kind=q8"], ["storage.kind", "nf4, q4_0, bf16"]),
        (
            ["recipe=chat_sft", "train.max_steps=many"],
            ["train.max_steps", "many", "--cfg job"],
        ),
        (["recipe=chat_sft", "+train.speed=9"], ["train.speed", "no such setting"]),
        (["recipe=chat_sft", "adapter.rank=0"], ["adapter.rank=0", "at least 1"]),
        (["recipe=chat_sft", "adapter.rank=8,16"], ["adapter.rank=8,16", "--multirun"]),
        (["recipe=chat_sft", "--train.max_steps=5"], ["--train.max_steps=5", "without dashes"]),
        (["recipe=chat_sft", "seed"], ["'seed'", "KEY=VALUE"]),
        (["recipe=chat_sft", "base.path=no/such"], ["no/such", "no such file"]),
        (["recipe=merge"], ["adapter.path=RUN_FOLDER/adapter"]),
        (["recipe=benchmark", "benchmark.methods=[steps]"], ["benchmark.methods", "steps_q4_0"]),
        (["recipe=benchmark", "benchmark.suite=sped"], ["benchmark.suite", "speed, adapters"]),
        (["-m", "recipe=chat_sft", "storage=nf4,q9"], ["storage=q9", "q4_0"]),
        (["-m", "recipe=chat_sft", "hydra/launcher=slurm"], ["hydra/launcher=slurm", "submitit"]),
    ],
)
def test_a_typo_fails_at_once_in_one_paragraph_that_names_key_and_choices(
    command, pipeline, arguments, words
):
    exit_code, message = command(*arguments)
    assert exit_code == 2
    assert message.startswith("qatlora: ")
    assert message.count("\n") == 1
    assert all(word in message for word in words)
    assert pipeline.runs == []


def test_a_refused_run_leaves_no_run_folder(command, tmp_path):
    command("recipe=chat_sft", "adapter.rank=0", "run_dir=mine/run")
    assert not (tmp_path / "mine" / "run").exists()


def test_the_traceback_is_shown_when_asked_for(command, monkeypatch):
    monkeypatch.setenv("QATLORA_TRACEBACK", "1")
    _, message = command("recipe=chat_sft", "adapter.rank=0")
    assert message.startswith("Traceback")
    assert "qatlora: adapter.rank=0" in message


def test_the_pipeline_gets_the_settings_and_a_run_folder_named_after_the_recipe(
    command, pipeline, tmp_path
):
    assert command("recipe=chat_sft", "train.max_steps=7", "storage=q4_0") == (0, "")
    (settings,) = pipeline.runs
    assert (settings.train.max_steps, settings.storage.kind.name) == (7, "q4_0")
    assert Path(settings.run_dir).parent == tmp_path / "runs" / "chat_sft"


def test_hydra_writes_nothing_into_the_current_or_the_run_folder(command, tmp_path):
    command("recipe=chat_sft", "run_dir=out")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out"]


def test_paths_are_read_from_the_current_folder_which_the_run_keeps(command, pipeline, tmp_path):
    (tmp_path / "model").mkdir()
    pipeline.fails_with = lambda cfg: None if Path.cwd() == tmp_path else RuntimeError("moved")
    assert command("recipe=chat_sft", "base.path=model")[0] == 0
    assert pipeline.runs[0].base.path == str(tmp_path / "model")


def test_a_tilde_means_the_home_folder(command, pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert command("recipe=chat_sft", "base.path=~/model")[0] == 0
    assert pipeline.runs[0].base.path == str(tmp_path / "model")


def test_an_error_of_the_run_is_one_paragraph_with_its_own_exit_code(command, pipeline):
    pipeline.fails_with = lambda cfg: GuardFailed("identity: 3 blocks differ,\n  limit 0.")
    assert command("recipe=chat_sft") == (3, "qatlora: identity: 3 blocks differ, limit 0.\n")


def test_a_full_disk_is_one_paragraph(command, pipeline):
    pipeline.fails_with = lambda cfg: OSError(errno.ENOSPC, "No space left on device", "x.gguf")
    exit_code, message = command("recipe=chat_sft")
    assert exit_code == 1
    assert "x.gguf" in message
    assert "run_dir=FOLDER" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_a_run_folder_that_is_a_file_is_one_paragraph(command, tmp_path, sweep):
    (tmp_path / "taken").touch()
    exit_code, message = command(*sweep, "recipe=chat_sft", "run_dir=taken")
    assert exit_code == 1
    assert "taken is a file" in message
    assert message.count("\n") == 1


def test_a_folder_that_is_in_the_way_of_the_code_is_a_bug(command, pipeline, tmp_path):
    pipeline.fails_with = lambda cfg: FileExistsError(17, "File exists", str(tmp_path))
    with pytest.raises(FileExistsError):
        command("recipe=chat_sft")


def test_a_bug_keeps_its_traceback(command, pipeline):
    pipeline.fails_with = lambda cfg: ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        command("recipe=chat_sft")


def test_ctrl_c_ends_without_a_traceback(command, pipeline):
    pipeline.fails_with = lambda cfg: KeyboardInterrupt()
    exit_code, message = command("recipe=chat_sft")
    assert exit_code == 128 + signal.SIGINT
    assert message.startswith("qatlora: Interrupted")


def test_a_sweep_runs_every_combination_in_a_folder_of_its_own(command, pipeline, tmp_path):
    exit_code, _ = command("-m", "recipe=chat_sft", "adapter.rank=8,16", "run_dir=sweep")
    assert exit_code == 0
    assert [run.adapter.rank for run in pipeline.runs] == [8, 16]
    assert [run.run_dir for run in pipeline.runs] == [str(tmp_path / f"sweep/{n}") for n in (0, 1)]


def test_a_failed_run_of_a_sweep_is_named_and_does_not_stop_the_others(command, pipeline):
    pipeline.fails_with = lambda cfg: GuardFailed("drift.") if cfg.adapter.rank == 8 else None
    exit_code, message = command("-m", "recipe=chat_sft", "adapter.rank=8,16")
    assert exit_code != 0
    assert "run 0 (adapter.rank=8,recipe=chat_sft): drift." in message
    assert "1 of the 2 runs of the sweep failed" in message
    assert [run.adapter.rank for run in pipeline.runs] == [8, 16]


def test_a_bug_in_one_run_of_a_sweep_shows_its_traceback_and_does_not_stop_the_others(
    command, pipeline
):
    pipeline.fails_with = lambda cfg: ZeroDivisionError("a bug") if cfg.seed == 1 else None
    exit_code, message = command("-m", "recipe=chat_sft", "seed=1,2")
    assert exit_code == 1
    assert "Traceback" in message
    assert [run.seed for run in pipeline.runs] == [1, 2]


def test_the_table_of_a_sweep_has_the_settings_that_differ_and_the_reasons(
    command, pipeline, tmp_path
):
    pipeline.fails_with = lambda cfg: GuardFailed("drift, a lot.") if cfg.seed == 1 else None
    command("-m", "recipe=chat_sft", "adapter.rank=8,16", "seed=1,2", "run_dir=sweep")
    with (tmp_path / "sweep" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["adapter.rank"], row["seed"]) for row in rows] == [
        ("8", "1"), ("8", "2"), ("16", "1"), ("16", "2"),
    ]  # fmt: skip
    assert [row["status"] for row in rows] == ["failed", "finished"] * 2
    assert [row["reason"] for row in rows] == ["drift, a lot.", ""] * 2
    assert "recipe" not in rows[0]
    assert "2 of 4 runs finished" in (tmp_path / "sweep" / "sweep.md").read_text()


def test_an_interrupted_sweep_has_a_table_of_the_runs_that_began(command, pipeline, tmp_path):
    pipeline.fails_with = lambda cfg: KeyboardInterrupt() if cfg.seed == 2 else None
    exit_code, _ = command("-m", "recipe=chat_sft", "seed=1,2,3", "run_dir=sweep")
    assert exit_code == 128 + signal.SIGINT
    with (tmp_path / "sweep" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished", "unfinished"]


def test_a_sweep_in_the_folder_of_an_earlier_one_takes_nothing_over(command, pipeline, tmp_path):
    command("-m", "recipe=chat_sft", "seed=1,2,3", "run_dir=sweep")
    command("-m", "recipe=chat_sft", "seed=4,5", "run_dir=sweep")
    with (tmp_path / "sweep" / "sweep.csv").open(newline="") as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["4", "5"]


def test_a_sweep_that_is_refused_leaves_the_reports_of_the_earlier_one(command, pipeline, tmp_path):
    def report(cfg: RootConfig) -> None:
        (Path(cfg.run_dir) / "report.json").write_text(f'{{"perplexity": {{}}, "{cfg.seed}": 1}}')

    pipeline.fails_with = report
    command("-m", "recipe=chat_sft", "seed=1,2,3", "run_dir=sweep")
    reports = {path: path.read_bytes() for path in (tmp_path / "sweep").rglob("report.json")}
    outcome = (tmp_path / "sweep" / "2" / "outcome.json").read_bytes()
    assert len(reports) == 3
    assert b'"reported": true' in outcome
    pipeline.fails_with = lambda cfg: RunFolderError(f"{cfg.run_dir} holds the run.")
    exit_code, message = command("-m", "recipe=chat_sft", "seed=1,2", "run_dir=sweep")
    assert exit_code == 1
    assert "2 of the 2 runs of the sweep failed" in message
    assert {path: path.read_bytes() for path in reports} == reports
    assert (tmp_path / "sweep" / "2" / "outcome.json").read_bytes() == outcome
    refused = (tmp_path / "sweep" / "0" / "outcome.json").read_text()
    assert '"reported": false' in refused  # the figures beside it are of the earlier run


def test_all_runs_of_a_sweep_share_one_folder_named_after_the_recipe(command, pipeline, tmp_path):
    command("-m", "recipe=chat_sft", "seed=1,2")
    (sweep,) = (tmp_path / "runs" / "chat_sft").iterdir()
    assert {Path(run.run_dir).parent for run in pipeline.runs} == {sweep}


def test_help_lists_recipes_with_purposes_and_groups_with_choices(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qatlora", "--help"])
    main()
    text = capsys.readouterr().out
    assert "chat_sft Fine-tune on chats" in " ".join(text.split())
    assert all(path.stem in text for path in shipped("recipes").glob("*.yaml"))
    groups = text.partition("Groups (GROUP=CHOICE)")[2].splitlines()
    for path in shipped("conf").glob("*/*.yaml"):
        (line,) = (line for line in groups if line.split()[:1] == [path.parent.name])
        assert path.stem in line


@pytest.mark.parametrize("arguments", [["--help"], ["recipe=chat_stf"], ["recipe=chat_sft", "a=1"]])
def test_help_and_typos_are_answered_within_two_seconds_and_without_torch(arguments, tmp_path):
    code = (
        f"import sys; sys.argv = ['qatlora', *{arguments}]\n"
        "from qatlora.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=_environment(), check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert busy_seconds < 2.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_real_process_cleanly(number, tmp_path):
    code = (
        "import sys, time, types\n"
        "module = types.ModuleType('qatlora.pipeline')\n"
        "module.run = lambda cfg: (print('started', flush=True), time.sleep(60))\n"
        "sys.modules['qatlora.pipeline'] = module\n"
        "sys.argv = ['qatlora', 'recipe=chat_sft']\n"
        "from qatlora.__main__ import main\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background lets its children ignore SIGINT.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "started\n"
    time.sleep(0.1)
    process.send_signal(number)
    _, message = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert "Traceback" not in message


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}
