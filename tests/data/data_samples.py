"""Conversations for the tests of the data room."""

import json
from pathlib import Path


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation whose turns alternate, the user first."""
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def write_jsonl(path: Path, conversations: list[list[dict[str, str]]]) -> Path:
    lines = [json.dumps({"messages": each}, ensure_ascii=False) for each in conversations]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def chitchat_record(number: int, num_turns: int = 12) -> dict:
    """A record of the chit-chat package in which two people take turns."""
    return {
        "ratings": {"witty": 5, "upbeat": "6", "interesting": 10},
        "start": "2018-04-20T01:57:41",
        "messages": [
            [
                {"text": f"line {part} of turn {turn} in talk {number}, all right?", "sender": who}
                for part in range(1 + turn % 2)
            ]
            for turn in range(num_turns)
            for who in [("first", "second")[turn % 2]]
        ],
    }
