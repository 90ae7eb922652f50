"""Where the changes of a merge lie: tensor names taken apart into layer number and kind."""

import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from statistics import fmean

from qatlora.report.results import LayerChange

_LAYER_NUMBER = re.compile(r"\blayers\.(\d+)\.")
_KIND_ORDER = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class KindChange:
    """Changes of one kind of tensor; `by_layer`: layer number -> (codes share, steps share)."""

    kind: str
    num_tensors: int
    codes_mean: float
    codes_max: float
    steps_mean: float
    steps_max: float
    by_layer: dict[int, tuple[float, float]]


def layer_and_kind(tensor: str) -> tuple[int | None, str]:
    """``model.layers.3.self_attn.q_proj.weight`` -> (3, "q"); no layer number -> None."""
    number = _LAYER_NUMBER.search(tensor)
    kind = tensor.removesuffix(".weight").rpartition(".")[2].removesuffix("_proj")
    return (int(number[1]) if number else None), kind


def changes_by_kind(changes: list[LayerChange]) -> list[KindChange]:
    """One `KindChange` per kind, attention first; shares are means over the kind's tensors."""
    groups: defaultdict[str, list[LayerChange]] = defaultdict(list)
    for change in changes:
        groups[layer_and_kind(change.tensor)[1]].append(change)
    return [_summary(kind, groups[kind]) for kind in ordered_kinds(groups)]


def ordered_kinds(kinds: Collection[str]) -> list[str]:
    """Attention first, then the MLP, then what else there is by name."""
    known = [kind for kind in _KIND_ORDER if kind in kinds]
    return [*known, *sorted(set(kinds) - set(known))]


def _summary(kind: str, group: list[LayerChange]) -> KindChange:
    layers: defaultdict[int, list[LayerChange]] = defaultdict(list)
    for change in group:
        layer = layer_and_kind(change.tensor)[0]
        if layer is not None:
            layers[layer].append(change)
    return KindChange(
        kind=kind,
        num_tensors=len(group),
        codes_mean=fmean(change.levels_changed for change in group),
        codes_max=max(change.levels_changed for change in group),
        steps_mean=fmean(change.steps_changed for change in group),
        steps_max=max(change.steps_changed for change in group),
        by_layer={
            layer: (
                fmean(change.levels_changed for change in members),
                fmean(change.steps_changed for change in members),
            )
            for layer, members in sorted(layers.items())
        },
    )
