"""Scores per token, from final hidden states: nats of the text and of the KL from a reference.

    KL(ref || model) = sum_w p_w (a_w - b_w) - (logsumexp(a) - logsumexp(b))

with logits a of the reference, b of the model and p = softmax(a). The vocabulary is walked in tiles
of [C tokens, n words]; the softmax is that of a tile's words, and a tile joins those before it with
its share of all exponentials so far, exp(logsumexp(tile) - logsumexp(all)). The result is exactly 0
for identical states and heads, because every tile's difference is. Logits carry fp32 sums of the
products (see qatlora.distill.matmul), sums of a tile are fp32, sums over tiles float64.

Definitions are those of llama.cpp's llama-perplexity --kl-divergence (tools/perplexity/
perplexity.cpp), which leaves words below exp(-16) out of its sums; here nothing is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qatlora.distill import LmHead
from qatlora.distill.blocks import row_blocks
from qatlora.errors import ConfigError


@dataclass(frozen=True)
class ScoreSettings:
    """How scores are computed; the results depend on it by rounding only.

    Attributes:
        batch_tokens: tokens, padding included, of a forward; a longer window goes alone.
        chunk_tokens: tokens of a tile.
        chunk_words: words of a tile.
        compute_dtype: of products with the head, and of kept hidden states: bfloat16 or float32.
        autocast: run the model's forward under autocast to `compute_dtype` (bfloat16 only).
    """

    batch_tokens: int = 2048
    chunk_tokens: int = 512
    chunk_words: int = 2048
    compute_dtype: torch.dtype = torch.bfloat16
    autocast: bool = True

    def __post_init__(self) -> None:
        """Refuse sizes without a meaning."""
        for name in ("batch_tokens", "chunk_tokens", "chunk_words"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1.")


@dataclass(frozen=True)
class TokenScores:
    """Scores of n tokens in text order, on the CPU.

    Attributes:
        nll: float32 [n], -log P(token), nats.
        kld: float32 [n], KL(reference || model), nats; None without a reference.
        same_top: bool [n], both models have the same most probable word; None without a reference.
        reference_nll: float32 [n], -log P_reference(token); None without a reference.
        top: int64 [n], the model's most probable word.
        reference_top: int64 [n], the reference's; None without one.
    """

    nll: Tensor
    kld: Tensor | None = None
    same_top: Tensor | None = None
    reference_nll: Tensor | None = None
    top: Tensor | None = None
    reference_top: Tensor | None = None

    @classmethod
    def concatenate(cls, parts: Sequence["TokenScores"]) -> "TokenScores":
        """Join scores of consecutive tokens."""
        return cls(
            torch.cat([part.nll for part in parts]),
            _concatenate([part.kld for part in parts]),
            _concatenate([part.same_top for part in parts]),
            _concatenate([part.reference_nll for part in parts]),
            _concatenate([part.top for part in parts]),
            _concatenate([part.reference_top for part in parts]),
        )

    def first(self, num_tokens: int) -> "TokenScores":
        """Scores of the first tokens."""
        columns = {
            name: None if column is None else column[:num_tokens]
            for name, column in vars(self).items()
        }
        return TokenScores(**columns)


@dataclass(frozen=True)
class Reference:
    """Another model's final hidden states [n, H'] for the same n tokens, and its head."""

    hidden: Tensor
    head: LmHead


def score_tokens(
    hidden: Tensor,
    head: LmHead,
    targets: Tensor,
    references: Sequence[Reference] = (),
    settings: ScoreSettings | None = None,
) -> list[TokenScores]:
    """Score the words that follow n hidden states; the model's logits are computed once.

    Args:
        hidden: [n, H], any float dtype and device; moved to the head's device chunk by chunk.
        head: the model's head.
        targets: [n] int64, the word that follows each state.
        references: what the model is compared with.
        settings: tile sizes and compute dtype.

    Returns:
        One `TokenScores` per reference; without any, a single one that has no divergence.

    Raises:
        ConfigError: the vocabularies differ.
    """
    settings = settings or ScoreSettings()
    for reference in references:
        if reference.head.vocab_size != head.vocab_size:
            raise ConfigError(
                f"The reference has {reference.head.vocab_size} words, the model "
                f"{head.vocab_size}: their probabilities cannot be compared. Use a reference with "
                "the model's tokenizer and the same padding of the vocabulary."
            )
    device = head.weight.device
    chunks = []
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for start in range(0, len(hidden), settings.chunk_tokens):
            chunk = slice(start, start + settings.chunk_tokens)
            others = [Reference(other.hidden[chunk].to(device), other.head) for other in references]
            own, wanted = hidden[chunk].to(device), targets[chunk].to(device)
            chunks.append(_score_chunk(Reference(own, head), wanted, others, settings))
    return [TokenScores.concatenate(parts) for parts in zip(*chunks, strict=True)]


def _concatenate(columns: Sequence[Tensor | None]) -> Tensor | None:
    present = [column for column in columns if column is not None]
    return torch.cat(present) if len(present) == len(columns) else None


class _StreamingSoftmax:
    """Log of the sum of exponentials of each row, its likeliest word, the logit of its target."""

    def __init__(self, targets: Tensor):
        rows = len(targets)
        self._targets = targets
        self._top = targets.new_full((rows,), -torch.inf, dtype=torch.float32)
        self._target_logit = torch.zeros_like(self._top)
        self.top_word = torch.zeros_like(targets)
        self.log_sum = self._top.double()

    def add(self, block: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Take in the logits [R, n] of the words from `start` on; they are not changed.

        Returns:
            (probabilities [R, n] among these words alone, their share [R] float64 of all words
            taken in so far).
        """
        top = block.amax(dim=1)
        higher = (top > self._top).nonzero().squeeze(1)
        if len(higher):  # few rows after the first words: argmax is slow, amax is not
            self.top_word[higher] = block[higher].argmax(dim=1) + start
        self._top = torch.maximum(self._top, top)
        column = self._targets - start
        inside = (column >= 0) & (column < block.shape[1])
        found = block.gather(1, column.clamp(0, block.shape[1] - 1).unsqueeze(1)).squeeze(1)
        self._target_logit = torch.where(inside, found, self._target_logit)
        # One pass over the memory where maximum, exponentials and sum are three; the sum is found
        # again in the likeliest word, whose exponential is 1.
        probabilities = torch.softmax(block, dim=1)
        log_sum = top.double() - probabilities.amax(dim=1).double().log()
        self.log_sum = torch.logaddexp(self.log_sum, log_sum)
        return probabilities, torch.exp(log_sum - self.log_sum)

    def nll(self) -> Tensor:
        """-log P(target), float32 [R]."""
        return (self.log_sum - self._target_logit.double()).float()


