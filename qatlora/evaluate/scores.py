"""Scores per token, from final hidden states: nats of the text and of the KL from a reference.

The vocabulary is walked in tiles of [C tokens, n words]; per token only the running maximum, the
sum of exponentials and the weighted difference of logits are kept (a streaming log-sum-exp):

    KL(ref || model) = sum_w p_w (a_w - b_w) - (logsumexp(a) - logsumexp(b))

with logits a of the reference, b of the model and p = softmax(a). It is exactly 0 for identical
states and heads, because every tile's difference is. Logits carry fp32 sums of the products
(see qatlora.distill.matmul), sums of a tile are fp32, sums over tiles float64.

Definitions are those of llama.cpp's llama-perplexity --kl-divergence (tools/perplexity/
perplexity.cpp), which leaves words below exp(-16) out of its sums; here nothing is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qatlora.distill import LmHead
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
            chunks.append(_score_chunk(own, head, wanted, others, settings))
    return [TokenScores.concatenate(parts) for parts in zip(*chunks, strict=True)]


def _concatenate(columns: Sequence[Tensor | None]) -> Tensor | None:
    present = [column for column in columns if column is not None]
    return torch.cat(present) if len(present) == len(columns) else None


class _StreamingSoftmax:
    """Running maximum, its word, and sum of exponentials of each row, tile by tile."""

    def __init__(self, targets: Tensor):
        self._targets = targets
        rows = len(targets)
        self.top = targets.new_full((rows,), -torch.inf, dtype=torch.float32)
        self.top_word = torch.zeros_like(targets)
        self.sum_exp = targets.new_zeros(rows, dtype=torch.float64)
        self.target_logit = torch.zeros_like(self.top)

    def add(self, tile: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Take in the logits [C, n] of the words from `start` on; they are not changed.

        Returns:
            (exp(tile - new maximum) [C, n], factor [C] float64 by which what was summed before
            has to be rescaled).
        """
        tile_top = tile.amax(dim=1)
        higher = (tile_top > self.top).nonzero().squeeze(1)
        if len(higher):  # few rows after the first tiles: argmax is slow, amax is not
            self.top_word[higher] = tile[higher].argmax(dim=1) + start
        top = torch.maximum(self.top, tile_top)
        factor = torch.exp((self.top - top).double())
        exponentials = torch.sub(tile, top.unsqueeze(1)).exp_()
        self.sum_exp = self.sum_exp * factor + exponentials.sum(dim=1)
        self.top = top
        column = self._targets - start
        inside = (column >= 0) & (column < tile.shape[1])
        found = tile.gather(1, column.clamp(0, tile.shape[1] - 1).unsqueeze(1)).squeeze(1)
        self.target_logit = torch.where(inside, found, self.target_logit)
        return exponentials, factor

    def nll(self) -> Tensor:
        """-log P(target), float32 [C]."""
        return (self.sum_exp.log() + (self.top - self.target_logit).double()).float()


class _StreamingDivergence:
    """KL(reference || model) of each row, tile by tile, beside the two softmaxes."""

    def __init__(self, reference: Reference, targets: Tensor):
        self._reference = reference
        self._softmax = _StreamingSoftmax(targets)
        self._weighted = torch.zeros_like(self._softmax.sum_exp)  # sum of exp(a - max a) * (a - b)

    def add(self, b: Tensor, start: int, dtype: torch.dtype) -> None:
        """Take in the model's logits b [C, n] of the words from `start` on."""
        other = self._reference
        a = other.head.logits_of_words(other.hidden, start, b.shape[1], dtype)
        exponentials, factor = self._softmax.add(a, start)
        difference = exponentials.mul_(a.sub_(b)).sum(dim=1)
        self._weighted = self._weighted * factor + difference

    def scores(self, model: _StreamingSoftmax) -> TokenScores:
        """The scores of the chunk, once all words are in."""
        reference = self._softmax
        log_sums = reference.sum_exp.log() - model.sum_exp.log()
        kld = self._weighted / reference.sum_exp - log_sums - (reference.top - model.top).double()
        return TokenScores(
            model.nll().cpu(),
            kld.float().cpu(),
            (model.top_word == reference.top_word).cpu(),
            reference.nll().cpu(),
            model.top_word.cpu(),
            reference.top_word.cpu(),
        )


def _score_chunk(
    hidden: Tensor,
    head: LmHead,
    targets: Tensor,
    references: Sequence[Reference],
    settings: ScoreSettings,
) -> list[TokenScores]:
    model = _StreamingSoftmax(targets)
    divergences = [_StreamingDivergence(reference, targets) for reference in references]
    words, dtype = settings.chunk_words, settings.compute_dtype
    for start in range(0, head.vocab_size, words):
        tile = head.logits_of_words(hidden, start, words, dtype)
        model.add(tile, start)
        for divergence in divergences:
            divergence.add(tile, start, dtype)
    if not divergences:
        return [TokenScores(model.nll().cpu(), top=model.top_word.cpu())]
    return [divergence.scores(model) for divergence in divergences]
