"""A step's loss and update do not depend on how its rows are cut over batches and processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import split_cases
import torch

from qatlora.config import TrainConfig
from qatlora.errors import ConfigError
from qatlora.train.run import _micro_batches_per_process

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def whole(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    split_cases.trained(tiny_llama_folder, folder, split_cases.ROWS_PER_STEP)
    return folder


def require_equal(run_dir: Path, whole: Path) -> None:
    """Terms of the loss, and the parameters after the steps, but for the order of sums."""
    lines = [(folder / "train_log.jsonl").read_text().splitlines() for folder in (run_dir, whole)]
    assert len(lines[0]) == len(lines[1]) == split_cases.NUM_STEPS
    for found, wanted in (map(json.loads, pair) for pair in zip(*lines, strict=True)):
        for term in ("loss", "ce", "kl", "general_kl"):
            assert found[term] == pytest.approx(wanted[term], rel=1e-5)
    found, wanted = split_cases.parameters(run_dir), split_cases.parameters(whole)
    # Adam divides by the gradient's own size: where that is nearly 0, rounding decides.
    apart = torch.cat([(found[name] - wanted[name]).abs().flatten() for name in wanted])
    assert (apart > 1e-5).float().mean() < 1e-3


@pytest.mark.parametrize("micro_batch_rows", [1, 2])
def test_gradient_accumulation_changes_rounding_only(
    micro_batch_rows: int, whole: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    split_cases.trained(tiny_llama_folder, tmp_path, micro_batch_rows)
    require_equal(tmp_path, whole)


@pytest.mark.slow
def test_two_processes_train_as_one(whole: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        str(TESTS / "train" / "split_cases.py"), str(tmp_path), str(tiny_llama_folder), "1",
    ]  # fmt: skip
    path = os.pathsep.join(map(str, [TESTS.parent, TESTS, *sys.path]))
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    require_equal(tmp_path, whole)


def test_rows_that_cannot_be_shared_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="in 3 processes"):
        _micro_batches_per_process(TrainConfig(rows_per_step=4, micro_batch_rows=2))
