"""The stage `publish`: the candidate takes its place, with its card and its Modelfile beside it."""

import json
from pathlib import Path

from qatlora import progress
from qatlora.export import publish as export
from qatlora.export.patch_head import Beside
from qatlora.guard.judge import permit
from qatlora.report.card import model_card
from qatlora.stages.beside import write_beside
from qatlora.stages.patch import make_patch
from qatlora.state import Run, report_of


def publish(state: Run) -> None:
    """Publish the file that passed the guard, and what tells people how to use it.

    Raises:
        GuardFailed: a gate failed; nothing was published.
    """
    state.export = export.publish(state.candidate, permit(state.candidate, state.guard))
    beside = Beside(model_card(report_of(state)), _stops(state))
    write_beside(Path(state.export.path), beside)
    if state.cfg.logging.progress_bars:
        progress.say(f"published {state.export.path}")
    if state.cfg.export.patch:
        make_patch(state, beside)


def _stops(state: Run) -> list[str]:
    """Texts of the tokens at which generation_config.json of the base ends an answer."""
    path = state.source.folder / "generation_config.json"
    if not path.is_file():
        return []
    ids = json.loads(path.read_text("utf-8")).get("eos_token_id") or []
    ids = ids if isinstance(ids, list) else [ids]
    return [str(token) for token in state.tokenizer.convert_ids_to_tokens(ids)]
