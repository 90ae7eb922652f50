"""The methods that are compared, as data: storage and rule of each.

`peft_*` are PEFT's own LoRA, built in `plain_peft`; all others are `GridAdapter`s of one rule.
"""

from dataclasses import dataclass

from qatlora.adapters.deployed import AdapterRule
from qatlora.config import AdapterConfig, BenchmarkMethod, BenchmarkSuite
from qatlora.report.results_benchmark import BOUND as _BOUND_NAME


@dataclass(frozen=True)
class Method:
    """One way to train an adapter.

    Attributes:
        label: for tables and plots.
        storage: how the base lies in memory: nf4, q4_0 or bf16.
        kind: lora, steps or both; None for PEFT's own LoRA, which knows no grid.
        rounding: frozen or reference.
        dither: auto, always or never.
    """

    label: str
    storage: str
    kind: str | None = None
    rounding: str = "frozen"
    dither: str = "auto"

    def rule(self, adapter: AdapterConfig, seed: int) -> AdapterRule:
        """The rule of this method with the run's rank and alpha; not for PEFT's own LoRA."""
        assert self.kind is not None
        return AdapterRule(
            kind=self.kind,
            rank=adapter.rank,
            alpha=adapter.alpha,
            steps_rank=adapter.steps_rank or adapter.rank,
            rounding=self.rounding,
            dither=self.dither,
            seed=seed,
        )


METHODS = {
    BenchmarkMethod.peft_bf16: Method("plain LoRA beside the exact Q4_0 base", "bf16"),
    BenchmarkMethod.peft_nf4: Method("QLoRA on NF4", "nf4"),
    BenchmarkMethod.reference_q4_0: Method(
        "lora, llama.cpp's rule", "q4_0", "lora", rounding="reference", dither="never"
    ),
    BenchmarkMethod.frozen_q4_0: Method("lora, no dither", "q4_0", "lora", dither="never"),
    BenchmarkMethod.lora_q4_0: Method("lora", "q4_0", "lora"),
    BenchmarkMethod.steps_q4_0: Method("steps", "q4_0", "steps"),
    BenchmarkMethod.both_q4_0: Method("both", "q4_0", "both"),
    BenchmarkMethod.lora_nf4: Method("lora on NF4", "nf4", "lora"),
    BenchmarkMethod.steps_nf4: Method("steps on NF4", "nf4", "steps"),
    BenchmarkMethod.both_nf4: Method("both on NF4", "nf4", "both"),
}

BASELINE = BenchmarkMethod.peft_nf4
"""What speed and memory are measured against."""

BOUND = BenchmarkMethod[_BOUND_NAME]

_DEFAULTS = {
    BenchmarkSuite.speed: (
        BASELINE,
        BenchmarkMethod.lora_q4_0,
        BenchmarkMethod.steps_q4_0,
        BenchmarkMethod.both_q4_0,
        BenchmarkMethod.lora_nf4,
        BenchmarkMethod.steps_nf4,
        BenchmarkMethod.both_nf4,
    ),
    BenchmarkSuite.adapters: (
        BOUND,
        BASELINE,
        BenchmarkMethod.reference_q4_0,
        BenchmarkMethod.frozen_q4_0,
        BenchmarkMethod.lora_q4_0,
        BenchmarkMethod.steps_q4_0,
        BenchmarkMethod.both_q4_0,
    ),
}


def chosen_methods(
    suite: BenchmarkSuite, methods: list[BenchmarkMethod]
) -> tuple[BenchmarkMethod, ...]:
    """The methods of a run in the table's order: those asked for, or the suite's own."""
    wanted = methods or _DEFAULTS[suite]
    return tuple(method for method in METHODS if method in wanted)
