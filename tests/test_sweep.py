"""Sweeps of real runs on tiny models: the table's figures, launchers, one base for all runs."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline_cases import write_data
from test_config import compose

from qatlora.paths import shipped

ROOT = Path(__file__).parents[1]
LAUNCHERS = sorted(path.stem for path in (shipped("conf") / "hydra" / "launcher").glob("*.yaml"))


def sweep(folder: Path, *arguments: str) -> tuple[int, str, list[dict[str, str]]]:
    """Exit code, stderr and the table of `python -m qatlora -m ARGUMENTS run_dir=FOLDER`."""
    done = subprocess.run(
        [sys.executable, "-m", "qatlora", "-m", *arguments, f"run_dir={folder}"],
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (folder / "sweep.csv").is_file(), done.stderr
    with (folder / "sweep.csv").open(newline="") as file:
        return done.returncode, done.stderr, list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_a_sweep_leaves_one_table_with_the_figures_of_each_run_failed_or_not(
    tiny_gemma3_folder: Path, tmp_path: Path
) -> None:
    data = write_data(tmp_path)
    exit_code, message, rows = sweep(
        tmp_path / "sweep",
        "recipe=chat_sft", f"base.path={tiny_gemma3_folder}",
        "data=jsonl", f"data.path={data['chats']}", f"data.general={data['text']}",
        "data.max_length_tokens=128", "data.eval_tokens=64", "data.num_prompts=0",
        "train.max_steps=2", "train.learning_rate=2e-2", "logging.progress_bars=false",
        "guard.require_effect=false",
        "guard.drift_kld_increase_max_nats=10,-10",
    )  # fmt: skip
    assert exit_code == 1
    assert "1 of the 2 runs" in message
    assert [row["status"] for row in rows] == ["finished", "failed"]
    assert [row["gates_failed"] for row in rows] == ["", "drift"]
    for number, row in enumerate(rows):
        report = json.loads((tmp_path / "sweep" / str(number) / "report.json").read_text())
        assert float(row["task_perplexity"]) == report["perplexity"]["task"]["merged"]
        assert float(row["general_kld_nats"]) == report["kld"]["general"]["merged"]["mean"]
        assert float(row["base_task_perplexity"]) == report["perplexity"]["task"]["base"]
    assert rows[0]["task_perplexity"] == rows[1]["task_perplexity"]  # one process, same seed
    assert (tmp_path / "sweep" / "sweep.png").is_file()
    text = (tmp_path / "sweep" / "sweep.md").read_text()
    assert "guard.drift" in text
    assert "- run 1: " in text


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("joblib") is None, reason="needs the extra joblib: qatlora[joblib]"
)
def test_joblib_runs_a_sweep_in_processes_of_its_own(
    tiny_gemma3_folder: Path, tmp_path: Path
) -> None:
    data = write_data(tmp_path)
    exit_code, message, rows = sweep(
        tmp_path / "sweep",
        "hydra/launcher=joblib", "recipe=data_preview", f"base.path={tiny_gemma3_folder}",
        "data=jsonl", f"data.path={data['chats']}", "data.max_length_tokens=8,128",
        "logging.progress_bars=false",
    )  # fmt: skip
    assert exit_code == 1
    assert [row["status"] for row in rows] == ["failed", "finished"]
    assert "Raise data.max_length_tokens (it is 8)" in rows[0]["reason"]
    assert rows[0]["reason"] in " ".join(message.split())
    report = json.loads((tmp_path / "sweep" / "1" / "report.json").read_text())
    assert report["preview"]["rows"] == 60


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_composes_without_its_package(launcher: str) -> None:
    cfg = compose("recipe=chat_sft", f"hydra/launcher={launcher}", keep_hydra=True)
    assert cfg.hydra.launcher._target_.startswith("hydra_plugins.hydra_")
    path = shipped("conf") / "hydra" / "launcher" / f"{launcher}.yaml"
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    launcher: str, tmp_path: Path
) -> None:
    package = f"hydra_{launcher.partition('_')[0]}_launcher"
    code = (
        "import importlib.util as util, sys\n"
        "real = util.find_spec\n"
        f"util.find_spec = lambda name: None if name.endswith('{package}') else real(name)\n"
        f"sys.argv = ['qatlora', '-m', 'recipe=chat_sft', 'hydra/launcher={launcher}']\n"
        "from qatlora.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"pip install 'qatlora[{launcher.partition('_')[0]}]'" in done.stderr
    assert done.stderr.count("\n") == 1