class _StreamingDivergence:
    """KL(reference || model) of each row, beside the two softmaxes."""

    def __init__(self, targets: Tensor):
        self._softmax = _StreamingSoftmax(targets)
        self._difference = torch.zeros_like(self._softmax.log_sum)  # mean of a - b

    def add(self, a: Tensor, b: Tensor, start: int) -> None:
        """Take in the reference's and the model's logits [R, n]; a is overwritten."""
        probabilities, share = self._softmax.add(a, start)
        difference = probabilities.mul_(a.sub_(b)).sum(dim=1)
        self._difference += (difference.double() - self._difference) * share

    def scores(self, model: _StreamingSoftmax) -> TokenScores:
        """The scores of the rows, once all words are in."""
        reference = self._softmax
        kld = self._difference - (reference.log_sum - model.log_sum)
        return TokenScores(
            model.nll().cpu(),
            kld.float().cpu(),
            (model.top_word == reference.top_word).cpu(),
            reference.nll().cpu(),
            model.top_word.cpu(),
            reference.top_word.cpu(),
        )


class _Block:
    """Some rows of a chunk, which stay in a CPU's cache while they are worked on."""

    def __init__(self, rows: slice, targets: Tensor, num_references: int):
        self._rows = rows
        self._model = _StreamingSoftmax(targets[rows])
        self._divergences = [_StreamingDivergence(targets[rows]) for _ in range(num_references)]

    def add(self, own: Tensor, others: Sequence[Tensor], start: int) -> None:
        """Take in the chunk's logits [C, n] of the model and of the references."""
        b = own[self._rows]
        self._model.add(b, start)
        for divergence, other in zip(self._divergences, others, strict=True):
            divergence.add(other[self._rows], b, start)

    def scores(self) -> list[TokenScores]:
        """As `score_tokens` returns them."""
        if not self._divergences:
            return [TokenScores(self._model.nll().cpu(), top=self._model.top_word.cpu())]
        return [divergence.scores(self._model) for divergence in self._divergences]


def _score_chunk(
    model: Reference, targets: Tensor, references: Sequence[Reference], settings: ScoreSettings
) -> list[TokenScores]:
    sides = [model, *references]
    num_rows, words = len(targets), settings.chunk_words
    buffers = [model.hidden.new_empty(num_rows * words, dtype=torch.float32) for _ in sides]
    blocks = [
        _Block(rows, targets, len(references))
        for rows in row_blocks(buffers[0].view(num_rows, words))
    ]
    for start in range(0, model.head.vocab_size, words):
        count = min(words, model.head.vocab_size - start)
        own, *others = (
            side.head.logits_of_words(
                side.hidden,
                start,
                count,
                settings.compute_dtype,
                buffer[: num_rows * count].view(num_rows, count),
            )
            for side, buffer in zip(sides, buffers, strict=True)
        )
        for block in blocks:
            block.add(own, others, start)
    return [
        TokenScores.concatenate(parts)
        for parts in zip(*(block.scores() for block in blocks), strict=True)
    ]
