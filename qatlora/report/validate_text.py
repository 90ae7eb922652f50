"""A validation in words and cells: what is kept, the damage by type, warnings, the better way."""

from qatlora.report.formatting import MISSING, format_figure, format_share
from qatlora.report.results import GuardResult
from qatlora.report.results_validate import KeptEffect, ValidateResult

KEPT_HEADER = ("export", "effect kept by loss", "by KLD", "KLD from merged")
TYPES_HEADER = ("type", "relative error", "exact blocks")


def validate_headline(result: ValidateResult, guard: GuardResult | None) -> str:
    """Passed or not, which gates, and what that means."""
    failed = [gate.name for gate in guard.gates if gate.status == "failed"] if guard else []
    is_file = result.what == "gguf"
    if failed:
        meaning = "the GGUF is not" if is_file else "a Q4_0 export would not keep"
        return f"Validation failed ({', '.join(failed)}): {meaning} this model."
    meaning = "the GGUF is" if is_file else "a Q4_0 export keeps"
    return f"Validation passed: {meaning} this model."


def validate_reasons(result: ValidateResult, guard: GuardResult | None) -> list[str]:
    """Failed gates, warnings, and the command that does it better."""
    gates = guard.gates if guard else []
    lines = [f"{gate.name}: {gate.message}" for gate in gates if gate.status == "failed"]
    lines += [f"warning: {sentence}" for sentence in result.warnings]
    if result.advice:
        lines.append(f"better: {result.advice}")
    return lines


def kept_rows(result: ValidateResult) -> list[list[str]]:
    """Cells in the order of `KEPT_HEADER`."""
    return [[export, *_kept_cells(kept)] for export, kept in result.kept.items()]


def type_rows(result: ValidateResult) -> list[list[str]]:
    """Cells in the order of `TYPES_HEADER`."""
    return [
        [damage.type, format_share(damage.relative_error), format_share(damage.exact_share)]
        for damage in result.types
    ]


def _kept_cells(kept: KeptEffect) -> list[str]:
    shares = (
        MISSING if share is None else f"{100 * share:.1f} %"  # may be below zero
        for share in (kept.by_loss, kept.by_kld)
    )
    return [*shares, format_figure(kept.kld, decimals=True)]
