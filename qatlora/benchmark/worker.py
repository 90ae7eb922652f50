"""One method in a process of its own: it trains single steps when it is told to.

A process per method gives each its own high-water mark of memory, and the parent can let them take
turns step by step, so that a machine that slows down does so for all of them.

    parent            worker
            <- Ready  model built
    num_tokens ->
            <- Timing of one optimizer step on that many tokens
    "forget_peak" ->
            <- Peak   what it was until now; counting starts anew
    None ->           ends
"""

import gc
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from qatlora.benchmark.build import Ground, build
from qatlora.benchmark.methods import METHODS
from qatlora.config import BenchmarkMethod, TrainConfig
from qatlora.distill import Divergence, LmHead, LossSettings, chunked_loss
from qatlora.evaluate import final_hidden_states
from qatlora.memory import forget_peak_rss, peak_rss_since_forgotten, resident_bytes
from qatlora.quiet import quiet_libraries
from qatlora.train.optimizers import build_optimizer

FORGET_PEAK = "forget_peak"


@dataclass(frozen=True)
class Job:
    """What a worker is to time.

    Attributes:
        method: which one.
        ground: the base below it.
        train: rates of the optimizer, clipping, gradient checkpointing, keep_blocks.
        row_tokens: length of a row.
        seed: of the adapter and the tokens.
        num_threads: of torch on the CPU.
    """

    method: BenchmarkMethod
    ground: Ground
    train: TrainConfig
    row_tokens: int
    seed: int
    num_threads: int


@dataclass(frozen=True)
class Ready:
    """The model is built."""

    trainable_parameters: int


@dataclass(frozen=True)
class Timing:
    """One optimizer step: forward, loss, backward, clipping, update."""

    seconds: float
    loss: float


@dataclass(frozen=True)
class Peak:
    """Largest memory since the last time it was asked for.

    Attributes:
        method_bytes: of the model and its training: on a CPU the resident set less that of the
            process before the model was loaded, on CUDA what the allocator gave out.
        process_bytes: on a CPU the whole resident set; on CUDA the same as method_bytes.
    """

    method_bytes: int
    process_bytes: int


@dataclass(frozen=True)
class Failed:
    """The worker's traceback."""

    text: str


def serve(connection: Connection, job: Job) -> None:
    """Entry of the worker's process."""
    quiet_libraries()
    try:
        torch.set_num_threads(job.num_threads)
        stand = _Stand(job)
        connection.send(Ready(stand.num_trainable))
        while (command := connection.recv()) is not None:
            connection.send(stand.peak() if command == FORGET_PEAK else stand.step(command))
    except Exception:
        connection.send(Failed(traceback.format_exc()))


class _Stand:
    """A model, its optimizer and random tokens."""

    def __init__(self, job: Job) -> None:
        self._job, self._device = job, job.ground.device
        self._start_bytes = resident_bytes()
        adapted = build(METHODS[job.method], job.ground, job.seed)
        adapted.keep_blocks(job.train.keep_blocks)
        self.num_trainable = adapted.num_trainable
        self._model = adapted.model.train()
        if job.train.gradient_checkpointing:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        self._optimizer = build_optimizer(adapted.parameter_groups(), job.train, job.seed)
        self._head = LmHead.of(self._model).to(job.ground.compute_dtype)
        self._settings = LossSettings(compute_dtype=job.ground.compute_dtype)
        self._vocab_size = self._head.vocab_size
        self.peak()

    def step(self, num_tokens: int) -> Timing:
        """One optimizer step, timed from the tokens to the finished update."""
        rows = num_tokens // self._job.row_tokens
        generator = torch.Generator().manual_seed(self._job.seed)
        shape = (rows, self._job.row_tokens)
        ids = torch.randint(self._vocab_size, shape, generator=generator).to(self._device)
        gc.collect()  # not at a random moment of the step
        self._synchronize()
        start = time.perf_counter()
        loss = self._loss(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._job.train.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._synchronize()
        return Timing(time.perf_counter() - start, loss.item())

    def _loss(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy by the training room's own loss, without the logits of the batch."""
        with self._job.ground.autocast():
            hidden = final_hidden_states(self._model, ids)[:, :-1].flatten(0, 1)
        labels = ids[:, 1:].flatten()
        weight = torch.full(labels.shape, 1 / len(labels), device=self._device)
        return chunked_loss(
            hidden,
            self._head,
            labels,
            teacher=None,
            divergence=Divergence(),
            token_ce_weight=weight,
            token_kl_weight=torch.zeros_like(weight),
            settings=self._settings,
        ).total

    def peak(self) -> Peak:
        """Memory since the last call; counting starts anew."""
        if self._device.type == "cuda":
            num_bytes = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            return Peak(num_bytes, num_bytes)
        num_bytes = peak_rss_since_forgotten()
        forget_peak_rss()
        return Peak(num_bytes - self._start_bytes, num_bytes)

    def _synchronize(self) -> Any:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
