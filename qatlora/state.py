"""What one run knows: the settings and what each stage has left for the next."""

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qatlora import __version__, progress
from qatlora.adapters.attach import AdaptedModel
from qatlora.adapters.latents import LatentModel
from qatlora.adapters.model import GridModel
from qatlora.base.layout import Layout
from qatlora.base.load import LoadedBase
from qatlora.base.origin import origin_of
from qatlora.base.source import Source
from qatlora.config import Precision, RootConfig
from qatlora.data.rows import Batches, Text
from qatlora.distill import TeacherCache
from qatlora.errors import ConfigError
from qatlora.evaluate import KldStatistics
from qatlora.evaluate.models import Evaluation
from qatlora.export.candidate import Candidate
from qatlora.fidelity.plan import Comparison
from qatlora.llamacpp.source import llama_cpp_version
from qatlora.memory import peak_rss_bytes
from qatlora.report.json_report import plain
from qatlora.report.results import (
    AdapterResult,
    BaseResult,
    CheckpointResult,
    ExportResult,
    GuardResult,
    LatentsResult,
    LayerChange,
    RunReport,
    Sample,
    StageTime,
    TrainResult,
)
from qatlora.report.results_benchmark import BenchmarkResult
from qatlora.report.results_build import BuildResult
from qatlora.report.results_cache import CacheResult
from qatlora.report.results_curve import CurveLevel
from qatlora.report.results_fidelity import FidelityResult
from qatlora.report.results_inspect import InspectResult
from qatlora.report.results_patch import PatchResult
from qatlora.report.results_plan import PlanResult
from qatlora.report.results_preview import PreviewResult
from qatlora.report.results_runtime import RuntimeResult
from qatlora.report.results_validate import ValidateResult
from qatlora.tracking import NoTracker, Tracker

_REPORTED_PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate", "datasets", "gguf",
)  # fmt: skip


@dataclass
class Run:
    """What the stages of one run have produced so far; a field is None until its stage has run."""

    cfg: RootConfig
    run_dir: Path
    device: torch.device
    dtype: torch.dtype  # of matrix products
    source: Source | None = None
    layout: Layout | None = None
    against: Source | None = None  # the checkpoint that the source is compared with
    inspection: InspectResult | None = None
    validation: ValidateResult | None = None
    benchmark: BenchmarkResult | None = None
    plan: PlanResult | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    measured: list[Text] = field(default_factory=list)  # what these are compared on
    data_notes: dict[str, Any] = field(default_factory=dict)  # of those texts
    fidelity: FidelityResult | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    preview: PreviewResult | None = None
    batches: Batches | None = None
    build: BuildResult | None = None
    cache_result: CacheResult | None = None
    base_result: BaseResult | None = None  # what is known of it where none is loaded to be trained
    base: LoadedBase | None = None
    teacher: PreTrainedModel | None = None  # a model besides the student's
    cache: TeacherCache | None = None  # the teacher on disk
    adapted: GridModel | None = None
    recorded: dict[str, str] = field(default_factory=dict)  # tensor -> digest after training
    evaluation: Evaluation | None = None
    answers: dict[str, list[str]] = field(default_factory=dict)  # model -> one per prompt
    changes: list[LayerChange] = field(default_factory=list)
    num_changed: int = 0
    train: TrainResult | None = None
    curve_levels: list[CurveLevel] = field(default_factory=list)  # beside the scores in training
    candidate: Candidate | None = None
    guard: GuardResult | None = None
    runtime: RuntimeResult | None = None
    export: ExportResult | None = None
    patch: PatchResult | None = None
    checkpoint: CheckpointResult | None = None
    times: list[StageTime] = field(default_factory=list)
    tracker: Tracker = field(default_factory=NoTracker)  # another one from training on

    def settings(self) -> dict[str, Any]:
        """All settings as JSON values: for the run folder, and for what follows the run."""
        return plain(dataclasses.asdict(self.cfg))

    def bar(self, name: str, total: int, unit: str) -> Any:
        """A progress bar for a long part of a stage."""
        return progress.stage(name, total, unit, bars=self.cfg.logging.progress_bars)

    def measure(
        self, name: str, model: torch.nn.Module, **options: Any
    ) -> dict[str, KldStatistics]:
        """`Evaluation.measure` under a progress bar."""
        with self.bar(f"evaluate {name}", self.evaluation.num_tokens, "tokens") as advance:
            return self.evaluation.measure(name, model, advance, **options)

    def held_weights(self) -> contextlib.AbstractContextManager[None]:
        """Decoded weights of the adapted model for many forwards, where they are allowed."""
        if not self.cfg.evaluate.hold_weights:
            return contextlib.nullcontext()
        return self.adapted.held_weights(self.dtype)

    def autocast(self) -> torch.autocast:
        """The arithmetic of forwards outside evaluation and training."""
        enabled = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def stamp(self) -> dict[str, str]:
        """What made an exported file: versions, base and its storage."""
        base = self.base
        return {
            "version": __version__,
            "llama_cpp": llama_cpp_version(),
            "base": base.name,
            "base_digest": base.digest,
            "storage": base.storage,
        }

    @contextlib.contextmanager
    def tracked(self) -> Iterator[None]:
        """Within this the run is followed; it ends as failed where anything is raised."""
        try:
            yield
        except BaseException:
            self.tracker.close(failed=True)
            raise
        self.tracker.close(failed=False)

    @classmethod
    def start(cls, cfg: RootConfig) -> "Run":
        """A run whose stages are all still to come."""
        return cls(cfg, Path(cfg.run_dir), _device(cfg.train.device), dtype_of(cfg.train.precision))


