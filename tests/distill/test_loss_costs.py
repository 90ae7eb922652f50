"""Memory and speed of chunked_loss on the vocabulary of Gemma."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import qatlora
from qatlora.distill import Divergence, LmHead, LossSettings, TeacherStates, chunked_loss

MEASURE_MEMORY = """
import json, resource, torch
from qatlora.distill import Divergence, LmHead, LossSettings, TeacherStates, chunked_loss
torch.set_num_threads(2)
tokens, words, width = 512, 262_144, 32
head = LmHead(torch.full((words, width), 0.01, dtype=torch.bfloat16))
hidden = torch.randn(tokens, width, dtype=torch.bfloat16).requires_grad_()
weight = torch.ones(tokens)
def run(count):
    loss = chunked_loss(hidden[:count], head, torch.zeros(count, dtype=torch.int64),
        teacher=TeacherStates(hidden.detach()[:count], head), divergence=Divergence(),
        token_ce_weight=weight[:count], token_kl_weight=weight[:count], settings=LossSettings())
    loss.total.backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(tokens)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"extra_bytes": (after - before) * 1024}))
"""


def test_extra_memory_stays_below_256_mb():
    clone = Path(qatlora.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY],
        capture_output=True,
        text=True,
        check=True,
        cwd=clone,
    )
    assert json.loads(result.stdout)["extra_bytes"] < 256e6


@pytest.mark.slow
def test_loss_is_not_slower_than_the_naive_one_in_bf16():
    tokens, words, width = 128, 262_144, 640
    weight = torch.empty(words, width, dtype=torch.bfloat16).normal_(std=0.05)
    student = torch.randn(tokens, width, dtype=torch.bfloat16)
    teacher = (student + 0.1 * torch.randn(tokens, width)).bfloat16()
    labels = torch.randint(0, words, (tokens,))
    head, ones = LmHead(weight), torch.ones(tokens)

    def naive() -> None:
        hidden = student.clone().requires_grad_()
        log_q = torch.log_softmax((hidden @ weight.T).float(), -1)
        with torch.no_grad():
            log_p = torch.log_softmax((teacher @ weight.T).float(), -1)
        kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
        (kl + torch.nn.functional.nll_loss(log_q, labels, reduction="sum")).backward()

    def chunked() -> None:
        chunked_loss(
            student.clone().requires_grad_(),
            head,
            labels,
            teacher=TeacherStates(teacher, head),
            divergence=Divergence(),
            token_ce_weight=ones,
            token_kl_weight=ones,
            settings=LossSettings(),
        ).total.backward()

    seconds: dict[str, list[float]] = {"naive": [], "chunked": []}
    for _ in range(7):
        for name, run in (("naive", naive), ("chunked", chunked)):
            start = time.process_time()  # of the CPU: other jobs hardly show in it
            run()
            seconds[name].append(time.process_time() - start)
    assert statistics.median(seconds["chunked"]) <= statistics.median(seconds["naive"])
