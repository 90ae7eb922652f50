import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from qatlora.report.escape import code_span, fenced, inline, labelled, table, visible

NASTY = [
    "# heading", "- item", "1. item", "12) item", "> quote", "===", "---", "+ item", "* item",
    "| a | b |", "`code`", "```", "~~~", "**bold** _it_ __b__", "[a](http://x.y)", "![i](x.png)",
    "<script>alert(1)</script>", "<end_of_turn>", "&lt;", "a\\", "\\`", "https://example.org",
    "two\n\n# lines", "$x$ and $y$", "~~gone~~", "[ref]: x", "&copy;", "snake_case_name", "_a_",
]  # fmt: skip
texts = st.one_of(st.sampled_from(NASTY), st.text(), st.text(alphabet="`~\n |\\<>*_#-1. "))
markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def shown(html):
    """The text that a reader sees."""
    text = re.sub(r"<[^>]+>", "", html)
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        text = text.replace(entity, character)
    return text


def one_line(text):
    return " ".join(visible(text).split())


@given(texts)
def test_inline_text_is_shown_as_it_is_and_makes_no_markup(text):
    html = markdown.render("x " + inline(text))
    assert html.startswith("<p>x")
    assert set(re.findall(r"<(\w+)", html)) <= {"p"}
    assert shown(html).strip() == ("x " + one_line(text)).strip()


@given(texts)
def test_inline_text_at_the_start_of_a_paragraph_is_a_paragraph(text):
    html = markdown.render(inline(text))
    assert set(re.findall(r"<(\w+)", html)) <= {"p"}
    assert shown(html).strip() == one_line(text)


@given(texts)
def test_a_code_fence_ends_only_where_we_end_it(text):
    tokens = markdown.parse(fenced(text) + "\n\nafter")
    assert [token.type for token in tokens][:2] == ["fence", "paragraph_open"]
    assert tokens[0].content == visible(text).replace("\x00", "\ufffd") + "\n"


@given(texts)
def test_a_code_span_is_one_span(text):
    children = markdown.parse("x " + code_span(text) + " y")[1].children
    kinds = [child.type for child in children if child.content]
    if one_line(text):
        assert kinds == ["text", "code_inline", "text"]
        assert children[1].content == one_line(text)


@given(st.lists(texts, min_size=2, max_size=2))
def test_a_table_keeps_its_cells_whatever_they_hold(cells):
    source = table(("a", "b"), [[inline(cell) for cell in cells], ["1", "2"]], "lr")
    html = markdown.render(source)
    assert html.count("<td") == 4
    assert html.count("<tr>") == 3


def test_a_table_is_padded_so_that_its_source_reads_well():
    assert table(("name", "n"), [["a", "12"], ["bcd", "1,000"]], "lr").splitlines() == [
        "| name |     n |",
        "| ---- | ----: |",
        "| a    |    12 |",
        "| bcd  | 1,000 |",
    ]


def test_common_text_is_left_readable():
    assert inline("chat_sft on gemma3_270m, 1.5 nats (p99)") == (
        "chat_sft on gemma3_270m, 1.5 nats (p99)"
    )
    assert inline("14.90") == "14.90"


def test_links_are_disarmed():
    assert inline("see https://a.b and www.c.d") == r"see https\://a.b and www\.c.d"


@pytest.mark.parametrize("character", ["\x1b", "\x00", "\u202e", "\ud800"])
def test_control_characters_are_shown_as_replacement(character):
    assert visible(f"a{character}b") == "a\ufffdb"
    fenced(f"a{character}b").encode("utf-8")


def test_emoji_of_several_characters_stay_whole():
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert visible(family) == family


def test_a_labelled_text_cannot_pose_as_another_label():
    lines = labelled("base", "one\nmerged  two\n\nthree", label_width=8).splitlines()
    assert lines == ["base    one", "        merged  two", "", "        three"]


def test_a_long_answer_is_wrapped():
    lines = labelled("base", "word " * 60, label_width=8, width=60).splitlines()
    assert max(map(len, lines)) <= 60
    assert " ".join(" ".join(lines).split()) == ("base " + "word " * 60).strip()
