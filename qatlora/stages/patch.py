"""Step patches: `publish` writes one if export.patch is true, recipe=apply_patch applies it."""

from collections import Counter
from pathlib import Path

from qatlora.adapters.attach import AdaptedModel
from qatlora.config import AdapterKind, ExportConfig
from qatlora.errors import ConfigError
from qatlora.export import publish as export
from qatlora.export.candidate import write_candidate
from qatlora.export.patch_head import Beside, PatchHead, read_head
from qatlora.export.step_patch import apply_patch, step_factors, write_patch
from qatlora.guard.identity import identity_gate
from qatlora.guard.judge import permit, verdict
from qatlora.llamacpp.gguf_read import read_gguf
from qatlora.report.results import BaseResult, ExportResult
from qatlora.report.results_patch import PatchResult
from qatlora.stages.beside import write_beside
from qatlora.state import Run

_SUFFIX = ".patch.safetensors"


def check_patch(state: Run, kind: str) -> None:
    """Refuse an export whose patch could not be made, before any weight is loaded.

    Raises:
        ConfigError: the adapter moves more than steps, or the two files would have one name.
    """
    name = state.cfg.export.file_name
    if name == _base_name(state.source.name):
        raise ConfigError(
            f"export.file_name={name} with export.patch=true: so the base's own file is called, "
            "which is written beside it. Give another name."
        )
    if kind != AdapterKind.steps.name:
        raise ConfigError(
            f"export.patch=true with an adapter of kind {kind}: a step patch holds changes of "
            "steps, and this adapter moves levels. Use adapter=steps, or export.patch=false."
        )


def make_patch(state: Run, beside: Beside) -> None:
    """Export the base's own blocks beside the published file, and the patch between the two."""
    adapted = state.adapted
    assert isinstance(adapted, AdaptedModel)
    base = _export_base(state, adapted)
    result = Path(state.export.path)
    target = result.with_suffix(_SUFFIX)
    factors = dict(step_factors(adapted, state.candidate.places))
    write_patch(Path(base.path), result, factors, beside, target)
    state.patch = _result(target, read_head(target), Path(base.path))


def apply_step_patch(state: Run) -> None:
    """Make the exported file of patch.base and patch.path, and what lay beside it.

    Raises:
        ExportError: the base or the patch is another one or damaged.
    """
    settings = state.cfg.patch
    base, patch = Path(settings.base), Path(settings.path)
    target = state.run_dir / read_head(patch).result_name
    head = apply_patch(base, patch, target)
    write_beside(target, Beside(head.card, head.stop_texts()))
    tensors = read_gguf(target).tensors.values()
    num_weights = sum(tensor.num_weights for tensor in tensors)
    state.base_result = BaseResult(base.stem, None, num_weights, None, None)
    state.export = ExportResult(
        path=str(target),
        sha256=head.result_sha256,
        bytes=target.stat().st_size,
        tensor_types=dict(sorted(Counter(tensor.type_name for tensor in tensors).items())),
    )
    state.patch = _result(patch, head, base)


def _export_base(state: Run, adapted: AdaptedModel) -> ExportResult:
    """A GGUF that base, storage and versions alone decide: many patches can start from it."""
    cfg, base = state.cfg, adapted.base
    settings = ExportConfig(file_name=_base_name(base.name), other_type=cfg.export.other_type)
    with adapted.as_base(), state.bar("write base", len(base.grid), "tensors") as advance:
        candidate = write_candidate(adapted, settings, state.run_dir, state.stamp(), advance)
        recorded = adapted.deployed_digests()
        gate = identity_gate(candidate, adapted.deployed(), recorded, cfg.guard)
    return export.publish(candidate, permit(candidate, verdict([gate], None)))


def _base_name(base: str) -> str:
    return f"{base}-base-Q4_0.gguf"


def _result(patch: Path, head: PatchHead, base: Path) -> PatchResult:
    return PatchResult(
        path=str(patch),
        bytes=patch.stat().st_size,
        base=str(base),
        base_bytes=base.stat().st_size,
        base_sha256=head.base_sha256,
        result_sha256=head.result_sha256,
    )
