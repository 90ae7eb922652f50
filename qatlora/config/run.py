"""Settings of the main path: base, adapter, data, teacher, training, guard, export, logging."""

from dataclasses import dataclass, field

from qatlora.config.choices import (
    AdapterKind,
    ChatFormat,
    DataKind,
    Dither,
    DivergenceKind,
    Effect,
    Holds,
    Latent,
    LatentSteps,
    LrScheduler,
    Optimizer,
    OtherType,
    Precision,
    ReportTo,
    Rounding,
    Storage,
    TeacherKind,
    Trained,
)


@dataclass
class CardConfig:
    """Header card of a recipe: one sentence each, shown by --help and in docs/recipes."""

    name: str = ""
    """The recipe's name; set from its file."""
    purpose: str = ""
    hardware: str = ""
    time: str = ""
    expect: str = ""
    example: str = ""
    """Settings of a typical call, as typed after recipe=NAME; empty: it needs none."""


@dataclass
class BaseConfig:
    """The checkpoint that is fine-tuned; exactly one of embedded, path and hub_id is in force.

    A path wins over an embedded base, so `base.path=DIR` needs no other key.
    """

    name: str | None = None
    """Short name for reports and file names; null: made from the source."""
    embedded: str | None = None
    """Base inside a registry package: gemma3_270m or smollm2_135m."""
    path: str | None = None
    """HF checkpoint folder or GGUF file."""
    hub_id: str | None = None
    """Model id on the Hugging Face hub."""
    architecture: str | None = None
    """Shipped configuration of a published checkpoint, which recipe=plan counts without it."""
    holds: Holds = Holds.bf16
    """What a checkpoint that is not at hand is said to hold, which recipe=plan takes for granted:
    bf16, on_grid (bf16 values on a Q4_0 grid) or nf4."""
    chat_template: str | None = None
    """Name of a shipped template or a Jinja file; null: the checkpoint's own."""
    trained: list[str] | None = None
    """Regular expressions of the trained modules' names; null: the architecture's list."""


@dataclass
class StorageConfig:
    """Storage of the trained layers in memory."""

    kind: Storage = Storage.nf4


@dataclass
class AdapterConfig:
    """What is trained, and by which rule it reaches the grid."""

    kind: AdapterKind = AdapterKind.steps
    rank: int = 16
    """Of the low-rank change of the levels."""
    alpha: float = 32.0
    """The low-rank product is scaled by alpha / rank."""
    steps_rank: int | None = None
    """Rank of the steps' factors; null: the same as rank."""
    rounding: Rounding = Rounding.frozen
    dither: Dither = Dither.auto
    path: str | None = None
    """Folder of a saved adapter, loaded instead of a fresh one."""


@dataclass
class DataConfig:
    """Conversations to learn, general text to keep, and what is held out of both."""

    kind: DataKind = DataKind.chitchat
    path: str | None = None
    """File for the kinds jsonl and files (.jsonl, .json or .parquet)."""
    paths: list[str] = field(default_factory=list)
    """Several files in place of path."""
    weights: list[float] = field(default_factory=list)
    """Shares by which training rows come from `paths`; empty: by their numbers of conversations."""
    hub_id: str | None = None
    """Data set on the Hugging Face hub, or a folder laid out like one, for kind hub."""
    hub_split: str = "train"
    """Its split that is read."""
    format: ChatFormat = ChatFormat.auto
    """Layout of the records; auto: as the first one of each set shows."""
    packing: bool = False
    """Fill training rows with several conversations, which do not see each other."""
    system_prompt: str | None = None
    """System turn put before every conversation that has none."""
    general: str = "wiki"
    """General text: wiki (embedded) or a text file, one document per paragraph."""
    max_length_tokens: int = 256
    """Length of a row; a longer conversation is cut to it."""
    eval_rows: int = 64
    """Conversations held out of training at most, for evaluation and prompts."""
    eval_tokens: int = 4096
    """Scored tokens of each held-out text at most."""
    replay_rows_per_step: int = 1
    """How many of a step's rows are general text, for its KL term."""
    replay_mix: dict[str, float] = field(default_factory=dict)
    """Texts of those rows (as in general) and their weights; empty: general alone."""
    num_prompts: int = 3
    """Held-out user turns answered before and after training."""


@dataclass
class TeacherConfig:
    """The teacher and the weights of the three loss terms (each a mean in nats per token)."""

    kind: TeacherKind = TeacherKind.bf16
    path: str | None = None
    """bf16: another checkpoint, null for the base's own bf16 weights; cache: the cache's folder."""
    ce_weight: float = 1.0
    """Cross-entropy on the assistant's tokens."""
    kl_weight: float = 0.1
    """Divergence from the teacher on the same tokens."""
    general_kl_weight: float = 1.0
    """Divergence from the teacher on the replayed general text."""
    divergence: DivergenceKind = DivergenceKind.forward_kl
    temperature: float = 1.0
    """Of both softmaxes; the divergence is not multiplied by its square."""
    beta: float = 0.5
    """The teacher's share of the mixture, for divergence=jsd."""
    cache_path: str | None = None
    """Folder that recipe=teacher_cache writes or adds to; null: inside the run folder."""
    cache_top_k: int = 64
    """Likeliest words per token that the cache keeps; the others become one bucket."""


