"""Chat templates that know which words are the assistant's.

The loss falls on the assistant's tokens only. Which those are is said by the template itself, with
`{% generation %} ... {% endgeneration %}` around them, and read back through
`apply_chat_template(return_assistant_tokens_mask=True)`. Few published templates have these
markers, so we ship marked twins (`templates/*.jinja`) that render, byte for byte, what the
originals render; that is checked on probe conversations before a twin is used, never taken from a
name.

Inside the markers: what the assistant says and the token that ends its turn, for this is what the
model must produce. Outside: the turn's header and the line break after the end token. TRL's
training templates (1.16: Gemma 3, ChatML) mark that line break too. But generation has stopped
before it, and it is certain in every turn, so scoring it would flatter perplexity and KL.

Templates come from checkpoints, so they are untrusted code: nothing here renders one except through
transformers' sandboxed `apply_chat_template`, and `qatlora.data.trial` sees first whether it ends.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from qatlora.data.trial import require_end
from qatlora.errors import DataError
from qatlora.paths import user_path

_FOLDER = Path(__file__).with_name("templates")

_MARKER = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")

_USER = {"role": "user", "content": " What is 2 + 2?\n"}
_ASSISTANT = {"role": "assistant", "content": "  Four,\n\nI think. \n"}
_SYSTEM = {"role": "system", "content": " Answer briefly.\n"}
_PROBES: list[list[dict[str, str]]] = [
    [_USER],
    [_USER, _ASSISTANT],
    [_SYSTEM, _USER, _ASSISTANT],
    [_USER, _ASSISTANT, {"role": "user", "content": "Sure? <b>é</b> 你好"}, _ASSISTANT],
    [_SYSTEM, _USER, _ASSISTANT, _USER],
    [_USER, _USER, _ASSISTANT],
    [_ASSISTANT, _USER, _ASSISTANT],
]


_TOOL = {
    "type": "function",
    "function": {
        "name": "find_depth",
        "description": "Depth of a lake in metres.",
        "parameters": {"type": "object", "properties": {"lake": {"type": "string"}}},
    },
}
_CALL = {"type": "function", "function": {"name": "find_depth", "arguments": {"lake": "Baikal"}}}
_TOOL_TALK: list[dict[str, Any]] = [
    _USER,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "name": "find_depth", "content": "1642"},
    _ASSISTANT,
]
_TOOL_WORDS = ("find_depth", "Depth of a lake in metres.", "Baikal", "1642")


@dataclass(frozen=True)
class TurnRules:
    """Which orders of roles a template can render; found by trying them.

    Attributes:
        system: a system message may come first.
        alternating: after it, user and assistant must take turns, the user first.
        tools: definitions of functions, calls of them and their results are all rendered.
    """

    system: bool
    alternating: bool
    tools: bool = False


def shipped_templates() -> tuple[str, ...]:
    """Names that `shipped_template` knows."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.jinja")))


def shipped_template(name: str) -> str:
    """Training template `name` with generation markers, for instance "gemma3" or "chatml".

    Raises:
        DataError: no template of that name is shipped.
    """
    if name not in shipped_templates():
        known = ", ".join(shipped_templates())
        raise DataError(f"There is no shipped chat template {name!r}. Choose one of: {known}.")
    # jinja drops one trailing line break of a template; llama.cpp's engine might not.
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


def chosen_template(chosen: str | None) -> str | None:
    """The text of `base.chat_template`: a shipped name or a file; None keeps the checkpoint's own.

    Raises:
        DataError: neither a shipped template nor a readable file.
    """
    if chosen is None:
        return None
    if chosen in shipped_templates():
        return shipped_template(chosen)
    try:
        return user_path("base.chat_template", chosen).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(
            f"base.chat_template is '{chosen}', which is neither a shipped template "
            f"({', '.join(shipped_templates())}) nor a readable text file ({problem}). Give one of "
            "these names or the path of a Jinja file."
        ) from None


def ollama_template(exported: str) -> str | None:
    """Ollama's form (a Go template) of an exported template of ours; None for any other.

    Ollama knows published templates by their text, and takes the bare prompt for all others.
    """
    for path in sorted(_FOLDER.glob("*.gotmpl")):
        if exported == strip_generation_markers(shipped_template(path.stem)):
            return path.read_text(encoding="utf-8").removesuffix("\n")
    return None


def has_generation_markers(template: str) -> bool:
    """Whether the template says which words are the assistant's."""
    return any(match[2] is None for match in _MARKER.finditer(template))


