"""All settings of a run as one tree; `conf/config.yaml` starts from it."""

from dataclasses import dataclass, field

from qatlora.config.recipes import (
    BenchmarkConfig,
    BuildConfig,
    FidelityConfig,
    InspectConfig,
    PatchConfig,
    PlanConfig,
    PreviewConfig,
    ValidateConfig,
)
from qatlora.config.run import (
    AdapterConfig,
    BaseConfig,
    CardConfig,
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    GuardConfig,
    LoggingConfig,
    StorageConfig,
    TeacherConfig,
    TrainConfig,
)


@dataclass
class RootConfig:
    """All settings of one run; a room receives its own part, never this."""

    stages: list[str] = field(default_factory=list)
    """Stages of the recipe, a subsequence of STAGES."""
    card: CardConfig = field(default_factory=CardConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    build: BuildConfig = field(default_factory=BuildConfig)
    inspect: InspectConfig = field(default_factory=InspectConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    patch: PatchConfig = field(default_factory=PatchConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    fidelity: FidelityConfig = field(default_factory=FidelityConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    seed: int = 0
    overrides: list[str] = field(default_factory=list)
    """What was typed on the command line; set from it."""
    run_dir: str = "runs"
    """Folder of everything the run writes."""
