"""Plain text of one domain to learn, as rows for the trainer, and what is held out of it.

The held-out rows alternate between `validation`, by which a learning rate is chosen, and `task`,
which is reported; a third text is general and says what was forgotten.
"""

import dataclasses
import random

from transformers import PreTrainedTokenizerBase

from qatlora import registry
from qatlora.data.load import count
from qatlora.data.rows import Batches, Row, Text
from qatlora.data.text import held_out_rows, open_general, replay_rows
from qatlora.errors import DataError


@dataclasses.dataclass(frozen=True)
class DomainSettings:
    """Which texts, and how much of them.

    Attributes:
        domain: name or path of the text to learn.
        general: name or path of the text not to forget; another one.
        max_length_tokens: length of a row.
        num_rows: training rows.
        eval_tokens: scored tokens of each held-out text at most.
    """

    domain: str
    general: str
    max_length_tokens: int
    num_rows: int
    eval_tokens: int


def load_domain(settings: DomainSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> Batches:
    """Training rows in an order drawn from `seed`, and the three held-out texts.

    Raises:
        DataError: a text is too short or cannot be read.
    """
    domain = open_general(settings.domain, registry.locate)
    general = open_general(settings.general, registry.locate)
    length = settings.max_length_tokens
    rng = random.Random(f"{seed} domain")
    train = replay_rows(domain, tokenizer, length, settings.num_rows, rng)
    held_out = held_out_rows(domain, tokenizer, length, 2 * settings.eval_tokens)
    if len(held_out) < 2:
        raise DataError(
            f"The held-out tenth of {domain.name} fills {len(held_out)} row of {length} tokens; "
            "one is needed to choose a learning rate and another to report. Give a longer text in "
            "benchmark.domain, or raise benchmark.eval_tokens."
        )
    kept = held_out_rows(general, tokenizer, length, settings.eval_tokens)
    texts = [
        Text("task", held_out[0::2]),
        Text("validation", held_out[1::2]),
        Text("general", kept),
    ]
    notes = {
        "domain": {"name": domain.name, "licence": domain.licence},
        "general": {"name": general.name, "licence": general.licence},
        "train": count(train, length),
        "held_out": {text.name: count(text.rows, length) for text in texts},
    }
    return Batches([_learned(row) for row in train], texts, [], notes)


def _learned(row: Row) -> Row:
    """Every token carries cross-entropy, as those of an assistant do in a chat."""
    return dataclasses.replace(row, source="chat")
