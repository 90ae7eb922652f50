"""The stage of recipe=fidelity: several models on the same tokens, each against its reference.

A reference is run once and kept as final hidden states; one model is in memory at a time. After a
build the stage measures the folder that was built, and its card gets the table.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from qatlora import memory, progress
from qatlora.base.layout import find_layout
from qatlora.base.source import read_source
from qatlora.data.encode import expected_bos
from qatlora.data.measured import measured_texts
from qatlora.distill import LmHead
from qatlora.errors import FidelityError
from qatlora.evaluate import ScoreSettings, TokenScores
from qatlora.evaluate.models import Evaluation
from qatlora.fidelity.figures import text_figures, worst_tokens
from qatlora.fidelity.in_llama_cpp import (
    HalfScored,
    JudgedFile,
    half_scored,
    judge,
    require_judgeable,
)
from qatlora.fidelity.load import LoadSettings, load_models
from qatlora.fidelity.plan import Checkpoint, Compared, Comparison, GgufModel, Planner
from qatlora.model_spec import parse_models, parse_vanilla
from qatlora.preflight import estimate_fidelity, lacking_memory
from qatlora.report.results_fidelity import (
    FidelityModel,
    FidelityReference,
    FidelityResult,
    FidelityText,
)
from qatlora.stages.build import write_card_again
from qatlora.state import Run, dtype_of


def check_fidelity(state: Run) -> None:
    """Find all models and cut all texts into windows, before a weight is read.

    A build goes on without a table where this machine cannot hold the models of one.

    Raises:
        QatloraError: a model or text is missing, broken, or cannot be compared with the others.
    """
    settings = state.cfg.fidelity
    if "build" in state.cfg.stages:
        needs = estimate_fidelity(state.cfg, state.source, state.layout, state.device)
        lacking = lacking_memory(needs, state.device)
        if lacking is not None:
            progress.say(f"There will be no fidelity table: to measure it, {lacking}.")
            return
    models = parse_models("fidelity.models", settings.models)
    if settings.vanilla is not None:
        models = [parse_vanilla(settings.vanilla), *models]
    reference = None
    if settings.reference is not None:
        (reference,) = parse_models("fidelity.reference", [settings.reference])
    base = Checkpoint(state.source, state.layout, None)
    base_name = state.source.name if settings.vanilla is None else "QAT"
    planner = Planner(base, base_name, state.tokenizer)
    state.comparisons = planner.comparisons(models, reference)
    texts, state.data_notes = measured_texts(
        settings.texts,
        state.cfg.data,
        state.tokenizer,
        settings.window_tokens,
        settings.tokens_per_text,
    )
    state.measured = texts
    if settings.llama_cpp:
        files = [model.place for group in state.comparisons for model in _files(group)]
        require_judgeable(files, _half_scored(state), expected_bos(state.tokenizer))


def fidelity(state: Run) -> None:
    """Measure every model against its reference."""
    if not state.comparisons:
        return  # a build whose table this machine cannot hold
    if state.build is not None:
        _put_build(state)
    references, models = [], []
    for comparison in state.comparisons:
        evaluation = Evaluation(state.measured, _score_settings(state))
        references.append(_run_reference(state, comparison.reference, evaluation))
        memory.give_back()
        measured = _run_models(state, comparison, evaluation)
        if state.cfg.fidelity.llama_cpp:
            measured = _judge_in_llama_cpp(state, comparison, evaluation, measured)
        models += measured
    settings = state.cfg.fidelity
    state.fidelity = FidelityResult(
        references=references,
        models=models,
        window_tokens=settings.window_tokens,
        precision=str(dtype_of(settings.precision)).removeprefix("torch."),
    )
    if state.build is not None:
        write_card_again(state)


def _put_build(state: Run) -> None:
    """Measure the folder itself where the base in its storage was asked for."""
    built = read_source(Path(state.build.path), state.source.name)
    place = Checkpoint(built, find_layout(built, state.cfg.base), None)
    for comparison in state.comparisons:
        for index, model in enumerate(comparison.models):
            if model.text == state.build.storage:
                comparison.models[index] = dataclasses.replace(model, place=place)


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
        states = evaluation.states_of(loaded.model, advance)
    head = LmHead.of(loaded.model).apart()
    evaluation.teacher = {
        name: dataclasses.replace(each, head=head) for name, each in states.items()
    }
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
                    title=compared.title + loaded.suffix,
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
            memory.give_back()
    return results


def _judge_in_llama_cpp(
    state: Run, comparison: Comparison, evaluation: Evaluation, measured: list[FidelityModel]
) -> list[FidelityModel]:
    """The models, GGUF files among them with their figures in llama.cpp."""
    parts = _half_scored(state)
    files = [
        JudgedFile(model.label, model.place.path, evaluation.scores[model.label])
        for model in _files(comparison)
    ]
    dtype = _score_settings(state).compute_dtype
    with state.bar("judge in llama.cpp", len(files) * len(parts), "runs") as advance:
        found = judge(parts, evaluation.teacher, dtype, files, state.run_dir, advance)
    return [dataclasses.replace(model, llama_cpp=found.get(model.name, {})) for model in measured]


def _files(comparison: Comparison) -> list[Compared]:
    return [model for model in comparison.models if isinstance(model.place, GgufModel)]


def _half_scored(state: Run) -> list[HalfScored]:
    settings = state.cfg.fidelity
    parts = (
        half_scored(text, settings.window_tokens, settings.llama_cpp_tokens)
        for text in state.measured
    )
    return [part for part in parts if part is not None]


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
