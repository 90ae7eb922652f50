import pytest

from qatlora.config import Effect, GuardConfig
from qatlora.evaluate import KldStatistics, Mean
from qatlora.guard.gates import (
    before_after_gates,
    drift_gate,
    effect_gates,
    llama_cpp_failed,
    llama_cpp_gates,
    llama_cpp_skipped,
)
from qatlora.guard.judge import explain, verdict
from qatlora.report.results import GateResult
from qatlora.report.results_runtime import (
    CANDIDATE,
    CANDIDATE_F32,
    CONTROL,
    TRAINED_FP32,
    RuntimeKld,
    RuntimeResult,
    RuntimeRow,
)

LIMITS = GuardConfig(
    roundtrip_kld_mean_max_nats=1e-6,
    roundtrip_kld_p99_max_nats=1e-5,
    roundtrip_same_top_min_share=0.99,
    effect_min_standard_errors=2.0,
    drift_kld_increase_max_nats=0.25,
)


def kld(mean: float = 0.0, p99: float = 0.0, same_top: float = 1.0) -> KldStatistics:
    rest = dict.fromkeys(("mean_stderr", "median", "p90", "p95", "p999", "max", "min"), 0.0)
    more = dict.fromkeys(("same_top_stderr", "rms_dp", "rms_dp_stderr"), 0.0)
    return KldStatistics(mean=mean, p99=p99, same_top=same_top, **rest, **more)


def statuses(gates: list[GateResult]) -> dict[str, str]:
    return {gate.name: gate.status for gate in gates}


@pytest.mark.parametrize(
    ("gate", "at_the_limit", "beyond"),
    [
        ("before_after_kld_mean", kld(mean=1e-6), kld(mean=1.001e-6)),
        ("before_after_kld_p99", kld(p99=1e-5), kld(p99=1.001e-5)),
        ("before_after_same_top", kld(same_top=0.99), kld(same_top=0.9899)),
    ],
)
def test_before_and_after_pass_at_the_limit_and_fail_beyond_it_on_any_text(
    gate: str, at_the_limit: KldStatistics, beyond: KldStatistics
):
    passed = before_after_gates(0.0, {"task": at_the_limit, "general": at_the_limit}, LIMITS)
    assert set(statuses(passed).values()) == {"passed"}
    for texts in ({"task": beyond, "general": kld()}, {"task": kld(), "general": beyond}):
        found = statuses(before_after_gates(0.0, texts, LIMITS))
        assert found.pop(gate) == "failed"
        assert set(found.values()) == {"passed"}


@pytest.mark.parametrize(("value", "status"), [(0.0, "passed"), (1e-12, "failed")])
def test_a_model_that_differs_from_itself_fails(value: float, status: str):
    assert statuses(before_after_gates(value, {"task": kld()}, LIMITS))["self_kld"] == status


@pytest.mark.parametrize("name", ["mean", "p99", "same_top"])
def test_a_figure_that_is_no_number_fails(name: str):
    texts = {"task": kld(), "general": kld(**{name: float("nan")})}
    assert "failed" in statuses(before_after_gates(0.0, texts, LIMITS)).values()


@pytest.mark.parametrize(
    ("num_changed", "improvement", "changed", "loss"),
    [
        (1, Mean(0.25, 0.125), "passed", "passed"),
        (0, Mean(0.25, 0.125), "failed", "passed"),
        (1, Mean(0.2499, 0.125), "passed", "failed"),
        (1, Mean(-1.0, 0.125), "passed", "failed"),
        (1, Mean(0.0, 0.0), "passed", "failed"),
        (1, Mean(float("nan"), 0.125), "passed", "failed"),
    ],
)
def test_an_effect_is_a_change_and_a_loss_that_fell_by_some_standard_errors(
    num_changed: int, improvement: Mean, changed: str, loss: str
):
    found = statuses(effect_gates(num_changed, improvement, LIMITS))
    assert found == {"effect_changed": changed, "effect_loss": loss}


def test_a_distillation_is_judged_by_the_kld_to_its_teacher():
    limits = GuardConfig(effect=Effect.teacher_kld)
    good, bad = (effect_gates(1, Mean(value, 0.1), limits)[1] for value in (0.3, 0.1))
    assert (good.name, good.status, bad.status) == ("effect_kld", "passed", "failed")
    assert good.message == "KLD to the teacher on general text fell by 0.3000 +- 0.1000 nats/token"
    assert "came no nearer" in explain(verdict([bad], None))


def test_no_effect_is_asked_for_when_none_is_required():
    gates = effect_gates(0, Mean(-1.0, 0.1), GuardConfig(require_effect=False))
    assert set(statuses(gates).values()) == {"skipped"}
    assert all("guard.require_effect=false" in gate.message for gate in gates)
    assert [gate.value for gate in gates] == [0.0, pytest.approx(-10.0)]


@pytest.mark.parametrize(
    ("base", "merged", "status"),
    [
        (1.0, 1.25, "passed"),
        (1.0, 1.2501, "failed"),
        (1.0, 0.5, "passed"),
        (1.0, float("nan"), "failed"),
    ],
)
def test_drift_is_the_increase_of_the_distance_from_the_teacher(
    base: float, merged: float, status: str
):
    gate = drift_gate(kld(base), kld(merged), LIMITS)
    assert gate.status == status
    assert gate.limit == 0.25


