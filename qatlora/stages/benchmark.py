"""The stage `benchmark`: one suite on the run's base."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable

import torch

from qatlora import progress
from qatlora.base.grids import ON_GRID_SHARE
from qatlora.base.layout import find_layout
from qatlora.base.load import load_base, load_tokenizer
from qatlora.base.names import is_stack
from qatlora.base.on_grid import on_grid_share, rounded_folder
from qatlora.base.others import deploy_others, others_to
from qatlora.base.source import find_source
from qatlora.benchmark.adapters import Records, most_trials, run_all, summarize
from qatlora.benchmark.build import Ground
from qatlora.benchmark.merged import why_not_mergeable
from qatlora.benchmark.methods import METHODS, chosen_methods
from qatlora.benchmark.speed import measure_speed, num_steps
from qatlora.benchmark.trial import Bench, Trial, blocks_of, measured, run_trial
from qatlora.config import BaseConfig, BenchmarkSuite, Storage, StorageConfig
from qatlora.data.domain import DomainSettings, load_domain
from qatlora.data.rows import Batches, Row
from qatlora.data.templates import chosen_template
from qatlora.errors import ConfigError
from qatlora.evaluate import ScoreSettings
from qatlora.evaluate.models import Evaluation
from qatlora.report.json_report import plain
from qatlora.report.results_benchmark import AdaptersResult, BenchmarkResult, Losses, MethodRun
from qatlora.state import Run, dtype_of


def benchmark(state: Run) -> None:
    """Run the suite and leave its result for the report."""
    if state.cfg.benchmark.suite is BenchmarkSuite.speed:
        _speed(state)
    else:
        _adapters(state)


def check_benchmark(state: Run) -> None:
    """Check that PEFT's own LoRA, the baseline, goes on every trained weight.

    Raises:
        ConfigError: experts are among them.
    """
    if any(map(is_stack, state.layout.trained)):
        raise ConfigError(
            f"{state.source.name} is a mixture of experts, and the baselines of the benchmark are "
            "PEFT's own LoRA on linears alone. Leave the experts out: "
            "\"base.trained=['model.language_model.layers.[0-9]+.(self_attn|mlp).*']\"."
        )


def _speed(state: Run) -> None:
    cfg = state.cfg
    methods = chosen_methods(cfg.benchmark.suite, cfg.benchmark.methods)
    with state.bar("time steps", num_steps(methods, cfg.benchmark), "steps") as advance:
        result = measure_speed(
            methods,
            _ground(state),
            cfg.benchmark,
            cfg.train,
            row_tokens=cfg.data.max_length_tokens,
            seed=cfg.seed,
            on_step=advance,
        )
    state.benchmark = BenchmarkResult(speed=result)


def _adapters(state: Run) -> None:
    cfg, settings = state.cfg, state.cfg.benchmark
    methods = chosen_methods(settings.suite, settings.methods)
    rounded_by = _stand_on_grid(state)
    ground = _ground(state)
    tokenizer = load_tokenizer(state.source.folder)
    domain = DomainSettings(
        domain=settings.domain,
        general=cfg.data.general,
        max_length_tokens=cfg.data.max_length_tokens,
        num_rows=settings.max_steps * settings.rows_per_step,
        eval_tokens=settings.eval_tokens,
    )
    batches = {seed: load_domain(domain, tokenizer, seed) for seed in settings.seeds}
    bench, before, base_digest = _bench(state, ground, batches[settings.seeds[0]])
    records = Records(state.run_dir / "runs", _common(state, bench, base_digest))

    with state.bar("trials", most_trials(methods, settings), "trials") as advance:

        def run(trial: Trial) -> MethodRun:
            finished = records.find_or_run(
                trial,
                _own(trial, batches[trial.seed]),
                lambda new: run_trial(new, bench, batches[new.seed]),
            )
            advance(1)
            return finished

        runs = run_all(methods, settings, run)
    missing = why_not_mergeable() if any(METHODS[m].kind is None for m in methods) else None
    state.batches = batches[settings.seeds[0]]
    state.benchmark = BenchmarkResult(
        adapters=AdaptersResult(
            rounded_by=rounded_by,
            domain=settings.domain,
            max_steps=settings.max_steps,
            tokens_per_step=settings.rows_per_step * cfg.data.max_length_tokens,
            before=before,
            summaries=summarize(runs, before),
            runs=runs,
            skipped=[missing] if missing else [],
        )
    )


def _stand_on_grid(state: Run) -> str | None:
    """Let source and layout be those of a base on the grid; says how it was rounded, if it was."""
    share = on_grid_share(state.source, state.layout, state.device)
    if share >= ON_GRID_SHARE:
        return None
    by = state.cfg.benchmark.grid_by.name
    progress.say(f"{state.source.name}: {share:.1%} of the blocks on a grid; rounding by {by}")
    folder = rounded_folder(state.source, state.layout, by, state.device, state.run_dir)
    base = BaseConfig(path=str(folder), name=state.source.name, trained=state.cfg.base.trained)
    state.source = find_source(base, chosen_template(state.cfg.base.chat_template))
    state.layout = find_layout(state.source, base)
    return by


def _ground(state: Run) -> Ground:
    return Ground(
        source=state.source,
        layout=state.layout,
        adapter=state.cfg.adapter,
        other_type=state.cfg.export.other_type.name,
        device=state.device,
        compute_dtype=state.dtype,
    )


def _bench(state: Run, ground: Ground, batches: Batches) -> tuple[Bench, Losses, str]:
    """The base itself: its blocks, its states as the teacher, its losses, its digest."""
    storage = StorageConfig(kind=Storage.q4_0)
    base = load_base(ground.source, ground.layout, storage, ground.device, state.tokenizer)
    others_to(base.model, state.dtype)
    deploy_others(base.model, base.grid, ground.other_type)
    settings = ScoreSettings(
        compute_dtype=dtype_of(state.cfg.evaluate.logits_precision),
        autocast=state.dtype == torch.bfloat16,
    )
    evaluation = Evaluation(batches.texts, settings)
    with state.bar("base's states", evaluation.num_tokens, "tokens") as advance:
        evaluation.measure("base", base.model, advance, keep=True)
    evaluation.teacher = evaluation.states.pop("base")
    suite = state.cfg.benchmark
    train = dataclasses.replace(
        state.cfg.train,
        max_steps=suite.max_steps,
        rows_per_step=suite.rows_per_step,
        micro_batch_rows=suite.rows_per_step,
    )
    bench = Bench(ground, blocks_of(base), evaluation, train)
    return bench, measured(base.model, evaluation), base.digest


def _common(state: Run, bench: Bench, base_digest: str) -> dict[str, object]:
    """What decides the results of all trials alike: base, texts, course, adapter."""
    cfg, ground = state.cfg, bench.ground
    return {
        "base": base_digest,
        "texts": [_digest_of(text.rows) for text in bench.evaluation.texts],
        "train": plain(dataclasses.asdict(bench.train)),
        "adapter": [cfg.adapter.rank, cfg.adapter.alpha, cfg.adapter.steps_rank],
        "other_type": ground.other_type,
        "compute_dtype": str(ground.compute_dtype),
    }


def _own(trial: Trial, batches: Batches) -> dict[str, object]:
    """What decides one trial's result besides: its rows, and whether a merge can be quantized."""
    is_plain = METHODS[trial.method].kind is None
    return {
        "rows": _digest_of(batches.train),
        "merged": why_not_mergeable() is None if is_plain else None,
    }


def _digest_of(rows: Iterable[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.input_ids).encode())
    return digest.hexdigest()
