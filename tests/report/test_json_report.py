import json
import math
from dataclasses import replace
from enum import Enum
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from qatlora.report.json_report import ReportError, load_schema, to_json
from qatlora.report.results import KLD_BIN_EDGES, TextResult


def check(document):
    schema = load_schema()
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(document)


@pytest.mark.parametrize("fixture", ["run_report", "failed_report", "bare_report"])
def test_every_report_is_valid_against_the_schema(fixture, request):
    check(json.loads(json.dumps(to_json(request.getfixturevalue(fixture)), allow_nan=False)))


def test_the_keys_that_scripts_rely_on_are_where_they_look(run_report):
    document = to_json(run_report)
    assert document["schema_version"] == 1
    assert document["base"]["on_grid_share"] == 0.0
    assert set(document["train"]) == {
        "steps", "tokens", "seconds", "loss_first", "loss_last", "peak_rss_bytes"
    }  # fmt: skip
    assert document["perplexity"]["task"]["merged"] == 9.812
    assert set(document["kld"]["general"]["trained"]) == {"mean", "median", "p99", "same_top"}
    assert document["guard"]["gates"][0]["status"] == "passed"
    assert document["export"]["tensor_types"]["Q4_0"] == 126
    assert document["versions"]["torch"] == "2.13.0"


def test_nothing_of_the_run_is_left_out(run_report):
    document = to_json(run_report)
    assert len(document["history"]) == run_report.train.steps
    assert document["changes"][0]["tensor"] == run_report.changes[0].tensor
    assert document["samples"][1]["answers"]["merged"] == "Knock, knock."
    assert document["stages"][0] == {"stage": "load_base", "seconds": 8.2}
    assert document["data_notes"]["chats"]["licence"] == "MIT"
    assert document["adapter"]["alpha"] == 32.0
    assert document["settings"]["train"]["learning_rate"] == 1e-3
    score = document["scores"]["task"]["base"]
    assert sum(score["kld_histogram"]) == score["tokens"]
    assert len(score["kld_histogram"]) == len(document["kld_bin_edges"]) - 1


def test_missing_parts_are_null_and_can_be_looked_up(bare_report):
    document = to_json(bare_report)
    for part in ("adapter", "train", "guard", "export"):
        assert document[part] is None
    assert document["perplexity"]["general"]["merged"] is None
    assert document["kld"]["task"]["base"] is None
    assert document["history"] == []


def test_a_text_without_a_teacher_has_a_perplexity_and_no_kld(bare_report):
    result = TextResult(100, 12.5, math.log(12.5), 0.1, None)
    document = to_json(replace(bare_report, texts={"task": {"base": result}}))
    check(document)
    assert document["perplexity"]["task"]["base"] == 12.5
    assert document["kld"]["task"]["base"] is None


def test_every_figure_that_is_not_finite_is_named(run_report):
    train = replace(run_report.train, loss_last=math.nan)
    texts = {"task": {"base": replace(run_report.texts["task"]["base"], perplexity=math.inf)}}
    with pytest.raises(ReportError, match=r"train\.loss_last is nan") as caught:
        to_json(replace(run_report, train=train, texts=texts))
    assert "perplexity.task.base is inf" in str(caught.value)


def test_enums_paths_and_tuples_in_settings_are_written_plainly(bare_report):
    storage = Enum("storage", ["nf4"])
    settings = {"storage": storage.nf4, "run_dir": Path("runs/a"), "shape": (1, 2)}
    document = to_json(replace(bare_report, settings=settings))
    assert document["settings"] == {"storage": "nf4", "run_dir": "runs/a", "shape": [1, 2]}


def test_a_value_without_a_form_in_json_is_named(bare_report):
    with pytest.raises(ReportError, match=r"settings\.x\[0\] is of type set"):
        to_json(replace(bare_report, settings={"x": [{1}]}))


@pytest.mark.parametrize(
    ("place", "value"),
    [("guard.gates.0.status", "maybe"), ("base.on_grid_share", 1.5), ("surprise", 1)],
)
def test_the_schema_refuses_what_is_not_a_report(run_report, place, value):
    document = json.loads(json.dumps(to_json(run_report)))
    *parents, last = place.split(".")
    part = document
    for key in parents:
        part = part[int(key)] if isinstance(part, list) else part[key]
    part[last] = value
    assert not Draft202012Validator(load_schema()).is_valid(document)


def test_the_bins_cover_six_decades_below_one_nat():
    assert KLD_BIN_EDGES[0] == 0
    assert KLD_BIN_EDGES[1] == pytest.approx(1e-6)
    assert KLD_BIN_EDGES[-1] == pytest.approx(100)
    assert sorted(set(KLD_BIN_EDGES)) == KLD_BIN_EDGES
