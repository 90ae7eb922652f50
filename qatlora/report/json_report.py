"""`report.json`: a `RunReport` as JSON, in the shape that scripts rely on (`schema.json`).

Two parts are laid out by text and model, for look-ups such as ``perplexity.task.merged``: the
keys of `TEXTS` and `MODELS` are always there and hold null where nothing was measured. The same
holds for every other part that a recipe has no stage for.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from enum import Enum
from importlib import resources
from pathlib import PurePath
from typing import Any

from qatlora.errors import QatloraError
from qatlora.report.results import KLD_BIN_EDGES, MODELS, TEXTS, RunReport, TextResult

_SCORE_KEYS = ("tokens", "mean_nll", "nll_stderr", "kld_histogram")


class ReportError(QatloraError):
    """A result cannot be reported: it is not finite, or JSON has no form for it."""


def to_json(report: RunReport) -> dict[str, Any]:
    """The content of `report.json`: JSON values only, valid against `load_schema()`.

    Raises:
        ReportError: a figure is NaN or infinite, or a value has no form in JSON; the message names
            every such place.
    """
    parts = asdict(report)
    texts = parts.pop("texts")
    history, curve = (
        parts["train"].pop(key) if report.train else [] for key in ("history", "curve")
    )
    document = {
        "schema_version": parts.pop("schema_version"),
        "recipe": parts.pop("recipe"),
        "base": parts.pop("base"),
        "origin": parts.pop("origin"),
        "build": parts.pop("build"),
        "teacher_cache": parts.pop("teacher_cache"),
        "adapter": parts.pop("adapter"),
        "latents": parts.pop("latents"),
        "train": parts.pop("train"),
        "perplexity": _by_text_and_model(report, lambda result: result.perplexity),
        "kld": _by_text_and_model(report, lambda result: result.kld and asdict(result.kld)),
        "guard": parts.pop("guard"),
        "runtime": parts.pop("runtime"),
        "export": parts.pop("export"),
        "patch": parts.pop("patch"),
        "inspect": parts.pop("inspect"),
        "validate": parts.pop("validate"),
        "preview": parts.pop("preview"),
        "checkpoint": parts.pop("checkpoint"),
        "benchmark": parts.pop("benchmark"),
        "plan": parts.pop("plan"),
        "fidelity": parts.pop("fidelity"),
        "doctor": parts.pop("doctor"),
        "versions": parts.pop("versions"),
        **parts,
        "scores": {
            text: {
                model: {key: result[key] for key in _SCORE_KEYS} for model, result in row.items()
            }
            for text, row in texts.items()
        },
        "kld_bin_edges": KLD_BIN_EDGES,
        "history": history,
        "curve": curve,
    }
    values: dict[str, Any] = plain(document)
    faults = list(_faults(values, ""))
    if faults:
        raise ReportError(
            f"The report holds what JSON cannot: {'; '.join(faults)}. Every figure must be finite "
            "and every value text, number, list or mapping; look for the stage that made it, as a "
            "loss that is not finite usually means too high a learning rate."
        )
    return values


def load_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of `report.json`, as shipped with the package."""
    text = resources.files("qatlora.report").joinpath("schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def _by_text_and_model(
    report: RunReport, figure: Callable[[TextResult], Any]
) -> dict[str, dict[str, Any]]:
    """`figure` of every measured pair; the pairs that every report has are null without one."""
    rows: dict[str, dict[str, Any]] = {text: dict.fromkeys(MODELS) for text in TEXTS}
    for text, results in report.texts.items():
        row = rows.setdefault(text, dict.fromkeys(MODELS))
        row.update({model: figure(result) for model, result in results.items()})
    return rows


def plain(value: Any) -> Any:
    """`value` for JSON: enums by name, paths as text, tuples as lists, the rest as it is."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _faults(value: Any, place: str) -> Iterator[str]:
    """Every place under `value` that JSON has no form for, and what stands there."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _faults(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _faults(item, f"{place}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield f"{place} is {value}"
    elif not isinstance(value, str | int | None):
        yield f"{place} is of type {type(value).__name__}"
