"""Hostile settings: a run's settings come out, or one paragraph says what is wrong."""

import dataclasses
from typing import Any

from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from test_config import compose

from qatlora.config import RootConfig, to_dataclasses
from qatlora.config.rules import validate
from qatlora.explained import explain


def keys(node: Any, prefix: str = "") -> list[str]:
    found = []
    for one in dataclasses.fields(node):
        value, name = getattr(node, one.name), f"{prefix}{one.name}"
        found += keys(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return found


KEYS = sorted(keys(RootConfig()))
RECIPES = ["chat_sft", "qat_distill", "teacher_cache", "export_gguf", "q4_0_build", "fidelity",
           "validate", "plan", "benchmark", "data_preview", "inspect"]  # fmt: skip
VALUES = st.text(max_size=12) | st.sampled_from(
    ["null", "", "-1", "0", "1", "nan", "inf", "-inf", "1e400", "9" * 40, "true", "[]", "[1,a]",
     "[[1]]", "{}", "{a:1}", "{a:{b:null}}", "???", "${seed}", "${nowhere}", "${oc.env:HOME}",
     "''", "'\\n'", "../../etc", "/dev/null", "é", "\u202e", "a=b", "a,b", "x" * 300,
     "'~nobody/x'", "'/\\0'", "/root/../" + "y" * 5000]
)  # fmt: skip


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    chosen = draw(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
    signs = st.sampled_from(["", "", "", "+", "++", "~"])
    return [f"{draw(signs)}{key}={value}" for key, value in chosen]


@examples(25)
@given(st.sampled_from(RECIPES), overrides())
def test_any_setting_is_taken_or_refused_in_one_paragraph(recipe: str, changes: list[str]) -> None:
    try:
        cfg = to_dataclasses(compose(f"recipe={recipe}", *changes))
        validate(cfg)
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        message, exit_code = explained
        assert exit_code == 2
        assert message.strip()
        assert "\n" not in message
    else:
        assert isinstance(cfg, RootConfig)