@dataclass
class DistillConfig:
    """What is trained, and how trained weights reach the grid."""

    train: Trained = Trained.adapters
    steps: LatentSteps = LatentSteps.frozen
    """Where the steps of trained weights come from; for train=weights."""
    latent: Latent = Latent.fp32
    """How trained weights are held; bf16 is rounded stochastically. For train=weights."""


@dataclass
class TrainConfig:
    """The optimizer's course; rows are packed or single conversations of max_length_tokens."""

    max_steps: int = 30
    """Optimizer steps."""
    learning_rate: float = 1e-3
    """Peak rate of what moves the levels: low-rank factors, or the weights themselves, and then as
    a share of the median level (the grid's step) of the base."""
    steps_learning_rate: float | None = None
    """Peak rate of what moves the steps: low-rank factors, or a relative change per block; null:
    ten times learning_rate."""
    optimizer: Optimizer = Optimizer.adamw
    lr_scheduler: LrScheduler = LrScheduler.cosine
    warmup_ratio: float = 0.1
    """Share of max_steps in which the rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    rows_per_step: int = 4
    """Rows per optimizer step, replay rows among them, over all micro-batches and processes."""
    micro_batch_rows: int = 4
    """Rows per forward pass, at most a process's share of a step; divides rows_per_step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory for more time."""
    keep_blocks: bool = True
    """Keep deployed blocks from forward to backward: one byte per weight for less time."""
    save_steps: int = 20
    """Optimizer steps between two checkpoints."""
    eval_steps: int = 0
    """Optimizer steps between two scores of held-out text while training; 0: none."""
    eval_tokens: int = 1024
    """Tokens of each held-out text that are scored then: its first ones, at most these."""
    resume: bool = False
    """Go on with the run in run_dir from its last checkpoint; without one, start."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = Precision.auto

    @property
    def rate_of_steps(self) -> float:
        """Peak rate of what moves the steps, as it is in force."""
        if self.steps_learning_rate is not None:
            return self.steps_learning_rate
        return 10 * self.learning_rate


@dataclass
class EvaluateConfig:
    """How perplexity, KLD and the sample answers are computed."""

    tokens_per_chunk: int = 2048
    """Tokens scored at a time, against a tile of the vocabulary."""
    logits_precision: Precision = Precision.auto
    """Arithmetic of the lm_head product; the softmax is always fp32."""
    sample_max_new_tokens: int = 32
    """Length of a sample answer at most."""
    hold_weights: bool = True
    """Keep decoded weights over many forwards, and a dense model of the file that is read back:
    two bytes per weight (fp32: four) for less time. recipe=plan says where they fit."""


@dataclass
class GuardConfig:
    """Limits of the gates; see conf/guard/default.yaml for what each one means."""

    identity_max_differing_blocks: int = 0
    roundtrip_kld_mean_max_nats: float = 1e-6
    roundtrip_kld_p99_max_nats: float = 1e-5
    roundtrip_same_top_min_share: float = 1.0
    require_effect: bool = True
    effect: Effect = Effect.task_loss
    effect_min_standard_errors: float = 2.0
    drift_kld_increase_max_nats: float = 0.15
    llama_cpp: bool = True
    """Judge the file in llama.cpp itself where its tools are installed."""
    llama_cpp_windows: int = 3
    """Windows of held-out general text for it; the second half of each is scored."""
    llama_cpp_window_tokens: int = 256
    llama_cpp_weights_kld_max_nats: float = 5e-4
    llama_cpp_kld_max_nats: float = 0.01
    llama_cpp_teacher_kld_max_nats: float = 0.02
    override: str | None = None
    """Reason to publish although a gate failed; stamped into the GGUF."""


@dataclass
class ExportConfig:
    """The file that is published."""

    file_name: str | None = None
    """Name inside the run folder; null: made from the base's name."""
    other_type: OtherType = OtherType.q8_0
    patch: bool = False
    """Of an adapter of kind steps: also a small patch, and the base's GGUF that it belongs to."""


@dataclass
class LoggingConfig:
    """What is shown and where it is logged."""

    report_to: ReportTo = ReportTo.none
    project: str = "qatlora"
    """Project name for wandb."""
    log_steps: int = 1
    """Optimizer steps between two lines of the log."""
    progress_bars: bool = True
    """Show how far long stages are."""
