"""The one model of memory: what a run holds at its four peaks, part by part.

    load      base + the largest weight while it is read, or the teacher
    train     base + adapter, gradients, moments + kept activations + a chunk of the loss
    evaluate  base + decoded weights, if they are held + the teacher until training is over,
              + the moments, where text is scored between the steps
    export    base + the model read back from the candidate + the teacher's head

All figures are bytes on the device; on a CPU that is host memory, to which the imported libraries
come. Fragmentation and the caches of an allocator are not counted.
"""

import dataclasses
from dataclasses import dataclass

from qatlora.base.stores import CODE_BITS, Q4_0_BITS, STEP_BITS
from qatlora.distill import LossSettings
from qatlora.plan.shape import ModelShape, num_weights

BF16_BYTES = 2
FP32_BYTES = 4
# Where a trained layer keeps its blocks until the backward pass: int8 levels and their steps.
_KEPT_BLOCK_BITS = 8 + STEP_BITS
# Of a weight that is trained itself, and of its gradient.
LATENT_BYTES = {"fp32": FP32_BYTES, "bf16": BF16_BYTES}
# Of AdamW's two moments of a parameter; in 8 bits there is a scale for each 256.
MOMENTS_BYTES = {"adamw": 2 * FP32_BYTES, "adamw_8bit": 2 * (1 + FP32_BYTES / 256)}
# While the largest weight is read: as it is stored in bf16, its int8 levels, and their codes.
_READ_BYTES_PER_WEIGHT = BF16_BYTES + 1 + CODE_BITS["q4_0"] / 8
# While the largest matrix is used, its levels lie beside the decoded ones and the gradient's tiles.
_LEVEL_BYTES = 1
_NF4_VALUES_BYTES_PER_WEIGHT = BF16_BYTES  # before they become levels, NF4 is decoded itself
_TILE_BYTES = 64e6
_SCORED_BLOCK_BYTES = 32e6


