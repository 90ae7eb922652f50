"""What lies beside a published GGUF: its model card, and the Modelfile that Ollama reads."""

from pathlib import Path

from qatlora import files
from qatlora.data.templates import ollama_template
from qatlora.export.patch_head import Beside
from qatlora.llamacpp.gguf_read import read_gguf
from qatlora.report.card import CARD
from qatlora.report.run_it import MODELFILE, modelfile


def write_beside(gguf: Path, beside: Beside) -> None:
    """Write both files into the folder of `gguf`."""
    template = ollama_template(read_gguf(gguf).metadata.get("tokenizer.chat_template", ""))
    text = modelfile(gguf.name, beside.stops, template)
    files.write_text(gguf.with_name(MODELFILE), text)
    files.write_text(gguf.with_name(CARD), beside.card)