def strip_generation_markers(template: str) -> str:
    """The template for export: renders the same, without a tag that only transformers knows.

    A tag may also eat the white space around it (`{%-`), so it is not deleted but replaced by one
    that does nothing else: `{%- if true -%} ... {%- endif -%}`.
    """
    return _MARKER.sub(lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}", template)


def own_template(folder: Path) -> str | None:
    """The chat template that a checkpoint came with; None if it has none."""
    path, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if not settings.is_file():
        return None
    template = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    return template if isinstance(template, str) else None


def exported_template(
    tokenizer: PreTrainedTokenizerBase, trained: str, original: str | None
) -> str:
    """The template for the exported file: the original where `trained` is its marked twin.

    llama.cpp knows some templates, and how to parse their tool calls, by their very text.
    """
    if original is None or has_generation_markers(original):
        return strip_generation_markers(trained)
    is_twin = _render_probes(tokenizer, original) == _render_probes(tokenizer, trained)
    return original if is_twin else strip_generation_markers(trained)


def training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Template with generation markers that renders what the tokenizer's own template renders.

    Its own one if it has the markers, else the shipped twin.

    Raises:
        DataError: the tokenizer has no template, or one without markers that no shipped template
            equals.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "The base's tokenizer has no chat template, so conversations cannot be rendered. A "
            "base model that never saw chats needs one chosen for it: save a chat_template.jinja "
            "with {% generation %} markers in the checkpoint's folder, or start from the "
            "instruction-tuned checkpoint."
        )
    own = tokenizer.get_chat_template()
    _require_end(tokenizer, own)
    if has_generation_markers(own):
        return own
    rendered = _render_probes(tokenizer, own)
    for name in shipped_templates():
        twin = shipped_template(name)
        if _render_probes(tokenizer, twin) == rendered:
            return twin
    raise DataError(
        f"The base's chat template (it begins {own.strip()[:60]!r}) does not say which words are "
        f"the assistant's, and none of the shipped templates ({', '.join(shipped_templates())}) "
        "renders the same text. Put {% generation %} before the assistant's words and "
        "{% endgeneration %} after its end-of-turn token in the checkpoint's chat_template.jinja."
    )


def turn_rules(tokenizer: PreTrainedTokenizerBase, template: str) -> TurnRules:
    """Find out which orders of roles `template` renders and which it refuses."""

    def renders(*conversation: dict[str, str]) -> bool:
        return render(tokenizer, template, list(conversation)) is not None

    unordered = renders(_USER, _USER, _ASSISTANT) and renders(_ASSISTANT, _USER, _ASSISTANT)
    return TurnRules(
        system=renders(_SYSTEM, _USER, _ASSISTANT),
        alternating=not unordered,
        tools=_renders_tools(tokenizer, template),
    )


def _renders_tools(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether nothing of a call gets lost: many templates leave out silently what they ignore."""
    try:
        text = render(tokenizer, template, _TOOL_TALK, tools=[_TOOL])
    except DataError:  # what it does not know may also make it fail
        return False
    return text is not None and all(word in text for word in _TOOL_WORDS)


def render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    conversation: list[dict[str, Any]],
    add_generation_prompt: bool = False,
    tools: list[Any] | None = None,
    **options: Any,
) -> str | None:
    """Text of a conversation; None if the template refuses it.

    `options` are what the template asks for besides, such as enable_thinking.

    Raises:
        DataError: the template is not valid Jinja, fails, or uses what the sandbox forbids.
    """
    try:
        text = tokenizer.apply_chat_template(
            conversation,
            chat_template=template,
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **options,
        )
    except Exception as error:  # a template is a program: it can fail in any way
        if (
            type(error) is TemplateError
        ):  # only raise_exception() in a template raises this very class
            return None
        raise DataError(
            f"The chat template (it begins {template.strip()[:60]!r}) cannot be rendered: "
            f"{type(error).__name__}: {error}. Correct chat_template.jinja in the checkpoint's "
            "folder."
        ) from error
    return str(text)  # always one: it is neither a batch nor tokenized


def renders_alike(tokenizer: PreTrainedTokenizerBase, one: str, other: str) -> bool:
    """Whether two templates give the same text for a handful of conversations.

    Raises:
        DataError: one of them cannot be rendered.
    """
    for template in (one, other):
        _require_end(tokenizer, template)
    return _render_probes(tokenizer, one) == _render_probes(tokenizer, other)


def _require_end(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    require_end(lambda: _render_probes(tokenizer, template), template)


def _render_probes(tokenizer: PreTrainedTokenizerBase, template: str) -> list[str | None]:
    return [
        render(tokenizer, template, probe, add_generation_prompt)
        for probe in _PROBES
        for add_generation_prompt in (False, True)
    ]