def report_of(state: Run) -> RunReport:
    """What the stages have left so far, as the report; a part without its stage is None."""
    adapted = state.adapted
    prompts = state.batches.prompts if state.batches else []
    samples = [
        Sample(prompt[-1]["content"], {model: said[i] for model, said in state.answers.items()})
        for i, prompt in enumerate(prompts)
        if state.answers
    ]
    return RunReport(
        recipe=state.cfg.card.name,
        base=_base_result(state),
        origin=origin_of(state.source.folder, state.cfg.base.hub_id) if state.source else None,
        build=state.build,
        teacher_cache=state.cache_result,
        adapter=_adapter_result(adapted) if isinstance(adapted, AdaptedModel) else None,
        latents=_latents_result(adapted) if isinstance(adapted, LatentModel) else None,
        train=state.train,
        texts=state.evaluation.results() if state.evaluation else {},
        guard=state.guard,
        runtime=state.runtime,
        export=state.export,
        patch=state.patch,
        inspect=state.inspection,
        validate=state.validation,
        preview=state.preview,
        checkpoint=state.checkpoint,
        benchmark=state.benchmark,
        plan=state.plan,
        fidelity=state.fidelity,
        curve_levels=state.curve_levels,
        changes=state.changes,
        samples=samples,
        stages=list(state.times),
        peak_rss_bytes=peak_rss_bytes(),
        data_notes=state.batches.notes if state.batches else state.data_notes,
        versions={"qatlora": __version__, "llama.cpp": llama_cpp_version()}
        | {name: importlib.metadata.version(name) for name in _REPORTED_PACKAGES},
        settings=dataclasses.asdict(state.cfg),
    )


def _base_result(state: Run) -> BaseResult:
    """The loaded base, or what a stage has said of it; else what the headers tell."""
    base = state.base
    if base is not None:
        return BaseResult(
            base.name, base.storage, base.num_parameters, base.on_grid_share, base.digest
        )
    if state.base_result is not None:
        return state.base_result
    share = state.inspection.on_grid_share if state.inspection else None
    return BaseResult(state.source.name, None, state.layout.num_parameters, share, None)


def _adapter_result(adapted: AdaptedModel) -> AdapterResult:
    rule = adapted.rule
    return AdapterResult(
        kind=rule.kind,
        rank=rule.rank if rule.moves_levels else None,
        alpha=rule.alpha if rule.moves_levels else None,
        rounding=rule.rounding if rule.moves_levels else None,
        dither=rule.dithers(adapted.base.on_grid),
        steps_rank=rule.steps_rank if rule.moves_steps else None,
        trainable_parameters=adapted.num_trainable,
        tensors=len(adapted.base.trained),
    )


def _latents_result(latents: LatentModel) -> LatentsResult:
    return LatentsResult(
        steps=latents.rule.steps,
        trainable_parameters=latents.num_trainable,
        tensors=len(latents.base.trained),
    )


def _device(name: str) -> torch.device:
    # Where the driver does not suit PyTorch, devices are still counted.
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if num_gpus else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise ConfigError(
            f"train.device={name}: PyTorch {torch.__version__} sees {num_gpus} GPUs here, counted "
            "from 0. Use train.device=auto or cpu; recipe=doctor says what is missing."
        )
    return device


def dtype_of(precision: Precision) -> torch.dtype:
    """The setting as torch's dtype; auto is bf16, which no device here is slower with."""
    return torch.float32 if precision is Precision.fp32 else torch.bfloat16
