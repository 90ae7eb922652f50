"""The suite adapters: its plan, its arithmetic, its records. Trainings are made up."""

import dataclasses
import math
from pathlib import Path

import pytest

from qatlora.benchmark.adapters import Records, most_trials, run_all, summarize
from qatlora.benchmark.trial import Trial
from qatlora.config import BenchmarkConfig, BenchmarkMethod
from qatlora.report.results_benchmark import Losses, MethodRun

BOUND, NF4, STEPS = (BenchmarkMethod[m] for m in ("peft_bf16", "peft_nf4", "steps_q4_0"))
SETTINGS = BenchmarkConfig(learning_rates=[1e-3, 2e-3], extra_rates=0, seeds=[0, 5])
BEFORE = Losses(task=3.0, validation=3.0, general=3.0, general_kld=0.0)


def losses(task: float) -> Losses:
    return Losses(task, task, 3.1, 0.1)


def made_up(trial: Trial) -> MethodRun:
    """The bound gains 1 nat, a merge keeps a fifth of it, steps gain 0.9; 2e-3 is the better."""
    worse = 0.0 if trial.learning_rate == 2e-3 else 0.3
    gain = {BOUND: 1.0, NF4: 1.0, STEPS: 0.9}[trial.method]
    unmerged = losses(3.0 - gain + worse)
    plain = trial.method is not STEPS
    return MethodRun(
        method=trial.method.name,
        learning_rate=trial.learning_rate,
        seed=trial.seed,
        unmerged=unmerged,
        deployed=losses(2.8 + worse / 10) if plain else unmerged,
        codes_changed=0.1 if plain else 0.0,
        steps_changed=0.5,
        trainable_parameters=100,
        seconds=float(trial.seed + 1),
    )


def test_every_method_is_tuned_on_the_first_seed_and_repeated_at_its_best_rate() -> None:
    seen: list[Trial] = []

    def run(trial: Trial) -> MethodRun:
        seen.append(trial)
        return made_up(trial)

    run_all([BOUND, STEPS], SETTINGS, run)
    assert len(seen) == most_trials([BOUND, STEPS], SETTINGS) == 6
    plan = [(t.method, t.learning_rate, t.seed) for t in seen]
    assert plan[:3] == [(BOUND, 1e-3, 0), (BOUND, 2e-3, 0), (BOUND, 2e-3, 5)]
    assert all(t.steps_learning_rate == 10 * t.learning_rate for t in seen)


@pytest.mark.parametrize(
    ("best_rate", "tried"),
    [
        (2e-3, [1e-3, 2e-3, 4e-3]),
        (8e-3, [1e-3, 2e-3, 4e-3, 8e-3]),  # and no more than two beyond
        (5e-4, [1e-3, 2e-3, 5e-4, 2.5e-4]),
    ],
)
def test_rates_beyond_an_end_are_tried_while_the_best_lies_there(
    best_rate: float, tried: list[float]
) -> None:
    settings = dataclasses.replace(SETTINGS, extra_rates=2)

    def run(trial: Trial) -> MethodRun:
        found = losses(abs(math.log(trial.learning_rate / best_rate)))
        return dataclasses.replace(made_up(trial), unmerged=found, deployed=found)

    runs = run_all([STEPS], settings, run)
    assert [run.learning_rate for run in runs] == [*tried, best_rate]
    assert len(runs) <= most_trials([STEPS], settings) == 5


def test_shares_are_of_the_gain_that_the_bound_makes_unmerged() -> None:
    runs = run_all([BOUND, NF4, STEPS], SETTINGS, made_up)
    bound, nf4, steps = summarize(runs, BEFORE)
    assert bound.share.median == 1
    assert bound.merged_share.median == pytest.approx(0.2)
    assert nf4.share.median == pytest.approx(0.2)
    assert steps.share.median == pytest.approx(0.9)
    assert steps.merged_share is None
    assert steps.learning_rate == 2e-3
    assert (steps.seeds, steps.seconds.low, steps.seconds.high) == (2, 1.0, 6.0)


def test_without_the_bound_there_are_no_shares() -> None:
    (steps,) = summarize(run_all([STEPS], SETTINGS, made_up), BEFORE)
    assert steps.share is None


def test_what_was_not_merged_is_left_out_of_the_merged_shares() -> None:
    def unmergeable(trial: Trial) -> MethodRun:
        return dataclasses.replace(made_up(trial), deployed=None)

    bound, _ = summarize(run_all([BOUND, NF4], SETTINGS, unmergeable), BEFORE)
    assert bound.merged_share is None


def test_a_finished_trial_is_not_run_again_unless_its_settings_changed(tmp_path: Path) -> None:
    trial, ran = Trial(STEPS, 1e-3, 1e-2, 0), []

    def run(each: Trial) -> MethodRun:
        ran.append(each)
        return made_up(each)

    first = Records(tmp_path, {"base": "a"}).find_or_run(trial, {"rows": 1}, run)
    assert Records(tmp_path, {"base": "a"}).find_or_run(trial, {"rows": 1}, run) == first
    assert len(ran) == 1
    Records(tmp_path, {"base": "b"}).find_or_run(trial, {"rows": 1}, run)
    Records(tmp_path, {"base": "b"}).find_or_run(trial, {"rows": 2}, run)
    assert len(ran) == 3
    assert len(list(tmp_path.iterdir())) == 1
