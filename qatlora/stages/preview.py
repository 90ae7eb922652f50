"""The stage of recipe=data_preview: conversations as training would take them in, no model."""

from qatlora.data.preview import open_preview, preview
from qatlora.state import Run


def preview_data(state: Run) -> None:
    """Read all conversations, encode some of them, and leave the result for the report."""
    cfg = state.cfg
    opened = open_preview(cfg.data, cfg.preview, state.tokenizer, cfg.seed)
    with state.bar("render", len(opened.indices), "conversations") as advance:
        state.preview = preview(opened, cfg.preview.num_examples, advance)
