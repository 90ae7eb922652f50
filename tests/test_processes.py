"""torchrun: several processes train as one, the first one writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline_cases import STAGES, write_data

from qatlora import pipeline
from qatlora.__main__ import _check_processes
from qatlora.config import RootConfig, TrainConfig
from qatlora.errors import ConfigError
from qatlora.train.run import fit_to_processes

ROOT = Path(__file__).parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SETTINGS = [
    "recipe=chat_sft", "base=local", "data=jsonl", "data.max_length_tokens=128",
    "data.eval_tokens=64", "data.num_prompts=1", "train.device=cpu", "train.max_steps=4",
    "train.rows_per_step=4", "train.micro_batch_rows=2", "train.save_steps=2",
    "train.learning_rate=2e-2", "evaluate.sample_max_new_tokens=4",
    f"stages=[{','.join(STAGES[: STAGES.index('save_adapter') + 1])},report]",
]  # fmt: skip


def run(folder: Path, base: Path, launcher: list[str]) -> Path:
    """Run in `folder` without a run_dir; the one run folder that there is then."""
    data = write_data(folder)
    done = subprocess.run(
        [
            *(sys.executable, *launcher, "-m", "qatlora", *SETTINGS, f"base.path={base}"),
            *(f"data.path={data['chats']}", f"data.general={data['text']}"),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (run_dir,) = (folder / "runs" / "chat_sft").iterdir()
    return run_dir


@pytest.mark.slow
def test_two_processes_make_the_adapter_of_one_and_one_run_folder(
    tiny_gemma3_folder: Path, tmp_path: Path
) -> None:
    folders = []
    for name, launcher in (("one", []), ("two", TORCHRUN)):
        (tmp_path / name).mkdir()
        folders.append(run(tmp_path / name, tiny_gemma3_folder, launcher))
    # To the bit: of a step's two micro-batches there is one sum, whoever computes them.
    logs = [(folder / "train_log.jsonl").read_text().splitlines() for folder in folders]
    terms = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in log]
        for log in logs
    ]
    assert len(terms[0]) == 4
    assert terms[0] == terms[1]
    adapters = [(folder / "adapter" / "adapter_model.safetensors") for folder in folders]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]


@pytest.fixture
def three_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")


@pytest.mark.usefixtures("three_processes")
def test_what_several_processes_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="in 3 processes: every process must get the same"):
        fit_to_processes(TrainConfig(rows_per_step=4, micro_batch_rows=2))
    assert fit_to_processes(TrainConfig(rows_per_step=6, micro_batch_rows=6)).micro_batch_rows == 2
    with pytest.raises(ConfigError, match="-m in 3 processes"):
        _check_processes(["-m", "recipe=chat_sft"])
    merge = RootConfig(stages=["preflight", "load_base", "report"])
    merge.card.name = "merge"
    with pytest.raises(ConfigError, match="recipe=merge in 3 processes"):
        pipeline.run(merge)
