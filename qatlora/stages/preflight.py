"""The stage `preflight`: what can be known to fail is found before anything long begins."""

from pathlib import Path

from qatlora import progress
from qatlora.adapters.saved import read_identity, require_base
from qatlora.base.layout import find_layout
from qatlora.base.load import load_tokenizer, require_storage
from qatlora.base.source import find_source
from qatlora.config import Trained
from qatlora.data.templates import chosen_template
from qatlora.export.checkpoint import require_plain
from qatlora.grid.fused import compiles_on
from qatlora.llamacpp.source import check_converter
from qatlora.preflight import describe, estimate, require, target
from qatlora.stages.benchmark import check_benchmark
from qatlora.stages.build import check_build
from qatlora.stages.fidelity import check_fidelity
from qatlora.stages.inspect import check_inspect
from qatlora.stages.patch import check_patch
from qatlora.stages.runtime import announce_runtime
from qatlora.stages.teacher import check_teacher
from qatlora.stages.teacher_cache import check_teacher_cache
from qatlora.stages.validate import check_validate
from qatlora.state import Run
from qatlora.tracking import require_tracker


def preflight(state: Run) -> None:
    """Look at the input of every stage of the run; leaves source, layout and tokenizer.

    Raises:
        QatloraError: something is missing or wrong, or the machine too small.
    """
    cfg = state.cfg
    kind = cfg.adapter.kind.name
    if cfg.adapter.path is not None:
        identity = read_identity(Path(cfg.adapter.path))
        kind = identity.rule.kind
    template = chosen_template(cfg.base.chat_template)
    state.source = find_source(cfg.base, template)
    state.layout = find_layout(state.source, cfg.base)
    if cfg.adapter.path is not None:
        require_base(identity, Path(cfg.adapter.path), state.layout.trained, cfg.storage.kind.name)
    compiles_on(state.device)  # refuses an unknown choice
    if "train" in cfg.stages:
        require_tracker(cfg.logging)
    if cfg.export.patch and "publish" in cfg.stages:
        check_patch(state, "latents" if cfg.distill.train is Trained.weights else kind)
    needs = estimate(cfg, state.source, state.layout, state.device)
    require(needs, target(cfg), state.device)
    if "save_base" in cfg.stages:
        require_plain(state.source)
    if "write_candidate" in cfg.stages:
        check_converter()
    if "inspect" in cfg.stages:
        check_inspect(state)
    if "build" in cfg.stages:
        check_build(state)
    if "benchmark" in cfg.stages:
        check_benchmark(state)
    if "validate" in cfg.stages:
        check_validate(state)
    if {"build", "preview_data", "load_base", "load_data", "fidelity"} & set(cfg.stages):
        state.tokenizer = load_tokenizer(state.source.folder)
        if template is not None:
            state.tokenizer.chat_template = template
    if {"load_base", "teacher_cache"} & set(cfg.stages):
        require_storage(state.source, cfg.storage.kind.name)
        check_teacher(state)
    if "teacher_cache" in cfg.stages:
        check_teacher_cache(state)
    if "guard" in cfg.stages:
        announce_runtime(state)
    if "fidelity" in cfg.stages:
        check_fidelity(state)
    progress.say(f"{cfg.card.name} on {state.source.name}: {describe(needs)}")
