"""What the trainer is told."""

from pathlib import Path

from qatlora.config import LoggingConfig, TrainConfig
from qatlora.train.run import _arguments


def test_no_process_sends_its_base_to_the_others(tmp_path: Path) -> None:
    arguments = _arguments(TrainConfig(device="cpu"), LoggingConfig(), tmp_path, 0, bf16=False)
    assert arguments.ddp_broadcast_buffers is False
