"""Settings that belong to one recipe each: build, inspect, validate, apply_patch and so on."""

from dataclasses import dataclass, field

from qatlora.config.choices import BenchmarkMethod, BenchmarkSuite, GridBy, Precision


@dataclass
class PreviewConfig:
    """How much of the conversations the recipe data_preview renders."""

    num_examples: int = 3
    """Rows shown in full."""
    max_conversations: int = 1000
    """Conversations rendered and counted at most; all are read and checked."""


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
    """Length of that sentence at most."""


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
class PatchConfig:
    """What recipe=apply_patch puts together."""

    path: str | None = None
    """A step patch, *.patch.safetensors."""
    base: str | None = None
    """The GGUF that it belongs to."""


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
    """adapters: peak rates tried on the first seed, the same for every method."""
    extra_rates: int = 2
    """adapters: further rates at most, one by one beyond the end at which the best one lies."""
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
    vanilla: str | None = None
    """PLACE of the ordinary checkpoint that the base was trained from: it is compared in NF4, too,
    and rows are called vanilla and QAT, as on public model cards."""
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
    llama_cpp: bool = False
    """Run GGUF files in llama.cpp, too, and show its figures beside ours."""
    llama_cpp_tokens: int = 1024
    """Scored tokens of each text there; on disk each takes two bytes per word of the vocabulary."""
