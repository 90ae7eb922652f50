"""The main path: a recipe is a list of stages, and this file is what each of them does.

    preflight -> load_data -> load_base -> attach -> evaluate_base -> train -> save_adapter
              -> evaluate_trained -> write_candidate -> guard -> publish -> report

qat_distill adds evaluate_reference before train and save_base after publish; inspect, the builds,
preview_data, benchmark, fidelity and validate are one stage between preflight and report,
teacher_cache one after load_data, plan one before report; decide ends validate with its exit code.
Those stages are in `qatlora.stages`, and there is told where a run's teacher comes from.

A stage reads what earlier stages left in `Run` and adds its own result. The work itself is in the
rooms; none of them sees the root config.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qatlora import __version__, files, preflight, processes, progress
from qatlora.adapters.attach import AdaptedModel, adapter_rule, attach, changed_share
from qatlora.adapters.deployed import AdapterRule, LatentRule
from qatlora.adapters.latents import attach_latents
from qatlora.adapters.saved import load_adapter, read_identity, save_adapter
from qatlora.base.from_gguf import model_from_gguf, packed_model_from_gguf
from qatlora.base.layout import find_layout, plain_config
from qatlora.base.load import load_base, load_tokenizer, require_storage
from qatlora.base.others import deploy_others
from qatlora.base.source import find_source
from qatlora.config import Effect, RootConfig, Trained
from qatlora.data.load import load_data
from qatlora.data.templates import chosen_template, training_template
from qatlora.errors import AdapterError
from qatlora.evaluate import KldSummary, Mean, ScoreSettings, mean_difference
from qatlora.evaluate.models import Evaluation
from qatlora.evaluate.samples import answers
from qatlora.export.candidate import write_candidate
from qatlora.export.checkpoint import require_plain
from qatlora.export.publish import publish
from qatlora.grid.fused import compiles_on
from qatlora.guard.gates import before_after_gates, drift_gate, effect_gates
from qatlora.guard.identity import identity_gate
from qatlora.guard.judge import permit, verdict
from qatlora.llamacpp.source import check_converter, llama_cpp_version
from qatlora.report.console import to_console
from qatlora.report.json_report import ReportError, plain
from qatlora.report.results import LayerChange, RunReport, StageTime
from qatlora.report.write import write_report
from qatlora.run_folder import claimed
from qatlora.stages.benchmark import benchmark
from qatlora.stages.build import build, check_build
from qatlora.stages.fidelity import check_fidelity, fidelity
from qatlora.stages.inspect import check_inspect, inspect
from qatlora.stages.plan import plan
from qatlora.stages.preview import preview_data
from qatlora.stages.qat_distill import evaluate_reference, save_base
from qatlora.stages.resume import SETTINGS, check_run_folder
from qatlora.stages.runtime import announce_runtime, runtime_gates
from qatlora.stages.teacher import (
    batch_teacher,
    check_teacher,
    keep_teacher_states,
    load_teacher,
    open_cache,
)
from qatlora.stages.teacher_cache import check_teacher_cache, teacher_cache
from qatlora.stages.validate import check_validate, decide, validate
from qatlora.state import Run, dtype_of, report_of
from qatlora.train.objective import build_objective
from qatlora.train.run import fit_to_processes, train


def run(cfg: RootConfig) -> RunReport:
    """Run the recipe's stages in order and return its report.

    Raises:
        QatloraError: bad input (before any long work), or a failed gate (nothing published).
    """
    if "train" in cfg.stages:
        cfg.train = fit_to_processes(cfg.train)
    else:
        processes.require_one(cfg.card.name)
    with processes.joined(cfg.train.device):
        cfg.run_dir = processes.of_first(cfg.run_dir)
        state = Run.start(cfg)
        if not processes.is_first():
            return _help_to_train(state)
        with claimed(state.run_dir):
            settings = plain(dataclasses.asdict(cfg))
            check_run_folder(state, settings)
            files.write_json(state.run_dir / SETTINGS, settings)
            for name in cfg.stages:
                start = time.monotonic()
                STAGES[name](state)
                state.times.append(StageTime(name, time.monotonic() - start))
            return report_of(state)


def _help_to_train(state: Run) -> RunReport:
    """The part of a process that is not the first: it trains, and writes nothing."""
    progress.console.quiet = True
    state.cfg.logging.progress_bars = False
    for name in ("preflight", "load_data", "load_base", "attach", "train"):
        STAGES[name](state)
    return report_of(state)


def _preflight(state: Run) -> None:
    """Everything that can be known to fail is found here, before anything long begins."""
    cfg = state.cfg
    if cfg.adapter.path is not None:
        read_identity(Path(cfg.adapter.path))
    template = chosen_template(cfg.base.chat_template)
    state.source = find_source(cfg.base, template)
    state.layout = find_layout(state.source, cfg.base)
    compiles_on(state.device)  # refuses an unknown choice
    needs = preflight.estimate(cfg, state.source, state.layout, state.device)
    preflight.require(needs, state.run_dir, state.device)
    if "save_base" in cfg.stages:
        require_plain(state.source)
    if "write_candidate" in cfg.stages:
        check_converter()
    if "inspect" in cfg.stages:
        check_inspect(state)
    if "build" in cfg.stages:
        check_build(state)
    if "validate" in cfg.stages:
        check_validate(state)
    if {"build", "preview_data", "load_base", "load_data", "fidelity"} & set(cfg.stages):
        state.tokenizer = load_tokenizer(state.source.folder)
        if template is not None:
            state.tokenizer.chat_template = template
    if {"load_base", "teacher_cache"} & set(cfg.stages):
        require_storage(state.source, cfg.storage.kind.name)
        check_teacher(state)
    if "teacher_cache" in cfg.stages:
        check_teacher_cache(state)
    if "guard" in cfg.stages:
        announce_runtime(state)
    if "fidelity" in cfg.stages:
        check_fidelity(state)
    progress.say(f"{cfg.card.name} on {state.source.name}: {preflight.describe(needs)}")


def _load_data(state: Run) -> None:
    cfg = state.cfg
    state.batches = load_data(
        cfg.data, state.tokenizer, cfg.seed, cfg.train.max_steps, cfg.train.rows_per_step
    )
    state.tokenizer.chat_template = training_template(state.tokenizer)
    settings = ScoreSettings(
        chunk_tokens=cfg.evaluate.tokens_per_chunk,
        compute_dtype=dtype_of(cfg.evaluate.logits_precision),
    )
    state.evaluation = Evaluation(state.batches.texts, settings)
    open_cache(state)


def _load_base(state: Run) -> None:
    cfg = state.cfg
    with state.bar("load base", len(state.layout.grid), "tensors") as advance:
        state.base = load_base(
            state.source, state.layout, cfg.storage, state.device, state.tokenizer, advance
        )
    deploy_others(state.base.model, state.base.grid, cfg.export.other_type.name)
    load_teacher(state)


def _attach(state: Run) -> None:
    cfg = state.cfg
    if cfg.distill.train is Trained.weights:
        state.adapted = attach_latents(state.base, LatentRule(cfg.distill.steps.name))
    elif cfg.adapter.path is None:
        state.adapted = attach(state.base, adapter_rule(cfg.adapter, cfg.seed))
    else:
        state.adapted, identity = load_adapter(state.base, Path(cfg.adapter.path))
        state.recorded = identity.deployed


def _evaluate_base(state: Run) -> None:
    adapted = state.adapted
    keep_teacher_states(state)
    with adapted.as_base(), state.held_weights():
        _measure(state, "base", adapted.model)
        _answer(state, "base")


def _train(state: Run) -> None:
    cfg = state.cfg
    with state.bar("train", cfg.train.max_steps, "steps") as advance:
        state.train = train(
            state.adapted,
            state.batches.train,
            build_objective(cfg.teacher, batch_teacher(state), state.dtype),
            cfg.train,
            cfg.logging,
            run_dir=state.run_dir,
            seed=cfg.seed,
            bf16=state.dtype == torch.bfloat16,
            on_step=advance,
        )
    state.adapted.settle()
    state.recorded = state.adapted.deployed_digests()
    state.teacher = None  # its states are kept; its memory is needed for the file read back


def _save_adapter(state: Run) -> None:
    assert isinstance(state.adapted, AdaptedModel)
    state.recorded = save_adapter(state.adapted, state.run_dir / "adapter").deployed


def _evaluate_trained(state: Run) -> None:
    adapted = state.adapted
    with state.held_weights():
        _measure(state, "trained", adapted.model, keep=True)
        _answer(state, "trained")
    for (name, before), (_, after) in zip(adapted.base_blocks(), adapted.deployed(), strict=True):
        change = changed_share(before, after)
        state.num_changed += change.num_levels + change.num_steps
        if name in state.base.trained:
            state.changes.append(LayerChange(name, change.levels_share, change.steps_share))


def _write_candidate(state: Run) -> None:
    cfg, base = state.cfg, state.base
    stamp = {
        "version": __version__,
        "llama_cpp": llama_cpp_version(),
        "recipe": cfg.card.name,
        "base": base.name,
        "base_digest": base.digest,
        "storage": base.storage,
    }
    rule = state.adapted.rule
    kind = "adapter" if isinstance(rule, AdapterRule) else "latents"
    stamp[kind] = str(dataclasses.asdict(rule))
    if cfg.guard.override is not None:
        stamp["guard_override"] = cfg.guard.override
    with state.bar("write candidate", len(base.grid), "tensors") as advance:
        state.candidate = write_candidate(state.adapted, cfg.export, state.run_dir, stamp, advance)


def _guard(state: Run) -> None:
    """Read the candidate back as a model of its own and put all gates before it."""
    cfg, evaluation, candidate = state.cfg, state.evaluation, state.candidate
    if state.recorded.keys() != set(state.base.grid):
        raise AdapterError(
            f"The adapter recorded {len(state.recorded)} deployed tensors and the base has "
            f"{len(state.base.grid)} Q4_0 tensors; they must be the same. Set base.trained as in "
            "the adapter's run."
        )
    gates = [identity_gate(candidate, state.adapted.deployed(), state.recorded, cfg.guard)]
    with state.held_weights():
        self_kld = evaluation.self_kld_max(state.adapted.model)
    read_back = model_from_gguf if cfg.evaluate.hold_weights else packed_model_from_gguf
    if not cfg.evaluate.hold_weights:
        state.adapted.model.to("cpu")  # the file takes its place on the device
    config = plain_config(state.source.folder)
    merged = read_back(candidate.path, config, torch.bfloat16).to(state.device).eval()
    roundtrip = _measure(state, "merged", merged, against="trained")
    del merged
    gates += before_after_gates(self_kld, roundtrip, cfg.guard)
    gates += effect_gates(state.num_changed, _improvement(state), cfg.guard)
    before, after = evaluation.kld("base", "general"), evaluation.kld("merged", "general")
    gates.append(drift_gate(before, after, cfg.guard))
    gates += runtime_gates(state)
    state.guard = verdict(gates, cfg.guard.override)
    if not state.guard.passed:
        try:
            _write_report(state)  # a failed run leaves its figures, too
        except ReportError as problem:  # a figure is no number: the guard says so below
            progress.say(str(problem))


def _publish(state: Run) -> None:
    state.export = publish(state.candidate, permit(state.candidate, state.guard))


def _write_report(state: Run) -> None:
    report = report_of(state)
    write_report(report, state.run_dir)
    progress.console.print(to_console(report))


STAGES: dict[str, Callable[[Run], None]] = {
    "preflight": lambda state: processes.first_before_rest(lambda: _preflight(state)),
    "plan": plan,
    "inspect": inspect,
    "build": build,
    "preview_data": preview_data,
    "load_data": _load_data,
    "teacher_cache": teacher_cache,
    "load_base": _load_base,
    "attach": _attach,
    "evaluate_base": _evaluate_base,
    "evaluate_reference": evaluate_reference,
    "train": _train,
    "save_adapter": _save_adapter,
    "evaluate_trained": _evaluate_trained,
    "write_candidate": _write_candidate,
    "guard": _guard,
    "publish": _publish,
    "save_base": save_base,
    "benchmark": benchmark,
    "validate": validate,
    "fidelity": fidelity,
    "report": _write_report,
    "decide": decide,
}


def _measure(
    state: Run, name: str, model: torch.nn.Module, **options: Any
) -> dict[str, KldSummary]:
    """`Evaluation.measure` under a progress bar."""
    with state.bar(f"evaluate {name}", state.evaluation.num_tokens, "tokens") as advance:
        return state.evaluation.measure(name, model, advance, **options)


def _improvement(state: Run) -> Mean:
    """What the guard's effect is measured by, base minus merged, paired by token."""
    before, after = state.evaluation.scores["base"], state.evaluation.scores["merged"]
    if state.cfg.guard.effect is Effect.task_loss:
        return mean_difference(before["task"].nll, after["task"].nll)
    base_kld, merged_kld = before["general"].kld, after["general"].kld
    assert base_kld is not None, "the rules ask for a teacher"
    assert merged_kld is not None
    return mean_difference(base_kld, merged_kld)


def _answer(state: Run, name: str) -> None:
    prompts = state.batches.prompts
    if "report" not in state.cfg.stages or not prompts:
        return
    length = state.cfg.evaluate.sample_max_new_tokens
    with state.bar(f"answers of {name}", len(prompts), "answers") as advance, state.autocast():
        state.answers[name] = answers(state.adapted.model, state.tokenizer, prompts, length)
        advance(len(prompts))
