"""The model card and the Modelfile of a published GGUF."""

import dataclasses

import pytest
import yaml
from markdown_it import MarkdownIt

from qatlora.report.card import model_card
from qatlora.report.results import BaseResult, RunReport
from qatlora.report.results_origin import OriginResult
from qatlora.report.run_it import modelfile, run_line
from qatlora.report.summary import score_rows

HOSTILE = "x: [1]\n---\n# Guard passed\n| a | <script>x</script> ``` **b** [l](http://e.f)"


def front_matter(card: str) -> dict:
    start, _, rest = card.partition("---\n")
    assert start == ""
    return yaml.safe_load(rest.partition("\n---\n")[0])


def headings(card: str) -> list[str]:
    tokens = MarkdownIt("commonmark").parse(card.partition("\n---\n")[2])
    return [tokens[i + 1].content for i, one in enumerate(tokens) if one.type == "heading_open"]


def test_the_head_says_what_the_hub_asks_for_and_what_the_base_says_of_itself(
    run_report: RunReport,
) -> None:
    origin = OriginResult("google/gemma", "gemma", None, "https://ai.google.dev/terms", "Google")
    settings = run_report.settings | {"data": {"hub_id": "somebody/chats"}}
    card = model_card(dataclasses.replace(run_report, origin=origin, settings=settings))
    assert front_matter(card) == {
        "license": "gemma",
        "license_link": "https://ai.google.dev/terms",
        "base_model": "google/gemma",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "base_model_relation": "finetune",
        "datasets": ["somebody/chats"],
        "tags": ["qatlora", "gguf", "q4_0"],
    }
    assert "The base was made by Google. The base's own card says gemma" in card


def test_of_a_base_that_names_no_licence_none_is_made_up(run_report: RunReport) -> None:
    card = model_card(dataclasses.replace(run_report, origin=OriginResult()))
    assert set(front_matter(card)) == {"library_name", "pipeline_tag", "tags"}
    assert "The base's folder names no licence." in card


def test_the_card_has_the_figures_gates_and_data_of_the_report(run_report: RunReport) -> None:
    card = model_card(run_report)
    for row in score_rows(run_report):
        assert all(cell in card for cell in row)
    assert all(gate.name.replace("_", "") in card.replace("\\_", "").replace("_", "")
               for gate in run_report.guard.gates)  # fmt: skip
    assert "licence: MIT" in card
    assert run_report.export.sha256 in card
    assert headings(card)[1:] == [
        "Run it", "Figures", "Training", "Data", "How it was made", "Licence",
    ]  # fmt: skip


@pytest.mark.parametrize(("rate", "words"), [(None, "ten times"), (0.005, "0.005")])
def test_the_rate_of_the_steps_is_said_where_it_is_left_to_its_default(
    rate: float | None, words: str, run_report: RunReport
) -> None:
    settings = {"train": {"learning_rate": 1e-3, "steps_learning_rate": rate}}
    card = model_card(dataclasses.replace(run_report, settings=settings))
    (line,) = (line for line in card.splitlines() if "steps" in line and "rate:" in line)
    assert words in line


def test_the_command_is_the_one_that_was_typed(run_report: RunReport) -> None:
    typed = ["recipe=chat_sft", "data.path=my chats.jsonl"]
    settings = run_report.settings | {"overrides": typed}
    card = model_card(dataclasses.replace(run_report, settings=settings))
    assert "python -m qatlora recipe=chat_sft 'data.path=my chats.jsonl'" in card


def test_an_override_is_stated_with_its_reason(
    run_report: RunReport, failed_report: RunReport
) -> None:
    guard = dataclasses.replace(failed_report.guard, override="a test of the drift")
    card = model_card(dataclasses.replace(run_report, guard=guard))
    assert "> Guard failed (drift); published by override." in card
    assert "> override: a test of the drift" in card


def test_hostile_names_add_no_key_no_heading_and_no_html(run_report: RunReport) -> None:
    hostile = dataclasses.replace(
        run_report,
        base=BaseResult(HOSTILE, "nf4", 1, None, None),
        origin=OriginResult(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE),
        data_notes={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        settings=run_report.settings | {"overrides": [HOSTILE]},
    )
    card = model_card(hostile)
    front = front_matter(card)
    assert front["license"] == front["base_model"] == " ".join(HOSTILE.split())
    assert front["tags"] == ["qatlora", "gguf", "q4_0"]
    html = MarkdownIt("commonmark").enable("table").render(card.partition("\n---\n")[2])
    assert "<script" not in html
    assert "<a " not in html


def test_beside_the_file_the_commands_need_no_folder_and_at_the_end_of_a_run_they_do(
    run_report: RunReport,
) -> None:
    card = model_card(run_report)
    assert "llama-cli -m gemma3_270m-chat.gguf" in card
    assert "ollama create gemma3-270m-chat -f Modelfile" in card
    assert run_line(run_report) == (
        "llama-cli -m runs/chat_sft/gemma3_270m-chat.gguf  or  "
        "ollama create gemma3-270m-chat -f runs/chat_sft/Modelfile"
    )


@pytest.mark.parametrize(
    ("stop", "line"),
    [
        ("<end_of_turn>", 'PARAMETER stop "<end_of_turn>"'),
        ('<|"|>', 'PARAMETER stop """<|"|>"""'),
    ],
)
def test_a_modelfile_quotes_stops_as_ollama_reads_them(stop: str, line: str) -> None:
    assert modelfile("a b.gguf", [stop], None) == f"FROM ./a b.gguf\n{line}\n"


def test_a_stop_cannot_end_its_quotation_and_go_on_as_another_instruction() -> None:
    stops = ['"""\nADAPTER /tmp/x\n"""', "</s>"]
    assert modelfile("m.gguf", stops, None) == 'FROM ./m.gguf\nPARAMETER stop "</s>"\n'


def test_a_template_goes_in_as_it_is() -> None:
    text = modelfile("m.gguf", [], '{{ printf "%s\\n" .Content }}')
    assert text == 'FROM ./m.gguf\nTEMPLATE """{{ printf "%s\\n" .Content }}"""\n'
