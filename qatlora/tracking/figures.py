"""The report's tables as plain figures, and a logged step as named scalars."""

from qatlora.report.results import RunReport, TrainPoint
from qatlora.report.results_curve import CurvePoint

SCORE_COLUMNS = (
    "text", "model", "tokens", "perplexity", "kld_mean", "kld_median", "kld_p99", "same_top",
)  # fmt: skip
GATE_COLUMNS = ("gate", "status", "figure", "limit", "unit", "message")

Cell = str | int | float | None


def scalars(point: TrainPoint | CurvePoint) -> dict[str, float]:
    """Names as in the JSONL logs; figures that a point does not have are left out."""
    group = f"eval/{point.text}" if isinstance(point, CurvePoint) else "train"
    named = {name: value for name, value in vars(point).items() if name not in ("step", "text")}
    return {f"{group}/{name}": value for name, value in named.items() if value is not None}


def score_rows(report: RunReport) -> list[list[Cell]]:
    """Cells in the order of `SCORE_COLUMNS`; KLD in nats per token."""
    rows: list[list[Cell]] = []
    for text, results in report.texts.items():
        for model, result in results.items():
            kld = result.kld
            figures = (kld.mean, kld.median, kld.p99, kld.same_top) if kld else (None,) * 4
            rows.append([text, model, result.tokens, result.perplexity, *figures])
    return rows


def gate_rows(report: RunReport) -> list[list[Cell]]:
    """Cells in the order of `GATE_COLUMNS`."""
    gates = report.guard.gates if report.guard else []
    return [[g.name, g.status, g.value, g.limit, g.unit, g.message] for g in gates]
