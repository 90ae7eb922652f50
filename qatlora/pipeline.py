"""The main path: a recipe is a list of stages, and this file is what each of them does.

    preflight -> load_data -> load_base -> attach -> evaluate_base -> train -> save_adapter
              -> evaluate_trained -> write_candidate -> guard -> publish -> report

qat_distill adds evaluate_reference before train and save_base after publish; inspect, preview_data,
benchmark, fidelity and validate are one stage between preflight and report, the builds two (build,
fidelity), teacher_cache one after load_data, plan and apply_patch one before report; decide ends
validate with its exit code. Those stages, the longer ones among the above, scores while training,
and where a run's teacher comes from are told in `qatlora.stages`. The doctor runs without this file
(`qatlora.doctor`).

A stage reads what earlier stages left in `Run` and adds its own result. The work itself is in the
rooms; none of them sees the root config.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qatlora import files, processes, progress
from qatlora.adapters.attach import AdaptedModel, adapter_rule, attach, changed_share
from qatlora.adapters.deployed import AdapterRule, LatentRule
from qatlora.adapters.latents import attach_latents
from qatlora.adapters.saved import load_adapter, save_adapter
from qatlora.base.load import load_base
from qatlora.base.others import deploy_others, others_to
from qatlora.config import Latent, RootConfig, Trained
from qatlora.data.load import load_data
from qatlora.data.templates import training_template
from qatlora.evaluate import ScoreSettings
from qatlora.evaluate.models import Evaluation
from qatlora.evaluate.samples import answers
from qatlora.export.candidate import write_candidate
from qatlora.report.results import LayerChange, RunReport, StageTime
from qatlora.run_folder import claimed
from qatlora.stages.benchmark import benchmark
from qatlora.stages.build import build
from qatlora.stages.curve import curve_scorer
from qatlora.stages.fidelity import fidelity
from qatlora.stages.guard import guard
from qatlora.stages.inspect import inspect
from qatlora.stages.patch import apply_step_patch
from qatlora.stages.plan import plan
from qatlora.stages.preflight import preflight
from qatlora.stages.preview import preview_data
from qatlora.stages.publish import publish
from qatlora.stages.qat_distill import evaluate_reference, save_base
from qatlora.stages.report import report
from qatlora.stages.resume import SETTINGS, check_run_folder
from qatlora.stages.teacher import (
    batch_teacher,
    keep_teacher_states,
    load_teacher,
    open_cache,
)
from qatlora.stages.teacher_cache import teacher_cache
from qatlora.stages.validate import decide, validate
from qatlora.state import Run, dtype_of, report_of
from qatlora.tracking import open_tracker
from qatlora.train.checkpoints import steps_done
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
        with claimed(state.run_dir), state.tracked():
            settings = state.settings()
            check_run_folder(state, settings)
            for name in cfg.stages:
                start = time.monotonic()
                STAGES[name](state)
                state.times.append(StageTime(name, time.monotonic() - start))
                if len(state.times) == 1:  # what the preflight refuses leaves the folder free
                    files.write_json(state.run_dir / SETTINGS, settings)
            return report_of(state)


def _help_to_train(state: Run) -> RunReport:
    """The part of a process that is not the first: it trains, and writes nothing."""
    progress.console.quiet = True
    state.cfg.logging.progress_bars = False
    for name in ("preflight", "load_data", "load_base", "attach", "train"):
        STAGES[name](state)
    return report_of(state)


def _load_data(state: Run) -> None:
    cfg = state.cfg
    state.batches = load_data(
        cfg.data, state.tokenizer, cfg.seed, cfg.train.max_steps, cfg.train.rows_per_step
    )
    state.tokenizer.chat_template = training_template(state.tokenizer)
    settings = ScoreSettings(
        chunk_tokens=cfg.evaluate.tokens_per_chunk,
        compute_dtype=dtype_of(cfg.evaluate.logits_precision),
        autocast=state.dtype == torch.bfloat16,
    )
    state.evaluation = Evaluation(state.batches.texts, settings)
    open_cache(state)


def _load_base(state: Run) -> None:
    cfg = state.cfg
    with state.bar("load base", len(state.layout.grid), "tensors") as advance:
        state.base = load_base(
            state.source, state.layout, cfg.storage, state.device, state.tokenizer, advance
        )
    others_to(state.base.model, state.dtype)
    deploy_others(state.base.model, state.base.grid, cfg.export.other_type.name)
    load_teacher(state)


def _attach(state: Run) -> None:
    cfg = state.cfg
    if cfg.distill.train is Trained.weights:
        dtype = torch.bfloat16 if cfg.distill.latent is Latent.bf16 else torch.float32
        state.adapted = attach_latents(state.base, LatentRule(cfg.distill.steps.name), dtype)
    elif cfg.adapter.path is None:
        state.adapted = attach(state.base, adapter_rule(cfg.adapter, cfg.seed))
    else:
        state.adapted, identity = load_adapter(state.base, Path(cfg.adapter.path))
        state.recorded = identity.deployed


def _evaluate_base(state: Run) -> None:
    adapted = state.adapted
    keep_teacher_states(state)
    with adapted.as_base(), state.held_weights():
        state.measure("base", adapted.model)
        _answer(state, "base")


def _train(state: Run) -> None:
    cfg = state.cfg
    if processes.is_first():
        last_step = steps_done(state.run_dir, resume=cfg.train.resume)
        state.tracker = open_tracker(cfg.logging, state.run_dir, state.settings(), last_step)
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
            on_point=state.tracker.log,
            on_eval=curve_scorer(state),
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
        state.measure("trained", adapted.model, keep=True)
        _answer(state, "trained")
    for (name, before), (_, after) in zip(adapted.base_blocks(), adapted.deployed(), strict=True):
        change = changed_share(before, after)
        state.num_changed += change.num_levels + change.num_steps
        if name in state.base.trained:
            state.changes.append(LayerChange(name, change.levels_share, change.steps_share))


def _write_candidate(state: Run) -> None:
    cfg, base = state.cfg, state.base
    stamp = state.stamp() | {"recipe": cfg.card.name}
    rule = state.adapted.rule
    kind = "adapter" if isinstance(rule, AdapterRule) else "latents"
    stamp[kind] = str(dataclasses.asdict(rule))
    if cfg.guard.override is not None:
        stamp["guard_override"] = cfg.guard.override
    with state.bar("write candidate", len(base.grid), "tensors") as advance:
        state.candidate = write_candidate(state.adapted, cfg.export, state.run_dir, stamp, advance)


STAGES: dict[str, Callable[[Run], None]] = {
    "preflight": lambda state: processes.first_before_rest(lambda: preflight(state)),
    "apply_patch": apply_step_patch,
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
    "guard": guard,
    "publish": publish,
    "save_base": save_base,
    "benchmark": benchmark,
    "validate": validate,
    "fidelity": fidelity,
    "report": report,
    "decide": decide,
}


def _answer(state: Run, name: str) -> None:
    prompts = state.batches.prompts
    if "report" not in state.cfg.stages or not prompts:
        return
    length = state.cfg.evaluate.sample_max_new_tokens
    with state.bar(f"answers of {name}", len(prompts), "answers") as advance, state.autocast():
        state.answers[name] = answers(state.adapted.model, state.tokenizer, prompts, length)
        advance(len(prompts))
