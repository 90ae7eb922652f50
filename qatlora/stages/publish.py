"""The stage `publish`: the candidate takes its place, with its card and its Modelfile beside it."""

import json
from pathlib import Path

from qatlora import files
from qatlora.data.templates import ollama_template
from qatlora.export import publish as export
from qatlora.guard.judge import permit
from qatlora.llamacpp.gguf_read import read_gguf
from qatlora.report.card import CARD, model_card
from qatlora.report.run_it import MODELFILE, modelfile
from qatlora.stages.patch import make_patch
from qatlora.state import Run, report_of


def publish(state: Run) -> None:
    """Publish the file that passed the guard, and what tells people how to use it.

    Raises:
        GuardFailed: a gate failed; nothing was published.
    """
    state.export = export.publish(state.candidate, permit(state.candidate, state.guard))
    if state.cfg.export.patch:
        make_patch(state)
    path = Path(state.export.path)
    template = read_gguf(path).metadata.get("tokenizer.chat_template", "")
    text = modelfile(path.name, _stops(state), ollama_template(template))
    files.write_text(path.with_name(MODELFILE), text)
    files.write_text(path.with_name(CARD), model_card(report_of(state)))


def _stops(state: Run) -> list[str]:
    """Texts of the tokens at which generation_config.json of the base ends an answer."""
    path = state.source.folder / "generation_config.json"
    if not path.is_file():
        return []
    ids = json.loads(path.read_text("utf-8")).get("eos_token_id") or []
    ids = ids if isinstance(ids, list) else [ids]
    return [str(token) for token in state.tokenizer.convert_ids_to_tokens(ids)]
