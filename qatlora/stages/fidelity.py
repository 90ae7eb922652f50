"""The stage of recipe=fidelity: several models on the same tokens, each against its reference.

A reference is run once and kept as final hidden states; one model is in memory at a time.
"""

from collections.abc import Mapping

from torch import nn

from qatlora import progress
from qatlora.data.measured import measured_texts
from qatlora.errors import FidelityError
from qatlora.evaluate import ScoreSettings, TokenScores
from qatlora.evaluate.models import Evaluation
from qatlora.fidelity.figures import text_figures, worst_tokens
from qatlora.fidelity.load import LoadSettings, load_models
from qatlora.fidelity.plan import Checkpoint, Compared, Comparison, Planner
from qatlora.model_spec import parse_models
from qatlora.report.results_fidelity import (
    FidelityModel,
    FidelityReference,
    FidelityResult,
    FidelityText,
)
from qatlora.state import Run, dtype_of


def check_fidelity(state: Run) -> None:
    """Find all models and cut all texts into windows, before a weight is read.

    Raises:
        QatloraError: a model or text is missing, broken, or cannot be compared with the others.
    """
    settings = state.cfg.fidelity
    models = parse_models("fidelity.models", settings.models)
    reference = None
    if settings.reference is not None:
        (reference,) = parse_models("fidelity.reference", [settings.reference])
    base = Checkpoint(state.source, state.layout, None)
    state.comparisons = Planner(base, state.tokenizer).comparisons(models, reference)
    texts, state.data_notes = measured_texts(
        settings.texts,
        state.cfg.data,
        state.tokenizer,
        settings.window_tokens,
        settings.tokens_per_text,
    )
    state.measured = texts


def fidelity(state: Run) -> None:
    """Measure every model against its reference."""
    references, models = [], []
    for comparison in state.comparisons:
        evaluation = Evaluation(state.measured, _score_settings(state))
        references.append(_run_reference(state, comparison.reference, evaluation))
        models += _run_models(state, comparison, evaluation)
    settings = state.cfg.fidelity
    state.fidelity = FidelityResult(
        references=references,
        models=models,
        window_tokens=settings.window_tokens,
        precision=str(dtype_of(settings.precision)).removeprefix("torch."),
    )


def _run_reference(state: Run, reference: Compared, evaluation: Evaluation) -> FidelityReference:
    """Run the reference over all texts, after checking that it equals itself."""
    # Of an adapter run the last one: the trained model.
    *_, loaded = load_models(reference.place, _load_settings(state), state.tokenizer)
    self_kld = evaluation.self_kld_max(loaded.model)
    progress.say(f"{reference.label}: largest KLD to itself {self_kld} nats")
    if self_kld != 0:
        raise FidelityError(
            f"{reference.label} run twice on the same tokens has a KLD of {self_kld} nats to "
            "itself instead of 0: its figures are not repeatable here. Use "
            "fidelity.precision=fp32, or another device."
        )
    with state.bar(f"run {reference.label}", evaluation.num_tokens, "tokens") as advance:
        evaluation.teacher = evaluation.states_of(loaded.model, advance)
    return FidelityReference(reference.label, reference.text, loaded.num_bytes, self_kld)


def _run_models(state: Run, comparison: Comparison, evaluation: Evaluation) -> list[FidelityModel]:
    results = []
    for compared in comparison.models:
        before = None
        for loaded in load_models(compared.place, _load_settings(state), state.tokenizer):
            name = compared.label + loaded.suffix
            _measure(state, name, loaded.model, evaluation)
            scores = evaluation.scores[name]
            results.append(
                FidelityModel(
                    name=name,
                    given=compared.text,
                    reference=comparison.reference.label,
                    bytes=loaded.num_bytes,
                    texts=_figures(state, scores),
                    worst=worst_tokens(
                        scores, state.measured, state.tokenizer, state.cfg.fidelity.worst_tokens
                    ),
                    before=before,
                )
            )
            before = name
            del loaded  # or it would still be in memory while the next one is loaded
    return results


def _measure(state: Run, name: str, model: nn.Module, evaluation: Evaluation) -> None:
    with state.bar(f"measure {name}", evaluation.num_tokens, "tokens") as advance:
        evaluation.measure(name, model, advance)


def _figures(state: Run, scores: Mapping[str, TokenScores]) -> dict[str, FidelityText]:
    window_tokens = state.cfg.fidelity.window_tokens
    return {
        text.name: text_figures(scores[text.name], text.rows, window_tokens)
        for text in state.measured
    }


def _load_settings(state: Run) -> LoadSettings:
    cfg = state.cfg
    return LoadSettings(state.device, dtype_of(cfg.fidelity.precision), cfg.export.other_type.name)


def _score_settings(state: Run) -> ScoreSettings:
    cfg = state.cfg
    return ScoreSettings(
        chunk_tokens=cfg.evaluate.tokens_per_chunk,
        compute_dtype=dtype_of(cfg.fidelity.precision),
    )
