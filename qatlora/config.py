"""The schema of every setting: what Hydra checks types against and what the rooms receive.

`conf/config.yaml` starts from `RootConfig`, so an unknown key or a value of the wrong type fails
while Hydra composes. `to_dataclasses` turns the composed config into plain dataclass objects and
`config_rules.validate` checks what types cannot express. Units stand in the names; enums are
matched by NAME. The file is long because it is one table: every setting with its default.
Nothing here imports torch: `--help` and a typo must be answered at once.
"""

import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qatlora.errors import ConfigError
from qatlora.paths import shipped

STAGES = (
    "preflight",
    "plan",
    "inspect",
    "build",
    "preview_data",
    "load_data",
    "teacher_cache",
    "load_base",
    "attach",
    "evaluate_base",
    "evaluate_reference",
    "train",
    "save_adapter",
    "evaluate_trained",
    "write_candidate",
    "guard",
    "publish",
    "save_base",
    "benchmark",
    "validate",
    "fidelity",
    "report",
    "decide",
)
"""Names of the pipeline's stages, in the only order in which they can run."""

CHAT_SUFFIXES = (".jsonl", ".json", ".parquet")
"""Files that data=files can read."""


class Storage(Enum):
    """How the base's trained layers are held in memory."""

    nf4 = "nf4"
    q4_0 = "q4_0"
    bf16 = "bf16"


class AdapterKind(Enum):
    """What the adapter changes: the levels (lora), the steps, or both."""

    lora = "lora"
    steps = "steps"
    both = "both"


class Rounding(Enum):
    """Steps of the merged weight: the base's (frozen) or llama.cpp's rule (reference)."""

    frozen = "frozen"
    reference = "reference"


class Dither(Enum):
    """Seeded dither of the levels; auto: where the base lies on a grid."""

    auto = "auto"
    always = "always"
    never = "never"


class Precision(Enum):
    """Arithmetic of the matrix products; auto: bf16 where the device is faster with it."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class DataKind(Enum):
    """Where the conversations come from: embedded, JSONL, files by their suffix, or the hub."""

    chitchat = "chitchat"
    jsonl = "jsonl"
    files = "files"
    hub = "hub"


class ChatFormat(Enum):
    """How records hold a conversation; qatlora/data/formats.py says what each one is."""

    auto = "auto"
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    prompt_completion = "prompt_completion"


class TeacherKind(Enum):
    """Whose output probabilities the student is held to; conf/teacher says what each one is."""

    bf16 = "bf16"
    self = "self"
    cache = "cache"
    none = "none"


class DivergenceKind(Enum):
    """What pulls the student q towards the teacher p."""

    forward_kl = "forward_kl"
    """KL(p || q): covers all the teacher does; Google's QAT recipe."""
    reverse_kl = "reverse_kl"
    """KL(q || p): prefers the teacher's modes."""
    jsd = "jsd"
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q: bounded."""


class Trained(Enum):
    """What training changes: low-rank adapters over a fixed base, or the base's weights."""

    adapters = "adapters"
    weights = "weights"


class LatentSteps(Enum):
    """Steps of trained weights: fixed at the start, llama.cpp's rule on them, or trained too."""

    frozen = "frozen"
    recomputed = "recomputed"
    learned = "learned"


class Effect(Enum):
    """What a run must have improved: the held-out chats' loss, or the KLD to the teacher."""

    task_loss = "task_loss"
    teacher_kld = "teacher_kld"


