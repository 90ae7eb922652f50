"""The suite `adapters`: tune every method alike, repeat the best over seeds, summarize.

    for every method: the first seed at every learning rate
                      -> the rate with the lowest loss on the validation text, as deployed;
                         while it is the lowest or highest tried, one more beyond it
                      -> the other seeds at that rate

A finished trial is a JSON file; one whose settings have not changed is not run again.
"""

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from qatlora import __version__, files
from qatlora.adapters.saved import GRID_VERSION
from qatlora.benchmark.methods import BOUND, METHODS
from qatlora.benchmark.trial import Trial
from qatlora.config import BenchmarkConfig, BenchmarkMethod
from qatlora.report.results_benchmark import Losses, MethodRun, MethodSummary, Spread

RunTrial = Callable[[Trial], MethodRun]


def run_all(
    methods: Sequence[BenchmarkMethod], settings: BenchmarkConfig, run: RunTrial
) -> list[MethodRun]:
    """Every trial of the suite: tuning on the first seed, then the best rate on the others."""

    def trial(method: BenchmarkMethod, rate: float, seed: int) -> MethodRun:
        return run(Trial(method, rate, rate * settings.steps_rate_factor, seed))

    first, *others = settings.seeds
    runs = []
    for method in methods:
        tuned = [trial(method, rate, first) for rate in settings.learning_rates]
        for _ in range(settings.extra_rates):
            beyond = _rate_beyond(tuned)
            if beyond is None:
                break
            tuned.append(trial(method, beyond, first))
        runs += tuned + [trial(method, _best(tuned).learning_rate, seed) for seed in others]
    return runs


def _best(tuned: Sequence[MethodRun]) -> MethodRun:
    return min(tuned, key=lambda each: each.judged.validation)


def _rate_beyond(tuned: Sequence[MethodRun]) -> float | None:
    """The next rate past the end at which the best one lies; None if it lies between others.

    It continues the distance, as a factor, between the last two.
    """
    rates = sorted(run.learning_rate for run in tuned)
    best = _best(tuned).learning_rate
    if len(rates) < 2 or rates[0] < best < rates[-1]:
        return None
    last, neighbour = (rates[0], rates[1]) if best == rates[0] else (rates[-1], rates[-2])
    return float(f"{last * last / neighbour:.6g}")


def most_trials(methods: Sequence[BenchmarkMethod], settings: BenchmarkConfig) -> int:
    """How many trainings `run_all` takes at most."""
    tuning = len(settings.learning_rates)
    if tuning > 1:
        tuning += settings.extra_rates
    return len(methods) * (tuning + len(settings.seeds) - 1)


def summarize(runs: Sequence[MethodRun], before: Losses) -> list[MethodSummary]:
    """One line per method at its best rate, in the order of the runs."""
    best = {name: _best_runs(runs, name) for name in dict.fromkeys(run.method for run in runs)}
    bound = {run.seed: before.task - run.unmerged.task for run in best.get(BOUND.name, [])}
    return [_summary(name, own, before, bound) for name, own in best.items()]


def _best_runs(runs: Sequence[MethodRun], method: str) -> list[MethodRun]:
    """The method's runs at the rate that was chosen on the first seed."""
    own = [run for run in runs if run.method == method]
    tuned = [run for run in own if run.seed == own[0].seed]
    rate = _best(tuned).learning_rate
    return [run for run in own if run.learning_rate == rate]


def _summary(
    name: str, runs: list[MethodRun], before: Losses, bound: dict[int, float]
) -> MethodSummary:
    def share(losses: Losses | None, seed: int) -> float | None:
        gain = bound.get(seed)
        return None if losses is None or not gain else (before.task - losses.task) / gain

    is_plain = METHODS[BenchmarkMethod[name]].kind is None
    merged = [share(run.deployed, run.seed) if is_plain else None for run in runs]
    return MethodSummary(
        method=name,
        label=METHODS[BenchmarkMethod[name]].label,
        learning_rate=runs[0].learning_rate,
        seeds=len(runs),
        task=_required(run.judged.task for run in runs),
        general=_required(run.judged.general for run in runs),
        general_kld=_required(run.judged.general_kld for run in runs),
        share=_spread(share(run.judged, run.seed) for run in runs),
        merged_share=_spread(merged),
        codes_changed=_spread(run.codes_changed for run in runs),
        steps_changed=_spread(run.steps_changed for run in runs),
        trainable_parameters=runs[0].trainable_parameters,
        seconds=_required(run.seconds for run in runs),
    )


def _required(values: Iterable[float]) -> Spread:
    spread = _spread(values)
    assert spread is not None
    return spread


def _spread(values: Iterable[float | None]) -> Spread | None:
    """None if a value is missing: a median over fewer seeds would not be the same figure."""
    known = list(values)
    present = [value for value in known if value is not None]
    if len(present) < len(known):
        return None
    return Spread(statistics.median(present), min(present), max(present))


class Records:
    """Finished trials as JSON files, one each, written whole or not at all."""

    def __init__(self, folder: Path, common: dict[str, Any]) -> None:
        """`common` holds what decides the results of all trials alike; JSON values."""
        self._folder, self._common = folder, common

    def find_or_run(self, trial: Trial, own: dict[str, Any], run: RunTrial) -> MethodRun:
        """The recorded run of this trial under the same settings, or a new one.

        `own` holds what, besides the trial and the common settings, decides this result.
        """
        path = self._folder / f"{trial.method.name}-{trial.learning_rate:g}-{trial.seed}.json"
        digest = self._digest(trial, own)
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["settings_digest"] == digest:
                return _from_json(stored["run"])
        finished = run(trial)
        files.write_json(path, {"settings_digest": digest, "run": dataclasses.asdict(finished)})
        return finished

    def _digest(self, trial: Trial, own: dict[str, Any]) -> str:
        method = dataclasses.asdict(METHODS[trial.method])
        settings = {
            "trial": dataclasses.asdict(trial) | {"method": method},
            "version": __version__,
            "grid_version": GRID_VERSION,
            **self._common,
            **own,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _from_json(stored: dict[str, Any]) -> MethodRun:
    losses = {
        key: None if stored[key] is None else Losses(**stored[key])
        for key in ("unmerged", "deployed")
    }
    return MethodRun(**stored | losses)
