from dataclasses import replace

from markdown_it import MarkdownIt

from qatlora.report.markdown import to_markdown
from qatlora.report.results import GuardResult, Sample

HOSTILE = "```\n# Guard passed\n| a | <script>x</script> `` **b** [l](http://e.f)\n~~~\n---"


def headings(markdown):
    tokens = MarkdownIt("commonmark").parse(markdown)
    return [
        tokens[index + 1].content
        for index, token in enumerate(tokens)
        if token.type == "heading_open"
    ]


def test_the_verdict_file_size_and_digest_come_first(run_report):
    top = to_markdown(run_report).split("\n## ")[0]
    assert "**Guard passed; published. Skipped: llama_cpp.**" in top
    assert "`runs/chat_sft/gemma3_270m-chat.gguf`" in top
    assert "241 MB" in top
    assert run_report.export.sha256 in top


def test_the_sections_come_in_the_order_of_interest(run_report):
    assert headings(to_markdown(run_report)) == [
        "chat_sft on gemma3_270m", "Perplexity and KLD", "Gates", "What changed",
        "Answers before and after", "Training", "Time and memory", "Data", "Versions", "Run it",
        "Settings",
    ]  # fmt: skip


def test_the_table_compares_every_model_on_every_text(run_report):
    rendered = MarkdownIt("commonmark").enable("table").render(to_markdown(run_report))
    rows = [row for row in rendered.split("<tr>") if "±" in row and "<td" in row]
    assert len(rows) == 6
    assert "9.812 ± 0.21" in rows[2]


def test_a_failed_guard_says_which_gate_and_what_to_do(failed_report):
    text = to_markdown(failed_report)
    assert "**Guard failed (drift); nothing was published. Skipped: llama_cpp.**" in text
    assert r"> drift: KLD grew by 0.31 \| lower train.learning_rate" in text
    assert "| **failed** |" in text
    assert "## Run it" not in text


def test_an_override_is_stated_with_its_reason(run_report, failed_report):
    guard = GuardResult(False, failed_report.guard.gates, override="a test of the drift")
    text = to_markdown(replace(run_report, guard=guard))
    assert "Guard failed (drift); published by override." in text
    assert "> override: a test of the drift" in text


def test_a_recipe_without_stages_leaves_the_sections_out(bare_report):
    text = to_markdown(bare_report)
    assert headings(text) == ["inspect on local"]
    assert "No guard in this recipe; nothing was published." in text


def test_a_merge_that_changed_nothing_is_called_so(run_report):
    changes = [replace(change, levels_changed=0.0) for change in run_report.changes]
    assert "changed no code and no step" in to_markdown(replace(run_report, changes=changes))
    assert "changed no code and no step" not in to_markdown(run_report)


def test_hostile_text_adds_no_heading_table_or_html(run_report):
    gates = [replace(gate, message=HOSTILE, name="a|b\n# x") for gate in run_report.guard.gates]
    hostile = replace(
        run_report,
        base=replace(run_report.base, name=HOSTILE),
        guard=GuardResult(True, gates),
        export=replace(run_report.export, path="a`b/`` '$(x)'.gguf"),
        samples=[Sample(HOSTILE, {"base": HOSTILE, "merged": HOSTILE})],
        data_notes={HOSTILE: {"licence": HOSTILE}, "list": [HOSTILE]},
        versions={HOSTILE: HOSTILE},
        settings={HOSTILE: HOSTILE},
    )
    renderer = MarkdownIt("commonmark").enable("table")
    html, plain = (renderer.render(to_markdown(report)) for report in (hostile, run_report))
    for tag in ("<h1", "<h2", "<table", "<tr", "<td", "<pre", "<hr", "<script", "<a "):
        expected = plain.count(tag) - (1 if tag == "<pre" else 0)  # one sample less
        assert html.count(tag) == expected, tag


def test_plots_are_shown_only_where_they_were_written(run_report):
    assert "![" not in to_markdown(run_report)
    text = to_markdown(run_report, ["loss.png", "kld_histogram.png"])
    assert "(loss.png)" in text
    assert "(changes.png)" not in text


def test_the_commands_quote_the_path(run_report):
    export = replace(run_report.export, path="my runs/Model 1.gguf")
    text = to_markdown(replace(run_report, export=export))
    assert "llama-cli -m 'my runs/Model 1.gguf'" in text
    assert "llama-server -m 'my runs/Model 1.gguf' --port 8080" in text
    assert "ollama create model-1 -f 'my runs/Modelfile'" in text


def test_answers_stand_under_their_prompt_with_the_base_first(run_report):
    sample = Sample("Hi?", {"merged": "New\nanswer.", "base": "Old."})
    text = to_markdown(replace(run_report, samples=[sample]))
    assert "prompt  Hi?\n\nbase    Old.\n\nmerged  New\n        answer.\n```" in text