class LrScheduler(Enum):
    """Course of the learning rate after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class OtherType(Enum):
    """GGUF type of the tensors that are not Q4_0 (norms stay F32)."""

    q8_0 = "q8_0"
    f16 = "f16"
    bf16 = "bf16"
    f32 = "f32"


class BenchmarkSuite(Enum):
    """What is compared: step time and memory, or what the trained adapters keep."""

    speed = "speed"
    adapters = "adapters"


class BenchmarkMethod(Enum):
    """A method of the benchmark; qatlora/benchmark/methods.py says what each one is."""

    peft_bf16 = "peft_bf16"
    peft_nf4 = "peft_nf4"
    reference_q4_0 = "reference_q4_0"
    frozen_q4_0 = "frozen_q4_0"
    lora_q4_0 = "lora_q4_0"
    steps_q4_0 = "steps_q4_0"
    both_q4_0 = "both_q4_0"
    lora_nf4 = "lora_nf4"
    steps_nf4 = "steps_nf4"
    both_nf4 = "both_nf4"


class GridBy(Enum):
    """How a base that lies on no grid is put on one: searched steps, or llama.cpp's rule."""

    search = "search"
    reference = "reference"


class ReportTo(Enum):
    """Where the training log goes besides the run folder's own JSONL."""

    none = "none"
    wandb = "wandb"
    tensorboard = "tensorboard"


@dataclass
class CardConfig:
    """Header card of a recipe: one sentence each, shown by --help and in the docs."""

    name: str = ""
    """The recipe's name; set from its file."""
    purpose: str = ""
    hardware: str = ""
    time: str = ""
    expect: str = ""


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

    kind: AdapterKind = AdapterKind.lora
    rank: int = 16
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
    format: ChatFormat = ChatFormat.auto
    """Layout of the records; auto: as the first one of each set shows."""
    packing: bool = False
    """Fill training rows with several conversations, which do not see each other."""
    system_prompt: str | None = None
    """System turn put before every conversation that has none."""
    general: str = "wiki"
    """General text: wiki (embedded) or a text file, one document per paragraph."""
    max_length_tokens: int = 256
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
class PreviewConfig:
    """How much of the conversations the recipe data_preview renders."""

    num_examples: int = 3
    """Rows shown in full."""
    max_conversations: int = 1000
    """Conversations rendered and counted at most; all are read and checked."""


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


@dataclass
class TrainConfig:
    """The optimizer's course; rows are packed or single conversations of max_length_tokens."""

    max_steps: int = 30
    learning_rate: float = 1e-3
    """Peak rate of what moves the levels: low-rank factors, or the weights themselves."""
    steps_learning_rate: float = 1e-2
    """Peak rate of what moves the steps: low-rank factors, or a relative change per block."""
    lr_scheduler: LrScheduler = LrScheduler.cosine
    warmup_ratio: float = 0.1
    """Share of max_steps in which the rate rises from zero."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    rows_per_step: int = 4
    """Rows per optimizer step, replay rows among them, over all micro-batches and processes."""
    micro_batch_rows: int = 4
    """Rows per forward pass, at most a process's share of a step; divides rows_per_step."""
    gradient_checkpointing: bool = False
    keep_blocks: bool = True
    """Keep deployed blocks from forward to backward: one byte per weight for less time."""
    save_steps: int = 20
    """Optimizer steps between two checkpoints."""
    resume: bool = False
    """Go on with the run in run_dir from its last checkpoint; without one, start."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = Precision.auto


@dataclass
class EvaluateConfig:
    """How perplexity, KLD and the sample answers are computed."""

    tokens_per_chunk: int = 2048
    """Tokens scored at a time, against a tile of the vocabulary."""
    logits_precision: Precision = Precision.auto
    """Arithmetic of the lm_head product; the softmax is always fp32."""
    sample_max_new_tokens: int = 32
    hold_weights: bool = True
    """Keep decoded weights over many forwards, and a dense model of the file that is read back:
    two bytes per weight for less time. recipe=plan says where they fit."""


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

    gguf: bool = True
    file_name: str | None = None
    """Name inside the run folder; null: made from the base's name."""
    other_type: OtherType = OtherType.q8_0


@dataclass
class BuildConfig:
    """The folder that recipes q4_0_build and nf4_build write; storage.kind says which."""

    path: str | None = None
    """Folder to be made; null: inside the run folder, named after the base."""
    max_shard_gb: float = 4.0
    """Size of a safetensors file at most, in 10^9 bytes."""
    prompt: str = "The capital of France is"
    """What an NF4 build must go on from before it is kept."""
    max_new_tokens: int = 16


