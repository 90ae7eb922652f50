"""Perplexity and KLD on held-out text while the model trains.

The deployed model is scored on the first tokens of each text, the same ones every time: what
differs between two points is the model. The teacher and `reference` are put beside it on the same
tokens, from what was kept of them before training.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from qatlora import processes, progress
from qatlora.data.rows import Text, first_rows
from qatlora.evaluate import TokenScores, summarize
from qatlora.evaluate.models import Evaluation
from qatlora.report.formatting import format_with_error
from qatlora.report.results import REFERENCE, TEACHER
from qatlora.report.results_curve import CurveLevel, CurvePoint
from qatlora.state import Run
from qatlora.train.logs import OnEval

_TRAINED = "trained"


def curve_scorer(state: Run) -> OnEval | None:
    """What scores the model at a step of training; None where it is not asked for.

    Leaves `state.curve_levels`. Of several processes the first one scores.
    """
    settings = state.cfg.train
    if not settings.eval_steps or not processes.is_first():
        return None
    evaluation = on_first_tokens(state.evaluation, state.batches.texts, settings.eval_tokens)
    state.curve_levels = list(_levels(evaluation))

    def score(step: int) -> list[CurvePoint]:
        with state.held_weights():
            evaluation.measure(_TRAINED, state.adapted.model, lambda _: None)
        scores = evaluation.scores[_TRAINED]
        points = [CurvePoint(step=step, **_figures(text, scores[text])) for text in scores]
        for point in points:
            state.tracker.log(point)
        if state.cfg.logging.progress_bars:
            progress.say(f"step {step}: {'; '.join(map(_in_words, points))}")
        return points

    return score


def on_first_tokens(evaluation: Evaluation, texts: Sequence[Text], num_tokens: int) -> Evaluation:
    """The teacher and all scores so far, cut to the first whole rows of `num_tokens` tokens."""
    parts = [Text(text.name, first_rows(text.rows, num_tokens)) for text in texts]
    lengths = {part.name: sum(row.num_scored_tokens for row in part.rows) for part in parts}
    return Evaluation(
        parts,
        evaluation.settings,
        {text: states.first(lengths[text]) for text, states in evaluation.teacher.items()},
        {
            model: {text: scores.first(lengths[text]) for text, scores in by_text.items()}
            for model, by_text in evaluation.scores.items()
        },
    )


def _levels(evaluation: Evaluation) -> Iterator[CurveLevel]:
    measured = evaluation.scores
    for text, scores in next(iter(measured.values()), {}).items():
        if scores.reference_nll is not None:
            yield CurveLevel(model=TEACHER, **_figures(text, TokenScores(scores.reference_nll)))
    for text, scores in measured.get(REFERENCE, {}).items():
        yield CurveLevel(model=REFERENCE, **_figures(text, scores))


def _figures(text: str, scores: TokenScores) -> dict[str, Any]:
    """The fields of `CurveScores`."""
    summary = summarize(scores)
    return {
        "text": text,
        "tokens": summary.num_tokens,
        "mean_nll": summary.mean_nll,
        "nll_stderr": summary.nll_stderr,
        "perplexity": summary.perplexity,
        "kld_mean": summary.kld and summary.kld.mean,
        "kld_stderr": summary.kld and summary.kld.mean_stderr,
    }


def _in_words(point: CurvePoint) -> str:
    perplexity = format_with_error(point.perplexity, point.perplexity * point.nll_stderr)
    words = f"{point.text} perplexity {perplexity}"
    if point.kld_mean is None or point.kld_stderr is None:
        return words
    return f"{words}, KLD {format_with_error(point.kld_mean, point.kld_stderr)}"
