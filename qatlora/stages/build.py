"""The stage of recipes q4_0_build and nf4_build: a bf16 checkpoint becomes a folder of its own."""

from pathlib import Path

from qatlora import files
from qatlora.base.source import Source
from qatlora.errors import CheckpointError, ConfigError
from qatlora.export.build_nf4 import build_nf4, check_nf4
from qatlora.export.build_q4_0 import build_q4_0
from qatlora.export.card import model_card
from qatlora.export.folders import copy_side_files
from qatlora.report.results import BaseResult, BuildResult
from qatlora.state import Run

_BUILDERS = {"q4_0": build_q4_0, "nf4": build_nf4}
_LABELS = {"q4_0": "Q4_0", "nf4": "NF4"}
# Written anew: a card says how its own folder was made, and so does a record.
_NOT_COPIED = ("README.md", "grid.json")


def build(state: Run) -> None:
    """Write the folder beside its place, look at it, and rename it when it is whole."""
    cfg, source, layout = state.cfg, state.source, state.layout
    assert source is not None
    assert layout is not None
    kind = cfg.storage.kind.name
    target = _target(state, source)
    _require_bf16(source)
    continuation = None
    with files.replacing_folder(target) as folder:
        copy_side_files(source.folder, folder, besides=_NOT_COPIED)
        if cfg.base.chat_template:
            files.write_text(folder / "chat_template.jinja", state.tokenizer.chat_template)
        with state.bar(f"build {_LABELS[kind]}", len(source.files), "tensors") as advance:
            shard_bytes = cfg.build.max_shard_gb * 1e9
            record = _BUILDERS[kind](source, layout, folder, shard_bytes, state.device, advance)
        if kind == "nf4":
            continuation = check_nf4(folder, layout, state.tokenizer, cfg.build, state.device)
        state.build = BuildResult(
            path=str(target),
            storage=kind,
            bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            source_bytes=source.weight_bytes,
            modules=_count_kinds(layout.grid if kind == "q4_0" else layout.nf4),
            relative_error=record.relative_error,
            source_digest=record.source_digest,
            prompt=None if continuation is None else cfg.build.prompt,
            continuation=continuation,
        )
        state.base_result = BaseResult(
            name=source.name,
            storage=kind,
            parameters=layout.num_parameters,
            on_grid_share=record.on_grid_share,
            digest=record.base_digest,
        )
        files.write_text(
            folder / "README.md", model_card(state.build, state.base_result, cfg.base.hub_id)
        )


def _target(state: Run, source: Source) -> Path:
    if state.cfg.build.path is not None:
        target = Path(state.cfg.build.path)
    else:
        target = state.run_dir / f"{source.name}-{_LABELS[state.cfg.storage.kind.name]}"
    if target.exists():
        raise ConfigError(
            f"{target} exists already, and a build never replaces a folder. Remove it, or set "
            "build.path (or run_dir) to another place."
        )
    return target


def _require_bf16(source: Source) -> None:
    if source.nf4_modules or source.packed_modules:
        kind = "NF4" if source.nf4_modules else "packed Q4_0"
        raise CheckpointError(
            f"{source.folder} is stored as {kind} already, and a build starts from the weights "
            "that such a folder does not have any more. Give the bf16 checkpoint as base.path."
        )


def _count_kinds(modules: tuple[str, ...]) -> dict[str, int]:
    """Number of modules by the last part of their names, in the model's order."""
    kinds = [name.rpartition(".")[2] for name in modules]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