@dataclass
class InspectConfig:
    """What a checkpoint is compared with."""

    against: str | None = None
    """HF folder of the checkpoint before an edit or merge; null: no comparison."""


@dataclass
class ValidateConfig:
    """What is judged before a Q4_0 export, beside the run's base."""

    merged: str | None = None
    """HF folder of a merged checkpoint."""
    adapter: str | None = None
    """Folder of a plain LoRA (PEFT, Unsloth, Axolotl), to be merged into the base."""
    gguf: str | None = None
    """A finished GGUF of the merged checkpoint, or of the base."""
    min_share_kept: float = 0.8
    """Share of the merge's effect that Q4_0 must keep."""
    gguf_kld_max_nats: float = 0.01
    """Mean KLD from the checkpoint to the GGUF at most, nats per token."""


@dataclass
class PlanConfig:
    """What recipe=plan looks for; storage, adapter, rows and teacher are those of a run."""

    gpu_gb: float = 24.0
    """GPU to recommend settings for, in 2^30 bytes."""
    gpu_sizes_gb: list[float] = field(default_factory=lambda: [8.0, 12.0, 16.0, 24.0, 48.0, 80.0])
    """GPUs of the table of what fits."""
    row_lengths_tokens: list[int] = field(
        default_factory=lambda: [256, 512, 1024, 2048, 4096, 8192, 16384]
    )
    """Row lengths that are tried."""


@dataclass
class BenchmarkConfig:
    """What the recipe `benchmark` compares, and how long it trains for it."""

    suite: BenchmarkSuite = BenchmarkSuite.speed
    methods: list[BenchmarkMethod] = field(default_factory=list)
    """Methods to compare; empty: those of the suite."""
    tokens_per_step: list[int] = field(default_factory=lambda: [512, 2048])
    """speed: tokens of an optimizer step, in rows of data.max_length_tokens."""
    rounds: int = 5
    """speed: timed steps per method and size; in a round every method runs one step."""
    warmup_rounds: int = 1
    """speed: rounds before those, untimed."""
    grid_by: GridBy = GridBy.search
    """adapters: how a base that lies on no grid is put on one."""
    domain: str = "tiny"
    """adapters: text to learn: tiny, code, technical, multilingual, c4, wiki or a text file."""
    max_steps: int = 60
    """adapters: optimizer steps of a run."""
    rows_per_step: int = 2
    """adapters: rows of data.max_length_tokens per step."""
    learning_rates: list[float] = field(default_factory=lambda: [5e-4, 1e-3, 2e-3])
    """adapters: peak rates tried on the first seed, the same number for every method."""
    steps_rate_factor: float = 10.0
    """adapters: the factors of the steps learn at this multiple of the rate."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """adapters: seeds of the best rate's runs; the first one also tunes."""
    eval_tokens: int = 8192
    """adapters: scored tokens of each held-out text at most."""


@dataclass
class FidelityConfig:
    """Which models the recipe `fidelity` compares, with what, and on which texts."""

    models: list[str] = field(default_factory=lambda: ["nf4", "q4_0", "q4_0_reference"])
    """Each is nf4, q4_0, q4_0_reference or bf16 (the base stored so), or PLACE or PLACE@STORAGE,
    where PLACE is a folder, a GGUF file, hub:ID or embedded:NAME; see qatlora/model_spec.py."""
    reference: str | None = None
    """A model like those; null: each model's own bf16 checkpoint, else the base in bf16."""
    texts: list[str] = field(default_factory=lambda: ["wiki", "c4", "chats"])
    """chats (of the group data), texts as in data.general, or text files."""
    tokens_per_text: int = 65536
    """Scored tokens of each text at most."""
    window_tokens: int = 512
    """Length of a window, BOS included."""
    precision: Precision = Precision.auto
    """Arithmetic of weights and forwards; auto is bf16, fp32 has less noise."""
    worst_tokens: int = 20
    """Tokens with the largest KLD that are shown of each model."""