@dataclass(frozen=True)
class Job:
    """The settings of a run that its memory depends on.

    Attributes:
        storage: nf4, q4_0 or bf16.
        adapter: lora, steps or both; None where the weights themselves are trained.
        latent: fp32 or bf16, where the weights themselves are trained.
        optimizer: adamw or adamw_8bit.
        rank: of the factors of the levels.
        steps_rank: of those of the steps.
        tokens: of a micro-batch: rows times their length.
        checkpointing: whether activations are computed again in the backward pass.
        keep_blocks: whether layers keep their blocks from forward to backward.
        teacher: none, cache, self or memory.
        holds_weights: whether evaluation keeps every decoded weight, and the guard a dense model.
        trains: whether there is a training stage.
        value_bytes: of a value that lies on no grid, and of a decoded weight: 2 in bf16, 4 in fp32.
        scores_in_training: whether held-out text is scored between its steps.
        on_host: whether the device is the host itself. The base then stays there beside the model
            that is read back, where it would else have moved away for it, and a head that outlives
            its model is a copy.
    """

    storage: str
    adapter: str | None = "lora"
    latent: str = "fp32"
    optimizer: str = "adamw"
    rank: int = 16
    steps_rank: int = 16
    tokens: int = 1024
    checkpointing: bool = False
    keep_blocks: bool = True
    teacher: str = "none"
    holds_weights: bool = True
    trains: bool = True
    value_bytes: int = BF16_BYTES
    scores_in_training: bool = False
    on_host: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes by part.

    Attributes:
        weights: codes of the Q4_0 list, without steps.
        steps: theirs.
        others: embeddings, norms and towers.
        replaced: of the weights, what latents take the place of; the blocks stay.
        adapter: trainable parameters.
        gradients: theirs.
        optimizer: two moments of AdamW.
        optimizer_beside: of them, what is there while text is scored.
        activations: kept for the backward pass by one micro-batch, and one layer's gradients.
        blocks: deployed blocks kept for it.
        loss: logits of a chunk, and gradients of the hidden states.
        teacher: its weights.
        head: of them its head, which held-out text is scored by to the end.
        workspace: temporaries of the largest matrix.
        held: decoded weights while many forwards run.
        read_back: the model read back from the candidate.
        reading: the largest weight, or stack of experts, while it is read.
        base_stays: whether the base is still there while the file is read back.
        head_apart: whether the head is no part of a model while there is one.
    """

    weights: float
    steps: float
    others: float
    replaced: float
    adapter: float
    gradients: float
    optimizer: float
    optimizer_beside: float
    activations: float
    blocks: float
    loss: float
    teacher: float
    head: float
    workspace: float
    held: float
    read_back: float
    reading: float
    base_stays: bool
    head_apart: bool

    @property
    def base(self) -> float:
        """The loaded base."""
        return self.weights + self.steps + self.others

    @property
    def attached(self) -> float:
        """The base once latents, if any, have replaced their weights; without what is trained."""
        return self.base - self.replaced

    @property
    def load(self) -> float:
        """Peak while loading."""
        return self.base + max(self.reading, self.teacher) + self.workspace

    @property
    def train(self) -> float:
        """Peak of a training step."""
        course = self.adapter + self.gradients + self.optimizer
        step = self.activations + self.blocks + self.loss + self.workspace
        return self.attached + self._taught_by + course + step

    @property
    def evaluate(self) -> float:
        """Peak of an evaluation: before training, or between its steps."""
        trained = self.adapter + self.optimizer_beside
        return self.attached + trained + self._taught_by + self.held + self.workspace

    @property
    def export(self) -> float:
        """Peak of export and guard."""
        ours, file = self.attached + self.adapter, self.read_back
        together = ours + file if self.base_stays else max(ours, file)
        return max(ours + self.held, together) + self.head + self.workspace

    @property
    def _taught_by(self) -> float:
        """What there is of the teacher until training is over."""
        return self.teacher + (self.head if self.head_apart else 0.0)

    @property
    def peak(self) -> float:
        """The largest of the four."""
        return max(self.load, self.train, self.evaluate, self.export)


def footprint(shape: ModelShape, job: Job) -> Footprint:
    """The memory of a job on an architecture."""
    coded = shape.nf4 if job.storage == "nf4" else shape.grid
    dense_in_memory = shape.num_grid_weights - num_weights(coded)  # Q4_0 in the GGUF alone
    weights = num_weights(coded) * CODE_BITS[job.storage] / 8 + dense_in_memory * BF16_BYTES
    others = (shape.num_parameters - shape.num_grid_weights) * job.value_bytes
    per_weight = job.value_bytes + _LEVEL_BYTES
    if job.storage == "nf4":
        per_weight += _NF4_VALUES_BYTES_PER_WEIGHT
    workspace = max(map(_area, shape.grid)) * per_weight + _TILE_BYTES
    one_layer = max(shape.kept.layers)  # its gradients, while the backward pass is in it
    dense_text = shape.num_text_parameters * job.value_bytes
    packed_text = dense_text - shape.num_grid_weights * (job.value_bytes - Q4_0_BITS / 8)
    kept_per_token = shape.kept.total(checkpointing=job.checkpointing) + one_layer  # in bf16
    result = Footprint(
        weights=weights,
        steps=shape.num_grid_weights * STEP_BITS / 8,
        others=others,
        replaced=_replaced_bytes(shape, job),
        **_course(shape, job),
        activations=job.tokens * kept_per_token * job.value_bytes / BF16_BYTES,
        blocks=_block_bytes(shape, job),
        loss=_loss_bytes(shape, job),
        teacher=shape.num_parameters * job.value_bytes if job.teacher == "memory" else 0.0,
        head=shape.num_head_weights * job.value_bytes if job.teacher != "none" else 0.0,
        workspace=workspace,
        held=shape.num_grid_weights * job.value_bytes if job.holds_weights else 0.0,
        read_back=dense_text if job.holds_weights else packed_text,
        reading=shape.max_grid_weights * _READ_BYTES_PER_WEIGHT,
        base_stays=job.holds_weights or job.on_host,
        head_apart=job.teacher == "cache" or job.on_host,
    )
    if job.trains:
        return result
    course = ("gradients", "optimizer", "optimizer_beside", "activations", "blocks", "loss")
    return dataclasses.replace(result, **dict.fromkeys(course, 0.0))


def _replaced_bytes(shape: ModelShape, job: Job) -> float:
    if job.adapter is not None:
        return 0.0
    return num_weights(shape.trained) * (CODE_BITS[job.storage] - CODE_BITS["q4_0"]) / 8


def _course(shape: ModelShape, job: Job) -> dict[str, float]:
    """Parameters, gradients and moments."""
    if job.adapter is None:
        trained = num_weights(shape.trained)
    else:
        trained = shape.adapter_parameters(job.adapter, job.rank, job.steps_rank)
    one = trained * (FP32_BYTES if job.adapter else LATENT_BYTES[job.latent])
    moments = trained * MOMENTS_BYTES[job.optimizer]
    return {
        "adapter": one,
        "gradients": one,
        "optimizer": moments,
        "optimizer_beside": moments if job.scores_in_training else 0.0,
    }


def _block_bytes(shape: ModelShape, job: Job) -> float:
    if not job.keep_blocks:
        return 0.0
    all_blocks = num_weights(shape.trained) * _KEPT_BLOCK_BITS / 8
    # Computed again, a layer keeps its blocks no longer than its own backward pass.
    return all_blocks / len(shape.kept.layers) if job.checkpointing else all_blocks


def _loss_bytes(shape: ModelShape, job: Job) -> float:
    """Logits of a chunk in bf16, the teacher's beside them, and the states with their gradient."""
    models = 1 if job.teacher == "none" else 2
    logits = models * LossSettings().chunk_tokens * shape.vocab_size * job.value_bytes
    states = (1 + models) * job.tokens * shape.hidden_size * job.value_bytes
    return logits + states + _SCORED_BLOCK_BYTES


def _area(matrix: tuple[int, int]) -> int:
    return matrix[0] * matrix[1]
