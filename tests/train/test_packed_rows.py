"""Packed rows in a model: each token has the loss that it has in a row of its own."""

import pytest
import torch
from pipeline_cases import settings, write_data
from transformers import AutoModelForCausalLM

from qatlora import pipeline
from qatlora.data.packing import packed
from qatlora.data.rows import IGNORED, Row
from qatlora.evaluate import final_hidden_states
from qatlora.train.teachers import context_of
from qatlora.train.trainer import RowCollator, training_record

MAX_DIFFERENCE_NATS = 1e-5
"""fp32; sums in another order, nothing else."""


def conversations() -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    lengths = (70, 5, 33, 48, 21, 64, 9)  # one is longer than the sliding window of 32 tokens
    ids = [torch.randint(5, 300, (length,), generator=generator).tolist() for length in lengths]
    return [Row(each, [IGNORED] * 3 + each[3:], "chat") for each in ids]


def losses(model, rows, **changes) -> dict[tuple[int, ...], float]:
    """Token and what stands before it in its conversation -> cross-entropy in nats."""
    batch = RowCollator(0)([training_record(row) for row in rows]) | changes
    with torch.no_grad():
        logits = model.lm_head(final_hidden_states(model, **context_of(batch)))
    found = {}
    for row, scores in zip(rows, logits, strict=True):
        for end, label in enumerate(row.labels):
            if label != IGNORED:
                start = max(first for first in row.starts if first < end)
                nll = torch.nn.functional.cross_entropy(scores[end - 1], torch.tensor(label))
                found[tuple(row.input_ids[start : end + 1])] = nll.item()
    return found


@pytest.mark.parametrize("folder", ["tiny_gemma3_folder", "tiny_llama_folder"])
def test_losses_per_token_are_those_of_unpacked_rows(folder, request):
    path = request.getfixturevalue(folder)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rows = conversations()
    dense = list(packed(rows, 128))
    assert len(dense) < len(rows) / 2
    alone, together = losses(model, rows), losses(model, dense)
    assert alone.keys() == together.keys()
    assert max(abs(alone[key] - together[key]) for key in alone) < MAX_DIFFERENCE_NATS

    blind = losses(model, dense, position_ids=None)  # one long conversation: what must not happen
    assert max(abs(alone[key] - blind[key]) for key in alone) > 0.01


def test_rows_of_one_conversation_each_are_batched_as_ever():
    batch = RowCollator(0)([training_record(row) for row in conversations()[:2]])
    assert "position_ids" not in batch
    assert batch["attention_mask"].sum(1).tolist() == [70, 5]


def test_positions_count_from_the_beginning_of_each_conversation():
    rows = list(packed(conversations()[1:4], 128)) + conversations()[:1]
    batch = RowCollator(0)([training_record(row) for row in rows])
    expected = [*range(5), *range(33), *range(48)]
    assert batch["position_ids"][0].tolist() == expected
    assert batch["position_ids"][1].tolist() == [*range(70), *range(16)]


def test_a_run_trains_on_packed_rows_under_its_teacher(tiny_gemma3_folder, tmp_path):
    data = write_data(tmp_path)
    tokens = {}
    for packing in (False, True):
        cfg = settings(tiny_gemma3_folder, data, tmp_path / str(packing))
        cfg.stages = ["preflight", "load_data", "load_base", "attach", "train"]
        cfg.data.packing, cfg.train.max_steps, cfg.data.max_length_tokens = packing, 2, 256
        report = pipeline.run(cfg)
        assert all(point.kl > 0 for point in report.train.history)
        tokens[packing] = report.data_notes["train"]["scored_tokens"]
        assert report.train.tokens == tokens[packing]
    assert tokens[True] > tokens[False]
