"""A teacher as its likeliest words, and one bucket for the mass of all others.

64 of 262,144 words carry nearly all of a language model's probability, so k of them and the rest as
a single number are what a cache on disk keeps. The rest is spread over the other words in
proportion to the student (`TeacherReader.log_probs`), which makes every divergence, and its
gradient, exactly that of the two distributions with the other words merged into one:

    KL(p || q) = sum_top p log(p / q) + p_rest log(p_rest / q_rest)

Merging words never raises a divergence; what is lost is p_rest KL(p_others || q_others), with both
normalized over the other words. `divergence_by_top_k` measures it.

float16 holds a log-probability of -1 to 2^-11 and one of -10 to 2^-8; as an error of p this stays
below 2.5e-4 and matters little where p is small. Normalized again when they are read, the k + 1
numbers sum to 1.

Shapes: T tokens, C of a chunk, R rows of a block, H hidden size, V words, k words kept.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qatlora.distill.blocks import row_blocks
from qatlora.distill.divergence import Divergence
from qatlora.distill.head import LmHead
from qatlora.distill.teachers import TeacherStates
from qatlora.errors import ConfigError

_CHUNK_TOKENS = 128
_COMPARED_TOKENS = 32  # a dozen arrays [C, V] at once


@dataclass(frozen=True)
class TopWords:
    """A `Teacher` of T tokens that knows its k likeliest words.

    Attributes:
        words: int32 [T, k], likeliest first.
        log_probs: float16 [T, k], at `temperature`, over the whole vocabulary.
        rest: float16 [T], log of the mass of all other words.
        vocab_size: V, larger than k.
        temperature: of the softmax; a divergence at another one cannot be known.
    """

    words: Tensor
    log_probs: Tensor
    rest: Tensor
    vocab_size: int
    temperature: float

    def reader(self, chunk_tokens: int, compute_dtype: torch.dtype) -> "_TopWordsReader":
        """Start a pass over these tokens."""
        return _TopWordsReader(self)

    def part(self, tokens: slice) -> "TopWords":
        """Some of the tokens."""
        return dataclasses.replace(
            self, words=self.words[tokens], log_probs=self.log_probs[tokens], rest=self.rest[tokens]
        )

    def truncated(self, top_k: int) -> "TopWords":
        """The same tokens with fewer words; the others join the rest."""
        joined = torch.cat([self.log_probs[:, top_k:], self.rest[:, None]], dim=1)
        rest = joined.float().logsumexp(dim=1).half()
        words, log_probs = self.words[:, :top_k], self.log_probs[:, :top_k]
        return dataclasses.replace(self, words=words, log_probs=log_probs, rest=rest)


class _TopWordsReader:
    """Holds one chunk on the student's device."""

    def __init__(self, teacher: TopWords):
        self._teacher = teacher

    def load(self, tokens: Tensor) -> None:
        at, device = tokens.to(self._teacher.words.device), tokens.device
        self._words = self._teacher.words[at].to(device, torch.int64)
        kept = torch.cat([self._teacher.log_probs[at], self._teacher.rest[at, None]], dim=1)
        self._known = kept.to(device)

    def log_probs(self, rows: slice, temperature: float, student: Tensor) -> Tensor:
        if temperature != self._teacher.temperature:
            raise ConfigError(
                f"teacher.temperature={temperature}, but the teacher's likeliest words were kept "
                f"at {self._teacher.temperature}, and those of another temperature cannot be "
                "computed from them. Set teacher.temperature as it was, or write a new cache."
            )
        words = self._words[rows]
        known = torch.log_softmax(self._known[rows].to(student.dtype), dim=1)
        others = student.scatter(1, words, -torch.inf)
        spread = known[:, -1] - others.logsumexp(dim=1)
        return others.add_(spread.unsqueeze(1)).scatter_(1, words, known[:, :-1])


def top_words(hidden: Tensor, head: LmHead, top_k: int, temperature: float) -> TopWords:
    """Find the likeliest words of a teacher from its final hidden states [T, H].

    The softmax is float32, over products whose sums are float32 (`LmHead.logits`).

    Returns:
        On the CPU.
    """
    words, log_probs, rest = [], [], []
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for chunk in torch.split(hidden, _CHUNK_TOKENS):
            logits = head.logits(chunk)
            for rows in row_blocks(logits):
                log_p = torch.log_softmax(logits[rows] / temperature, dim=1)
                top = log_p.topk(top_k, dim=1)
                others = log_p.scatter_(1, top.indices, -torch.inf)
                words.append(top.indices.int().cpu())
                log_probs.append(top.values.half().cpu())
                rest.append(others.logsumexp(dim=1).half().cpu())
    return TopWords(
        torch.cat(words), torch.cat(log_probs), torch.cat(rest), head.vocab_size, temperature
    )


@dataclass(frozen=True)
class KeptDivergence:
    """Sums over tokens, in nats, of what a cache of k words keeps of a divergence.

    Attributes:
        top_k: k.
        kept: the divergence from the words kept and their rest.
        rest_mass: the teacher's probability of the other words.
    """

    top_k: int
    kept: float
    rest_mass: float


def divergence_by_top_k(
    student: TeacherStates, teacher: TeacherStates, top_ks: Sequence[int], divergence: Divergence
) -> tuple[float, list[KeptDivergence]]:
    """Measure a divergence in full and from the k likeliest words, as a cache keeps them.

    Args:
        student: hidden states [T, H] and head of the student.
        teacher: those of the teacher for the same T tokens.
        top_ks: each below V.
        divergence: which one.

    Returns:
        (sum over tokens of the full divergence, one `KeptDivergence` per k), in nats.
    """
    full, kept, mass = 0.0, dict.fromkeys(top_ks, 0.0), dict.fromkeys(top_ks, 0.0)
    temperature = divergence.temperature
    with torch.no_grad(), torch.autocast(teacher.head.weight.device.type, enabled=False):
        parts = zip(
            torch.split(student.hidden, _COMPARED_TOKENS),
            torch.split(teacher.hidden, _COMPARED_TOKENS),
            strict=True,
        )
        for student_hidden, teacher_hidden in parts:
            student_hidden = student_hidden.to(student.head.weight.device)
            teacher_hidden = teacher_hidden.to(teacher.head.weight.device)
            log_q = torch.log_softmax(student.head.logits(student_hidden) / temperature, dim=1)
            q, scratch = log_q.exp(), torch.empty_like(log_q)
            log_p = torch.log_softmax(teacher.head.logits(teacher_hidden) / temperature, dim=1)
            full += divergence.value_and_pull(log_p, log_q, q, scratch)[0].double().sum().item()
            largest = top_words(teacher_hidden, teacher.head, max(top_ks), temperature)
            for top_k in top_ks:
                known = largest.truncated(top_k)
                reader = known.reader(len(q), log_q.dtype)
                reader.load(torch.arange(len(q), device=q.device))
                log_p = reader.log_probs(slice(None), temperature, log_q)
                value = divergence.value_and_pull(log_p, log_q, q, scratch)[0]
                kept[top_k] += value.double().sum().item()
                mass[top_k] += known.rest.double().exp().sum().item()
    return full, [KeptDivergence(top_k, kept[top_k], mass[top_k]) for top_k in top_ks]