def test_without_a_teacher_drift_is_skipped_with_the_reason():
    for pair in ((None, None), (None, kld()), (kld(), None)):
        gate = drift_gate(*pair, LIMITS)
        assert (gate.status, gate.value) == ("skipped", None)
        assert "there is no teacher" in gate.message


def runtime(
    weights: float = 1e-6, own: float = 2e-3, teacher: tuple[float, float] | None = (0.4, 0.41)
) -> RuntimeResult:
    """Figures of gate 5; the pair is what transformers and llama.cpp find to the teacher."""

    def row(model: str, to_trained: float | None, to_teacher: float | None) -> RuntimeRow:
        pair = (
            None if mean is None else RuntimeKld(mean, 0.0, 0.0, 0.0, 1.0, 0.0)
            for mean in (to_trained, to_teacher)
        )
        return RuntimeRow(model, 10.0, 1.0, *pair)

    by_hf, by_llama = teacher or (None, None)
    rows = [
        row(TRAINED_FP32, None, by_hf),
        row(CANDIDATE_F32, weights, None),
        row(CANDIDATE, own, by_llama),
        row(CONTROL, 0.03, by_llama),
    ]
    return RuntimeResult(3, 256, 381, rows)


@pytest.mark.parametrize(
    ("gate", "at_the_limit", "beyond"),
    [
        ("llama_cpp_weights", runtime(weights=5e-4), runtime(weights=5.01e-4)),
        ("llama_cpp", runtime(own=0.01), runtime(own=0.0101)),
        ("llama_cpp_teacher", runtime(teacher=(0.5, 0.48001)), runtime(teacher=(0.5, 0.4799))),
        ("llama_cpp_teacher", runtime(teacher=(0.5, 0.51999)), runtime(teacher=(0.5, 0.5201))),
        ("llama_cpp", runtime(), runtime(own=float("nan"))),
    ],
)
def test_the_runtime_agrees_within_its_limits(
    gate: str, at_the_limit: RuntimeResult, beyond: RuntimeResult
):
    assert set(statuses(llama_cpp_gates(at_the_limit, LIMITS)).values()) == {"passed"}
    found = statuses(llama_cpp_gates(beyond, LIMITS))
    assert found.pop(gate) == "failed"
    assert set(found.values()) == {"passed"}


def test_the_naive_control_stands_beside_the_figure_of_the_file():
    gate = llama_cpp_gates(runtime(), LIMITS)[1]
    assert gate.message.endswith("to llama-quantize's Q4_0 of that model 0.03")


def test_without_a_teacher_the_runtime_is_compared_with_the_trained_model_alone():
    found = statuses(llama_cpp_gates(runtime(teacher=None), LIMITS))
    assert found == {
        "llama_cpp_weights": "passed",
        "llama_cpp": "passed",
        "llama_cpp_teacher": "skipped",
    }


def test_a_runtime_that_is_absent_skips_its_gate_and_one_that_breaks_fails_it():
    skipped = llama_cpp_skipped("no tools", LIMITS)
    assert (skipped.status, skipped.value) == ("skipped", None)
    assert "no tools" in skipped.message
    failed = llama_cpp_failed("llama-perplexity failed with exit code 1", LIMITS)
    assert failed.status == "failed"
    assert "exit code 1" in explain(verdict([failed], None))


def test_a_verdict_passes_with_skipped_gates_and_fails_with_one_failed():
    gates = [
        *before_after_gates(0.0, {"task": kld()}, LIMITS),
        llama_cpp_skipped("no tools", LIMITS),
    ]
    assert verdict(gates, None).passed
    failed = verdict([*gates, drift_gate(kld(0), kld(1), LIMITS)], None)
    assert not failed.passed
    assert len(failed.gates) == len(gates) + 1


def test_an_override_is_recorded_only_where_a_gate_failed():
    passed, failed = drift_gate(kld(0), kld(0), LIMITS), drift_gate(kld(0), kld(1), LIMITS)
    assert verdict([passed], "I know").override is None
    assert verdict([failed], "I know").override == "I know"


def test_every_gate_that_can_fail_is_explained_by_name_figure_limit_and_remedy():
    texts = {"task": kld(1.0, 1.0, 0.5)}
    gates = before_after_gates(1.0, texts, LIMITS) + effect_gates(0, Mean(-1.0, 0.1), LIMITS)
    gates.append(drift_gate(kld(0), kld(1), LIMITS))
    gates += llama_cpp_gates(runtime(1.0, 1.0, (0.0, 1.0)), LIMITS)
    gates.append(GateResult("identity", 3.0, 0.0, "differing blocks", "failed", "3 of 9"))
    assert {gate.status for gate in gates} == {"failed"}
    for gate in gates:
        sentence = explain(verdict([gate], None))
        start = (
            f"Gate {gate.name}: {gate.value:.6g} {gate.unit} where the limit is {gate.limit:.6g}"
        )
        assert sentence.startswith(f"{start} ({gate.message}). ")
        assert len(sentence.split("). ", 1)[1]) > 20
