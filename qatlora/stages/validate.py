"""Stages of recipe=validate: what a Q4_0 export would keep, before anything is written."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qatlora.base.from_gguf import config_from_gguf, model_from_gguf, require_fit
from qatlora.base.layout import plain_config
from qatlora.base.load import load_plain
from qatlora.base.names import text_model_name, weight_key
from qatlora.base.on_grid import on_grid_share
from qatlora.base.others import deploy_others
from qatlora.base.plain import put_blocks
from qatlora.base.source import Source, read_source
from qatlora.base.to_q4_0 import by_grid, by_llama_cpp
from qatlora.errors import GuardFailed
from qatlora.evaluate import mean_difference
from qatlora.export.checkpoint import require_plain
from qatlora.guard.judge import explain, verdict
from qatlora.inspection.compare import compare_checkpoints, require_comparable
from qatlora.inspection.tensors import inspect_checkpoint, require_weights
from qatlora.llamacpp.gguf_read import read_gguf
from qatlora.report.results import BaseResult, GateResult
from qatlora.report.results_validate import (
    BY_GRID,
    BY_LLAMA_CPP,
    GGUF,
    KeptEffect,
    ValidateResult,
)
from qatlora.report.validate_text import validate_headline
from qatlora.state import Run
from qatlora.validation.gates import (
    EffectFigures,
    deciding_share,
    effect_gate,
    gguf_gates,
    kept_effect,
    on_grid_gate,
)
from qatlora.validation.lora import merge_lora, require_lora
from qatlora.validation.notes import warnings_of
from qatlora.validation.types import damage, damage_by_type

_EXPORTS = {BY_LLAMA_CPP: by_llama_cpp, BY_GRID: by_grid}


def check_validate(state: Run) -> None:
    """Refuse what cannot be judged, from headers alone.

    Raises:
        CheckpointError: a build, another architecture, other shapes, no GGUF or one that could be
            misread.
        AdapterError: no plain LoRA.
        ExportError: the base is no bf16 checkpoint.
    """
    settings = state.cfg.validate
    require_plain(state.source)
    require_weights(state.source, state.layout.trained)
    checkpoint = state.source
    if settings.merged is not None:
        checkpoint = read_source(Path(settings.merged), Path(settings.merged).name)
        require_weights(checkpoint, state.layout.trained)
        require_comparable(checkpoint, state.source)
    if settings.adapter is not None:
        require_lora(Path(settings.adapter))
    if settings.gguf is not None:
        config, gguf = plain_config(checkpoint.folder), read_gguf(Path(settings.gguf))
        config_from_gguf(gguf, config)  # refuses what could be misread
        require_fit(gguf, config)


def validate(state: Run) -> None:
    """Measure base, merge, both ways to Q4_0 and the file; leave gates and figures."""
    settings, gates = state.cfg.validate, []
    what, path = next(
        (key, value)
        for key in ("merged", "adapter", "gguf")
        if (value := getattr(settings, key)) is not None
    )
    base_share = on_grid_share(state.source, state.layout, state.device)
    state.base_result = BaseResult(
        state.source.name, None, state.layout.num_parameters, base_share, None
    )
    state.validation = ValidateResult(what, path, str(state.source.folder))
    with _checkpoint(state) as checkpoint:
        if what != "gguf":
            _inspect(state, checkpoint)
            gates.append(on_grid_gate(base_share, state.inspection.on_grid_share))
            gates.append(_measure_merge(state, checkpoint))
        if settings.gguf is not None:
            gates += _measure_gguf(state, checkpoint, base_share)
    state.guard = verdict(gates, None)
    state.validation = dataclasses.replace(state.validation, advice=_better_command(state))


def decide(state: Run) -> None:
    """End with the exit code of a failed guard where a gate failed; the report is written.

    Raises:
        GuardFailed: with every failed gate, its figure, and what to change.
    """
    if not state.guard.passed:
        headline = validate_headline(state.validation, state.guard)
        raise GuardFailed(f"{headline} {explain(state.guard)}")


@contextlib.contextmanager
def _checkpoint(state: Run) -> Iterator[Source]:
    """The merged checkpoint, as given or of the adapter in a folder for a while; or the base."""
    settings = state.cfg.validate
    if settings.merged is not None:
        yield read_source(Path(settings.merged), "merged")
    elif settings.adapter is not None:
        with tempfile.TemporaryDirectory(prefix=".merged-", dir=state.run_dir) as folder:
            merge_lora(state.source, Path(settings.adapter), Path(folder))
            merged = read_source(Path(folder), "merged")
            require_comparable(merged, state.source)
            yield merged
    else:
        yield state.source


def _inspect(state: Run, merged: Source) -> None:
    """Tensors on the grid, edits, and what was changed besides the weights."""
    trained = state.layout.trained
    with state.bar("inspect", len(trained), "tensors") as advance:
        inspection = inspect_checkpoint(merged, trained, state.device, advance)
    with state.bar("compare", len(merged.files), "tensors") as advance:
        comparison = compare_checkpoints(merged, state.source, trained, state.device, advance)
    state.inspection = dataclasses.replace(inspection, comparison=comparison)
    state.validation = dataclasses.replace(
        state.validation,
        warnings=warnings_of(merged, state.source, state.layout.tied),
        types=damage_by_type(merged, state.layout, inspection),
    )


def _measure_merge(state: Run, merged: Source) -> GateResult:
    model = load_plain(merged.folder, state.device, torch.bfloat16)
    _measure_reference(state, "merged", model)
    for name, make in _EXPORTS.items():
        put_blocks(model, make(merged, state.layout.grid, state.device), torch.bfloat16)
        deploy_others(model, state.layout.grid, state.cfg.export.other_type.name)
        state.measure(name, model)
    del model
    state.measure("base", load_plain(state.source.folder, state.device, torch.bfloat16))
    kept = {name: _kept(state, name) for name in _EXPORTS}
    state.validation = dataclasses.replace(state.validation, kept=kept)
    return effect_gate(kept[BY_LLAMA_CPP], kept[BY_GRID], state.cfg.validate)


def _kept(state: Run, export: str) -> KeptEffect:
    task = {name: scores["task"] for name, scores in state.evaluation.scores.items()}
    moved, lost = (task[name].kld for name in ("base", export))
    assert moved is not None
    assert lost is not None
    base = task["base"].nll
    return kept_effect(
        EffectFigures(
            gain=mean_difference(base, task["merged"].nll),
            export_gain=mean_difference(base, task[export].nll),
            moved=moved.double().mean().item(),
            lost=lost.double().mean().item(),
        )
    )


def _measure_gguf(state: Run, checkpoint: Source, base_share: float) -> list[GateResult]:
    """The file against the checkpoint, which is measured first where it is the base itself."""
    if not state.evaluation.teacher:
        model = load_plain(checkpoint.folder, state.device, torch.bfloat16)
        _measure_reference(state, "base", model)
        del model
    path = Path(state.cfg.validate.gguf)
    model = model_from_gguf(path, plain_config(checkpoint.folder), torch.bfloat16)
    state.measure(GGUF, model.to(state.device))
    kld = state.evaluation.kld(GGUF, "general")
    assert kld is not None
    share = state.inspection.on_grid_share if state.inspection else base_share
    weights = dict(model.named_parameters())
    found = damage(
        GGUF,
        checkpoint,
        state.layout.trained,
        lambda m, _: weights[text_model_name(weight_key(m))].cpu(),
    )
    state.validation = dataclasses.replace(state.validation, types=[*state.validation.types, found])
    types = {
        tensor.type_name
        for name, tensor in read_gguf(path).tensors.items()
        if name.startswith("blk.") and len(tensor.shape) > 1
    }
    return gguf_gates(kld.mean, found.exact_share, share, types, state.cfg.validate)


def _measure_reference(state: Run, name: str, model: PreTrainedModel) -> None:
    """Measure the model that all others are compared with, and keep its states for that."""
    state.measure(name, model, keep=True)
    state.evaluation.teacher = state.evaluation.states.pop(name)


def _better_command(state: Run) -> str | None:
    """Train inside the grid; or, where only llama-quantize is at fault, export the blocks."""
    enough = {
        name: (share := deciding_share(kept)) is None or share >= state.cfg.validate.min_share_kept
        for name, kept in state.validation.kept.items()
    }
    if state.guard.passed and all(enough.values()):
        return None
    if enough.get(BY_GRID, True):
        return "python -m qatlora recipe=export_gguf adapter.path=RUN/adapter"
    return (
        f"python -m qatlora recipe=chat_sft base.path={state.source.folder} storage=q4_0 "
        "adapter=steps data=jsonl data.path=CHATS.jsonl"
    )
