"""Stage of recipe=inspect: is the checkpoint on a grid, and what did an edit do to it?"""

import dataclasses

from qatlora.base.source import find_source
from qatlora.config import BaseConfig
from qatlora.inspection.compare import compare_checkpoints, require_comparable
from qatlora.inspection.tensors import inspect_checkpoint, require_weights
from qatlora.state import Run


def check_inspect(state: Run) -> None:
    """Refuse what cannot be inspected or compared, from the headers alone.

    Raises:
        CheckpointError: an NF4 build, another architecture, other shapes, a tensor is missing.
    """
    require_weights(state.source, state.layout.trained)
    against = state.cfg.inspect.against
    if against is not None:
        state.against = find_source(BaseConfig(path=against))
        require_comparable(state.source, state.against)


def inspect(state: Run) -> None:
    """Inspect the trained list, tensor by tensor, and compare with `inspect.against`."""
    trained = state.layout.trained
    with state.bar("inspect", len(trained), "tensors") as advance:
        state.inspection = inspect_checkpoint(state.source, trained, state.device, advance)
    if state.against is None:
        return
    with state.bar("compare", len(state.source.files), "tensors") as advance:
        comparison = compare_checkpoints(
            state.source, state.against, trained, state.device, advance
        )
    state.inspection = dataclasses.replace(state.inspection, comparison=comparison)
