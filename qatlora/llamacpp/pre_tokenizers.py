"""Byte-level pre-tokenizers that llama.cpp knows by name, as the `tokenizers` library writes them.

llama.cpp's converter recognizes a pre-tokenizer by a hash over token ids, so it fails for a
vocabulary it has never seen although the rule is a known one. The names here are the values of
`tokenizer.ggml.pre`; the rules are those of src/llama-vocab.cpp.
"""

from typing import Any

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


_LLAMA3_SPLIT = {
    "type": "Split",
    "pattern": {"Regex": _LLAMA3_PATTERN},
    "behavior": "Isolated",
    "invert": False,
}

PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _byte_level(use_regex=True),
    "smollm": _sequence({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)),
    "llama-bpe": _sequence(_LLAMA3_SPLIT, _byte_level(use_regex=False)),
}


def name_of(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """llama.cpp's name of a `pre_tokenizer` entry of tokenizer.json; None if it is unknown."""
    # How offsets are trimmed does not change the tokens.
    wanted = _without_offsets(pre_tokenizer)
    matches = (name for name, rule in PRE_TOKENIZERS.items() if _without_offsets(rule) == wanted)
    return next(matches, None)


def _without_offsets(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if key != "trim_offsets"}
        return {key: _without_offsets(part) for key, part in kept.items()}
    if isinstance(value, list):
        return [_without_offsets(part) for part in value]
    return value