@dataclass
class LoggingConfig:
    """What is shown and where it is logged."""

    report_to: ReportTo = ReportTo.none
    project: str = "qatlora"
    """Project name for wandb."""
    log_steps: int = 1
    """Optimizer steps between two lines of the log."""
    progress_bars: bool = True


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
    plan: PlanConfig = field(default_factory=PlanConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    fidelity: FidelityConfig = field(default_factory=FidelityConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    seed: int = 0
    run_dir: str = "runs"
    """Folder of everything the run writes."""


def to_dataclasses(cfg: DictConfig) -> RootConfig:
    """Resolve the composed config into dataclass objects.

    Paths become absolute (read from the current folder, `~` expanded), and it is settled which base
    is meant.

    Raises:
        ConfigError: A key was added that the schema does not have, or an interpolation fails.
    """
    _refuse_added_keys(cfg, OmegaConf.structured(RootConfig))
    try:
        root = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key}: {reason}. Set {error.full_key}=VALUE.") from error
    if not isinstance(root, RootConfig):
        raise TypeError(f"composed from {type(root).__name__}, not from RootConfig")
    _settle_paths(root)
    settle_base(root.base)
    return root


def _refuse_added_keys(cfg: DictConfig, schema: DictConfig, prefix: str = "") -> None:
    """`+key=value` opens even a typed config, and nobody would read the key."""
    for key in map(str, cfg):
        if key not in schema:
            raise ConfigError(
                f"{prefix}{key}: there is no such setting, and none can be added. Leave it out; "
                f"the settings here are {', '.join(map(str, schema))}."
            )
        if OmegaConf.is_dict(schema[key]) and len(schema[key]):  # empty: keys are the user's own
            _refuse_added_keys(cfg[key], schema[key], f"{prefix}{key}.")


def _settle_paths(root: RootConfig) -> None:
    for section in (root.base, root.adapter, root.data, root.teacher, root.build):
        if section.path is not None:
            section.path = str(Path(section.path).expanduser().absolute())
    root.data.paths = [str(Path(path).expanduser().absolute()) for path in root.data.paths]
    if root.inspect.against is not None:
        root.inspect.against = str(Path(root.inspect.against).expanduser().absolute())
    if root.teacher.cache_path is not None:
        root.teacher.cache_path = str(Path(root.teacher.cache_path).expanduser().absolute())
    for key in ("merged", "adapter", "gguf"):
        if (path := getattr(root.validate, key)) is not None:
            setattr(root.validate, key, str(Path(path).expanduser().absolute()))


# Templates of embedded bases that have none; a displaced base must not leave one behind.
_EMBEDDED_TEMPLATES = {"gemma3_270m": "gemma3"}


def settle_base(base: BaseConfig) -> None:
    """Let a path or hub id displace an embedded or published base, and name what has no name."""
    if base.architecture and (base.path or base.hub_id != _published_hub_id(base.name)):
        base.hub_id = None if base.path else base.hub_id
        base.architecture = base.name = None
    if base.path or base.hub_id:
        if base.name == base.embedded:
            base.name = None
        base.embedded = None
    elif base.embedded and base.chat_template is None:
        base.chat_template = _EMBEDDED_TEMPLATES.get(base.embedded)
    if base.name is None:
        source = base.embedded or base.path or base.hub_id or "base"
        base.name = re.sub(r"\.gguf$", "", Path(source).name, flags=re.IGNORECASE)


def _published_hub_id(name: str | None) -> str | None:
    """The hub id in the file of conf/base that has this name; None without such a file."""
    path = shipped("conf") / "base" / f"{name}.yaml"
    return OmegaConf.load(path).get("hub_id") if path.is_file() else None
