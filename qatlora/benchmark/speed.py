"""Step time and peak memory of several methods on one base, taking turns.

In a round every method trains one optimizer step on the same number of tokens, one after the other;
a ratio is the median over the rounds of (method / baseline) of the same round, so a slow moment of
the machine hits both sides. Each method lives in a process of its own (`worker`), all of them at
once: where memory is short, compare fewer (benchmark.methods).
"""

import contextlib
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from qatlora.base.layout import Layout
from qatlora.benchmark.build import Ground
from qatlora.benchmark.methods import BASELINE, METHODS
from qatlora.benchmark.worker import FORGET_PEAK, Failed, Job, Peak, Ready, Timing, serve
from qatlora.config import BenchmarkConfig, BenchmarkMethod, TrainConfig
from qatlora.errors import BenchmarkError
from qatlora.report.results_benchmark import SpeedResult, SpeedRow

# Bits per weight of what a storage keeps of a Q4_0 tensor; NF4 of plain PEFT has no steps.
_STORED_BITS = {"q4_0": 4.5, "nf4": 4.63, "bf16": 16.5}
_PLAIN_BITS = {"nf4": 4.13, "bf16": 16.0}

Answer = TypeVar("Answer", Ready, Timing, Peak)


class Worker:
    """The parent's end of one method's process."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share the parent's memory
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()
        self._name = job.method.name

    def wait_until_ready(self) -> Ready:
        """Block until the model is built."""
        return self._receive(Ready)

    def step(self, num_tokens: int) -> Timing:
        """Let it train one step."""
        self._connection.send(num_tokens)
        return self._receive(Timing)

    def peak(self) -> Peak:
        """Its peak memory since the last call."""
        self._connection.send(FORGET_PEAK)
        return self._receive(Peak)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self, kind: type[Answer]) -> Answer:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise BenchmarkError(
                f"The process of {self._name} ended with exit code {self._process.exitcode} while "
                "it was measured; -9 is what a machine without enough memory does. Compare fewer "
                "methods at a time (benchmark.methods), or take a smaller base."
            ) from None
        if isinstance(answer, Failed):
            reason = answer.text.strip().splitlines()[-1]
            raise BenchmarkError(
                f"{self._name} failed while it was measured: {reason}. Leave it out of "
                "benchmark.methods, or look at its traceback with QATLORA_TRACEBACK=1."
            ) from RuntimeError(answer.text)
        assert isinstance(answer, kind)
        return answer


def measure_speed(
    methods: Sequence[BenchmarkMethod],
    ground: Ground,
    settings: BenchmarkConfig,
    train: TrainConfig,
    *,
    row_tokens: int,
    seed: int,
    on_step: Callable[[int], None],
) -> SpeedResult:
    """Time the methods in turns and read their peaks.

    Args:
        methods: which ones; ratios need `BASELINE` among them.
        ground: the base below all of them.
        settings: sizes and rounds.
        train: optimizer, gradient checkpointing, keep_blocks.
        row_tokens: length of a row; a step has a whole number of them.
        seed: of adapters and tokens.
        on_step: called with 1 after each step.

    Raises:
        BenchmarkError: a method's process failed.
    """
    threads = torch.get_num_threads()
    jobs = [Job(method, ground, train, row_tokens, seed, threads) for method in methods]
    rows: list[SpeedRow] = []
    with _workers(jobs) as workers:
        ready = {method: workers[method].wait_until_ready() for method in methods}
        for num_tokens in settings.tokens_per_step:
            timings: dict[BenchmarkMethod, list[Timing]] = {method: [] for method in methods}
            for _ in range(settings.warmup_rounds + settings.rounds):
                for method in methods:
                    timings[method].append(workers[method].step(num_tokens))
                    on_step(1)
            peaks = {method: workers[method].peak() for method in methods}
            kept = {
                m: [t.seconds for t in all_[settings.warmup_rounds :]]
                for m, all_ in timings.items()
            }
            rows += [
                _row(method, num_tokens, kept, peaks, ready[method], ground.layout)
                for method in methods
            ]
    return SpeedResult(
        device=_device_name(ground.device),
        threads=threads,
        rounds=settings.rounds,
        row_tokens=row_tokens,
        keep_blocks=train.keep_blocks,
        gradient_checkpointing=train.gradient_checkpointing,
        baseline=BASELINE.name,
        rows=rows,
    )


@contextlib.contextmanager
def _workers(jobs: Sequence[Job]) -> Iterator[dict[BenchmarkMethod, Worker]]:
    workers: dict[BenchmarkMethod, Worker] = {}
    try:
        for job in jobs:
            workers[job.method] = Worker(job)
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def _row(
    method: BenchmarkMethod,
    num_tokens: int,
    seconds: dict[BenchmarkMethod, list[float]],
    peaks: dict[BenchmarkMethod, Peak],
    ready: Ready,
    layout: Layout,
) -> SpeedRow:
    own, peak = seconds[method], peaks[method]
    ratio = memory_ratio = memory_limit = None
    if BASELINE in seconds:
        ratio = statistics.median(a / b for a, b in zip(own, seconds[BASELINE], strict=True))
        memory_ratio = peak.method_bytes / peaks[BASELINE].method_bytes
        extra_bits = _stored_bits(method) - _stored_bits(BASELINE)
        memory_limit = 1 + extra_bits * layout.num_grid_weights / 8 / peaks[BASELINE].method_bytes
    return SpeedRow(
        method=method.name,
        label=METHODS[method].label,
        storage=METHODS[method].storage,
        tokens_per_step=num_tokens,
        seconds_median=statistics.median(own),
        seconds_min=min(own),
        seconds_max=max(own),
        time_ratio=ratio,
        peak_bytes=peak.method_bytes,
        peak_process_bytes=peak.process_bytes,
        memory_ratio=memory_ratio,
        memory_ratio_of_storage=memory_limit,
        trainable_parameters=ready.trainable_parameters,
    )


def _stored_bits(method: BenchmarkMethod) -> float:
    table = _PLAIN_BITS if METHODS[method].kind is None else _STORED_BITS
    return table[METHODS[method].storage]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def num_steps(methods: Sequence[BenchmarkMethod], settings: BenchmarkConfig) -> int:
    """Optimizer steps of the whole measurement."""
    rounds = settings.warmup_rounds + settings.rounds
    return len(methods) * len(settings.tokens_per_step) * rounds
