"""The closed sets of values that settings take; enums are matched by NAME."""

from enum import Enum

STAGES = {
    "doctor": "looks at packages, devices, caches, tools and logins, and needs no torch",
    "apply_patch": "makes the exported GGUF out of the base's and a step patch",
    "preflight": "checks base, data, memory, disk and tools before anything long begins",
    "plan": "counts the memory of training and export on torch's meta device",
    "inspect": "reads the checkpoint tensor by tensor and looks for its grid",
    "build": "writes the base in 4 bits as a folder of its own",
    "preview_data": "renders the conversations and marks the trained tokens",
    "load_data": "reads the conversations and general text, and holds some of both out",
    "teacher_cache": "runs the teacher over the training rows and keeps its likeliest words",
    "load_base": "loads the base into its storage, and the teacher",
    "attach": "adds a fresh or saved adapter, or makes the weights trainable",
    "evaluate_base": "measures the base: perplexity, KLD to the teacher, sample answers",
    "evaluate_reference": "measures what llama.cpp's own Q4_0 makes of the base",
    "train": "trains, with checkpoints to resume from",
    "save_adapter": "writes the adapter and the digests of what it deploys",
    "evaluate_trained": "measures the trained model and counts what has changed",
    "write_candidate": "writes the GGUF under a hidden name",
    "guard": "reads the candidate back and puts it through the gates",
    "publish": "renames the candidate to its place; refused without the guard's permit",
    "save_base": "writes the trained model as a bf16 checkpoint on its grid",
    "benchmark": "trains or times the methods of the suite",
    "validate": "measures what Q4_0 exports of the merge would keep",
    "fidelity": "runs reference and models on the same tokens",
    "report": "writes report.json, report.md and the plots, and prints the table",
    "decide": "exits with 3 if a gate failed",
}
"""The pipeline's stages, in the only order in which they can run, and what each one does."""

CHAT_SUFFIXES = (".jsonl", ".json", ".parquet")
"""Files that data=files can read."""


class Storage(Enum):
    """How the base's trained layers are held in memory."""

    nf4 = "nf4"
    q4_0 = "q4_0"
    bf16 = "bf16"


class Holds(Enum):
    """What a published checkpoint holds: ordinary bf16 values, such on a Q4_0 grid, or NF4."""

    bf16 = "bf16"
    on_grid = "on_grid"
    nf4 = "nf4"


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
    """Arithmetic of the matrix products; auto is bf16, which no device here is slower with."""

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


class Latent(Enum):
    """Precision of trained weights between two steps."""

    fp32 = "fp32"
    bf16 = "bf16"


class Optimizer(Enum):
    """AdamW with moments in float32, or bitsandbytes' with moments of 8 bits."""

    adamw = "adamw"
    adamw_8bit = "adamw_8bit"


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
