"""The suite speed on a tiny model: real processes, few steps."""

import dataclasses
from pathlib import Path

import pytest
import torch

from qatlora.base.layout import find_layout
from qatlora.base.source import find_source
from qatlora.benchmark.build import Ground
from qatlora.benchmark.speed import Worker, measure_speed
from qatlora.benchmark.worker import Job
from qatlora.config import (
    AdapterConfig,
    BaseConfig,
    BenchmarkConfig,
    BenchmarkMethod,
    TrainConfig,
)
from qatlora.errors import BenchmarkError

METHODS = (BenchmarkMethod.peft_nf4, BenchmarkMethod.both_q4_0)


def ground(folder: Path) -> Ground:
    base = BaseConfig(path=str(folder), name="tiny")
    source = find_source(base)
    adapter = AdapterConfig(rank=4, alpha=8.0)
    layout = find_layout(source, base)
    return Ground(source, layout, adapter, "q8_0", torch.device("cpu"), torch.bfloat16)


@pytest.mark.slow
def test_methods_take_turns_and_are_compared_with_plain_peft(tiny_llama_folder: Path) -> None:
    settings = BenchmarkConfig(tokens_per_step=[32, 64], rounds=2, warmup_rounds=1)
    steps: list[int] = []
    result = measure_speed(
        METHODS,
        ground(tiny_llama_folder),
        settings,
        TrainConfig(keep_blocks=False),
        row_tokens=32,
        seed=0,
        on_step=steps.append,
    )
    assert sum(steps) == 2 * 2 * 3
    cells = [(row.method, row.tokens_per_step) for row in result.rows]
    assert cells == [(m.name, n) for n in (32, 64) for m in METHODS]
    for row in result.rows:
        assert 0 < row.seconds_min <= row.seconds_median <= row.seconds_max
        assert 0 < row.peak_bytes < row.peak_process_bytes
        if row.method == "peft_nf4":
            assert row.time_ratio == row.memory_ratio == row.memory_ratio_of_storage == 1
        else:
            assert row.memory_ratio_of_storage > 1


@pytest.mark.slow
def test_a_worker_that_fails_says_which_method_and_why(tiny_llama_folder: Path) -> None:
    base = ground(tiny_llama_folder)
    broken = dataclasses.replace(base.source, folder=tiny_llama_folder / "gone")
    job = Job(
        METHODS[1],
        dataclasses.replace(base, source=broken),
        TrainConfig(),
        32,
        seed=0,
        num_threads=1,
    )
    worker = Worker(job)
    with pytest.raises(BenchmarkError, match="both_q4_0 failed.*gone"):
        worker.wait_until_ready()
    worker.close()


def test_a_worker_that_is_killed_says_so(tiny_llama_folder: Path) -> None:
    worker = Worker(Job(METHODS[0], ground(tiny_llama_folder), TrainConfig(), 32, 0, 1))
    worker._process.kill()
    with pytest.raises(BenchmarkError, match="peft_nf4 ended with exit code -9"):
        worker.wait_until_ready()
