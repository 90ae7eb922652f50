import pytest

from qatlora.report.changes import changes_by_kind, layer_and_kind
from qatlora.report.results import LayerChange


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (3, "q")),
        ("model.language_model.layers.59.mlp.down_proj", (59, "down")),
        ("model.layers.0.experts.gate_up_proj", (0, "gate_up")),
        ("lm_head.weight", (None, "lm_head")),
    ],
)
def test_a_tensor_name_gives_layer_and_kind(tensor, expected):
    assert layer_and_kind(tensor) == expected


def test_kinds_come_in_the_order_of_the_layer_and_unknown_ones_last():
    names = ["experts.gate_up_proj", "mlp.down_proj", "self_attn.q_proj", "mlp.gate_proj"]
    changes = [LayerChange(f"model.layers.0.{name}", 0.1, 0.0) for name in names]
    assert [kind.kind for kind in changes_by_kind(changes)] == ["q", "gate", "down", "gate_up"]


def test_shares_are_averaged_per_kind_and_per_layer():
    q = "model.layers.{}.self_attn.q_proj"
    changes = [LayerChange(q.format(0), 0.1, 0.0), LayerChange(q.format(1), 0.3, 0.5)]
    (kind,) = changes_by_kind(changes)
    assert kind.codes_mean == pytest.approx(0.2)
    assert (kind.codes_max, kind.steps_max) == (0.3, 0.5)
    assert kind.by_layer == {0: (0.1, 0.0), 1: (0.3, 0.5)}
