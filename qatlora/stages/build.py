"""The stage of recipes q4_0_build and nf4_build: a bf16 checkpoint becomes a folder of its own."""

from pathlib import Path

from qatlora import files
from qatlora.base.record import GridRecord
from qatlora.errors import CheckpointError, ConfigError
from qatlora.export.build_nf4 import build_nf4, check_nf4
from qatlora.export.build_q4_0 import build_q4_0
from qatlora.export.folders import copy_side_files
from qatlora.report.card import CARD, model_card
from qatlora.report.results import BaseResult
from qatlora.report.results_build import BuildResult
from qatlora.report.write import JSON_NAME
from qatlora.stages.resume import SETTINGS
from qatlora.state import Run, report_of

_BUILDERS = {"q4_0": build_q4_0, "nf4": build_nf4}
_LABELS = {"q4_0": "Q4_0", "nf4": "NF4"}


def check_build(state: Run) -> None:
    """Refuse what cannot be built, before any weight is read.

    Raises:
        CheckpointError: the source is a build itself.
        ConfigError: there is something at the place of the folder, or nothing to build.
    """
    source = state.source
    if state.cfg.storage.kind.name not in _BUILDERS:
        raise ConfigError(
            "storage.kind=bf16 with a build: there is nothing to build, the checkpoint is bf16. "
            "Use recipe=q4_0_build or recipe=nf4_build as they are."
        )
    if source.nf4_modules or source.packed_modules:
        kind = "NF4" if source.nf4_modules else "packed Q4_0"
        raise CheckpointError(
            f"{source.folder} is stored as {kind} already, and a build starts from the weights "
            "that such a folder does not have any more. Give the bf16 checkpoint as base.path."
        )
    target = _target(state)
    if target.exists() and not _is_left_by_a_kill(target, state.run_dir):
        raise ConfigError(
            f"{target} exists already, and a build never replaces a folder. Remove it, or set "
            "build.path (or run_dir) to another place."
        )


def _is_left_by_a_kill(target: Path, run_dir: Path) -> bool:
    """Whether the run folder's own run wrote it and was killed before its report."""
    begun, ended = (run_dir / name for name in (SETTINGS, JSON_NAME))
    return target.parent == run_dir and begun.is_file() and not ended.is_file()


def build(state: Run) -> None:
    """Write the folder beside its place, look at it, and rename it when it is whole."""
    cfg, source, layout, kind = state.cfg, state.source, state.layout, state.cfg.storage.kind.name
    shard_bytes, continuation = cfg.build.max_shard_gb * 1e9, None
    with files.replacing_folder(_target(state)) as folder:
        copy_side_files(source.folder, folder, besides=(CARD,))
        if cfg.base.chat_template:
            files.write_text(folder / "chat_template.jinja", state.tokenizer.chat_template)
        with state.bar(f"build {_LABELS[kind]}", len(source.files), "tensors") as advance:
            record = _BUILDERS[kind](source, layout, folder, shard_bytes, state.device, advance)
        if kind == "nf4":
            continuation = check_nf4(folder, layout, state.tokenizer, cfg.build, state.device)
        state.build = _result(state, record, folder, continuation)
        state.base_result = BaseResult(
            name=source.name,
            storage=kind,
            parameters=layout.num_parameters,
            on_grid_share=record.on_grid_share,
            digest=record.base_digest,
        )
        _write_card(state, folder)
        files.write_sums(folder)


def write_card_again(state: Run) -> None:
    """Write the finished folder's card with what has been measured since."""
    _write_card(state, _target(state))


def _write_card(state: Run, folder: Path) -> None:
    files.write_text(folder / CARD, model_card(report_of(state)))


def _target(state: Run) -> Path:
    if state.cfg.build.path is not None:
        return Path(state.cfg.build.path)
    return state.run_dir / f"{state.source.name}-{_LABELS[state.cfg.storage.kind.name]}"


def _result(state: Run, record: GridRecord, folder: Path, continuation: str | None) -> BuildResult:
    quantized = state.layout.grid if record.storage == "q4_0" else state.layout.nf4_modules
    kinds = [name.rpartition(".")[2] for name in quantized]
    return BuildResult(
        path=str(_target(state)),
        storage=record.storage,
        bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        source_bytes=state.source.weight_bytes,
        modules={kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        relative_error=record.relative_error,
        source_digest=record.source_digest,
        prompt=None if continuation is None else state.cfg.build.prompt,
        continuation=continuation,
    )
