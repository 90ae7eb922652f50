"""How a published GGUF is run: llama.cpp, and Ollama by the Modelfile that lies beside it."""

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from qatlora.report.escape import fenced
from qatlora.report.results import RunReport

MODELFILE = "Modelfile"


def modelfile(file_name: str, stops: Sequence[str], template: str | None) -> str:
    """The text of a Modelfile; FROM is read from its own folder.

    Source: docs/modelfile.md of Ollama.

    Args:
        file_name: of the GGUF in the same folder.
        stops: texts of the tokens that end an answer; three quotes in one end every quotation of
            it, and it is left out.
        template: Ollama's form of the chat template, where it would not find one by itself.
    """
    lines = [f"FROM ./{file_name}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops if '"""' not in stop]
    return "\n".join(lines) + "\n"


def runs_in_llama_cpp(report: RunReport) -> bool:
    """True where a GGUF was published."""
    return report.export is not None and report.export.path.endswith(".gguf")


def run_line(report: RunReport) -> str:
    """Both commands on one line, for the end of a run."""
    assert report.export is not None
    path = PurePath(report.export.path)
    return f"{_llama_cpp(str(path))}  or  {_ollama(path, str(path.with_name(MODELFILE)))}"


def run_it(report: RunReport, *, beside: bool = False) -> Iterator[str]:
    """Paragraphs of Markdown.

    Args:
        report: of a run; nothing is said where it published no GGUF.
        beside: the reader is in the folder of the file.
    """
    if report.export is None or not runs_in_llama_cpp(report):
        return
    path = PurePath(report.export.path)
    gguf, recipe = (path.name, MODELFILE) if beside else (str(path), str(path.with_name(MODELFILE)))
    quoted = shlex.quote(gguf)
    yield "With llama.cpp, in the terminal or as a server with a web page at http://localhost:8080:"
    yield fenced(f"{_llama_cpp(gguf)}\nllama-server -m {quoted} --port 8080", "sh")
    yield "With Ollama, by the Modelfile beside the file:"
    yield fenced(
        f"{_ollama(path, recipe)}\n"
        f"ollama show {_model_name(path)} --template  # is it the model's own?\n"
        f"ollama run {_model_name(path)}",
        "sh",
    )


def _llama_cpp(gguf: str) -> str:
    return f"llama-cli -m {shlex.quote(gguf)}"


def _ollama(gguf: PurePath, recipe: str) -> str:
    return f"ollama create {_model_name(gguf)} -f {shlex.quote(recipe)}"


def _model_name(gguf: PurePath) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gguf.stem.lower()).strip("-") or "qatlora"


def _quoted(text: str) -> str:
    """As a Modelfile reads it: between quotes without escapes, or between three of them."""
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
