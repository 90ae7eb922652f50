"""torchrun: several processes train as one, the first one writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from pipeline_cases import STAGES, write_data

from qatlora import pipeline
from qatlora.__main__ import _check_processes
from qatlora.config import RootConfig, TrainConfig
from qatlora.errors import ConfigError
from qatlora.train.run import fit_to_processes

ROOT = Path(__file__).parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file",
          str(ROOT / "docs" / "accelerate" / "two_processes_cpu.yaml")]  # fmt: skip
SETTINGS = [
    "recipe=chat_sft", "base=local", "data=jsonl", "data.max_length_tokens=128",
    "data.eval_tokens=64", "data.num_prompts=1", "train.device=cpu", "train.max_steps=4",
    "train.rows_per_step=4", "train.save_steps=2",
    "train.learning_rate=2e-2", "evaluate.sample_max_new_tokens=4",
    f"stages=[{','.join(STAGES[: STAGES.index('save_adapter') + 1])},report]",
]  # fmt: skip


def run(folder: Path, base: Path, launcher: list[str], *settings: str) -> Path:
    """Run in `folder` without a run_dir; the one run folder that there is then."""
    data = write_data(folder)
    done = subprocess.run(
        [
            *(sys.executable, *launcher, "-m", "qatlora", *SETTINGS, *settings),
            f"base.path={base}",
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


ACCELERATE = ROOT / "docs" / "accelerate"


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_starts_several_processes_from_our_files(path: Path) -> None:
    """As `accelerate launch` does: it reads the file, and chooses the launcher by it."""
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(path), "-m", "qatlora", "recipe=chat_sft"])
    args, defaults, _ = _validate_launch_command(args)
    assert args.num_processes >= 2
    assert args.multi_gpu  # else one process is started, without a word
    assert not args.use_fsdp
    assert not args.cpu
    assert defaults.use_cpu == ("cpu" in path.stem)
    assert (args.module, args.training_script) == (True, "qatlora")


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_a_launch_that_would_shard_the_base_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    cfg = RootConfig(stages=["preflight"])
    with pytest.raises(ConfigError, match=rf"{name}=true.*distributed_type: MULTI_GPU"):
        pipeline.run(cfg)


@pytest.mark.slow
def test_two_processes_make_the_adapter_of_one_and_one_run_folder(
    tiny_gemma3_folder: Path, tmp_path: Path
) -> None:
    launchers = {"one": ([], 2), "two": (TORCHRUN, 4), "accelerate": (LAUNCH, 4)}
    folders = []
    for name, (launcher, rows) in launchers.items():
        (tmp_path / name).mkdir()
        micro_batch = f"train.micro_batch_rows={rows}"  # four rows of two processes: two each
        folders.append(run(tmp_path / name, tiny_gemma3_folder, launcher, micro_batch))
        config = json.loads((folders[-1] / "config.json").read_text("utf-8"))
        assert config["train"]["micro_batch_rows"] == 2
    # To the bit: of a step's two micro-batches there is one sum, whoever computes them.
    logs = [(folder / "train_log.jsonl").read_text().splitlines() for folder in folders]
    terms = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in log]
        for log in logs
    ]
    assert len(terms[0]) == 4
    adapters = [(folder / "adapter" / "adapter_model.safetensors") for folder in folders]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    for other in (1, 2):
        assert terms[0] == terms[other]
        assert adapters[0].read_bytes() == adapters[other].read_bytes()
        assert names[0] == names[other]


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
