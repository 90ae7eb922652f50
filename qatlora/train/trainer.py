"""The TRL trainer with qatlora's loss: hidden states in, weighted cross-entropy and KL out.

KL stands for the divergence that the settings name.

Every optimizer step normalizes each of its three terms by the number of tokens that carry it in the
whole step, over all micro-batches and processes, so the loss does not depend on how a batch is cut:

    loss = ce_weight * mean CE(chat) + kl_weight * mean KL(chat)
         + general_kl_weight * mean KL(replay)
"""

import operator
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from trl import SFTTrainer

from qatlora.data.rows import Row
from qatlora.distill import Divergence, LmHead, LossSettings, Teacher, chunked_loss
from qatlora.distill.losses import IGNORED_LABEL
from qatlora.errors import TrainError
from qatlora.evaluate import final_hidden_states
from qatlora.train import checkpoints
from qatlora.train.teachers import BatchTeacher, context_of

_TERMS = ("ce", "kl", "general_kl")
_PARAMETERS = "trainable.safetensors"


@dataclass(frozen=True)
class Objective:
    """The loss: weights of the three terms, the divergence, the teacher.

    Attributes:
        weights: ce, kl and general_kl, in the order of the module's formula.
        divergence: which divergence, and its temperature.
        teacher: gives a micro-batch's probabilities; None where no KL is asked for.
        settings: chunk size and compute dtype.
    """

    weights: tuple[float, float, float]
    divergence: Divergence
    teacher: BatchTeacher | None
    settings: LossSettings


class RowCollator:
    """Pad rows to the right: input_ids, attention_mask, labels; is_general [rows], keys.

    Where a row holds several sequences, position_ids stand in place of the mask: transformers reads
    from them which tokens may see each other, padding being one more sequence.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Tensors of one micro-batch."""
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        longest = max(map(len, ids))
        if any(len(row["starts"]) > 1 for row in rows):
            positions = [_positions([*row["starts"], len(row["labels"])], longest) for row in rows]
            context = {"position_ids": torch.stack(positions)}
        else:
            ones = [torch.ones_like(one) for one in ids]
            context = {"attention_mask": pad_sequence(ones, batch_first=True)}
        return context | {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
            "is_general": torch.tensor([row["source"] == "general" for row in rows]),
            "keys": torch.tensor([list(bytes.fromhex(row["key"])) for row in rows]),
        }


def training_record(row: Row) -> dict[str, Any]:
    """A row as the columns that `RowCollator` reads."""
    return vars(row) | {"key": row.key.hex()}


def _positions(starts: list[int], length: int) -> Tensor:
    """Places 0 .. length - 1, counted anew from each of `starts`."""
    places = torch.arange(length)
    begins = torch.tensor(starts)
    return places - begins[torch.searchsorted(begins, places, right=True) - 1]


class GridTrainer(SFTTrainer):
    """SFTTrainer whose loss never sees the logits of a batch."""

    def __init__(self, *, objective: Objective, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.objective = objective
        self.loss_is_scaled_for_ga = True  # by the counts of the whole step
        self._head = LmHead.of(self.model).to(objective.settings.compute_dtype)
        self._sums = torch.zeros(len(_TERMS), dtype=torch.float64)
        self._counts = torch.zeros(len(_TERMS), dtype=torch.float64)
        self._micro_batch = 0  # of the step at work, from 1

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Tokens of the step that carry a loss: [chat, replay], over all processes."""
        self._micro_batch = 0
        counts = torch.zeros(2, dtype=torch.int64)
        for batch in batch_samples:
            per_row = (batch["labels"][:, 1:] != IGNORED_LABEL).sum(dim=1)
            counts += torch.stack(
                [per_row[~batch["is_general"]].sum(), per_row[batch["is_general"]].sum()]
            ).cpu()
        counts = self.accelerator.gather(counts.to(device).unsqueeze(0)).sum(dim=0)
        return counts

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The weighted loss of one micro-batch, a share of its step's loss."""
        assert num_items_in_batch is not None
        assert not return_outputs
        hidden = _hidden_states(model, context_of(inputs))[:, :-1].flatten(0, 1)
        labels = inputs["labels"][:, 1:].flatten()
        general = inputs["is_general"].unsqueeze(1).expand_as(inputs["labels"][:, 1:]).flatten()
        scored = labels != IGNORED_LABEL
        ce, kl, general_kl = self.objective.weights
        num_chat, num_general = num_items_in_batch.clamp(min=1).tolist()
        token_ce = torch.where(scored & ~general, ce / num_chat, 0.0)
        token_kl = torch.where(scored & ~general, kl / num_chat, 0.0)
        token_kl = torch.where(scored & general, general_kl / num_general, token_kl)
        loss = chunked_loss(
            hidden,
            self._head,
            labels,
            teacher=self._teacher_of(inputs, token_kl),
            divergence=self.objective.divergence,
            token_ce_weight=token_ce,
            token_kl_weight=token_kl,
            settings=self.objective.settings,
        )
        self._micro_batch += 1
        self._require_finite(f"loss of micro-batch {self._micro_batch}", loss.total)
        self._remember(loss.token_ce, loss.token_kl, token_ce, token_kl, general)
        # Gradients are averaged over processes, and the counts are those of all of them.
        return loss.total * self.accelerator.num_processes

    def _teacher_of(self, inputs: dict[str, Tensor], weight: Tensor) -> Teacher | None:
        teacher = self.objective.teacher
        if teacher is None or not bool((weight > 0).any()):
            return None
        return teacher(inputs, weight > 0)

    def _remember(
        self, ce: Tensor, kl: Tensor, w_ce: Tensor, w_kl: Tensor, general: Tensor
    ) -> None:
        """Add the unweighted sums of the three terms to those of the step."""
        masks = (w_ce > 0, (w_kl > 0) & ~general, (w_kl > 0) & general)
        for term, (values, mask) in enumerate(zip((ce, kl, kl), masks, strict=True)):
            self._sums[term] += values[mask].sum().double().cpu()
            self._counts[term] += mask.sum().cpu()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the three terms, over all processes, since the last line of the log."""
        if "loss" in logs:
            both = torch.stack([self._sums, self._counts]).to(self.accelerator.device)
            sums, counts = self.accelerator.reduce(both, "sum").cpu()
            for name, total, count in zip(_TERMS, sums, counts, strict=True):
                if count:
                    logs[name] = (total / count).item()
            self._sums.zero_()
            self._counts.zero_()
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor:
        norm: Tensor = super()._clip_grad_norm(model)
        self._require_finite("norm of the gradient", norm)
        return norm

    def _require_finite(self, name: str, value: Tensor) -> None:
        """Stop before a step is taken, so that no checkpoint holds what it would leave.

        Raises:
            TrainError: with the step and the last checkpoint.
        """
        if bool(value.isfinite()):
            return
        last = checkpoints.last_checkpoint(Path(self.args.output_dir).parent)
        raise TrainError(
            f"Step {self.state.global_step + 1}: the {name} is {value.item()}, and only a finite "
            f"one can be learned from. The last checkpoint: {last or 'none'}; a resumed "
            "run would meet the same step. Lower train.learning_rate and start anew in another "
            "run_dir, or look at the step's data."
        )

    def store_flos(self) -> None:
        """Count none: nobody reads them, and it would wait for processes that write nothing."""

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """One process writes, beside the place; the others wait.

        Training draws no random numbers (the dither is a counter), so one state serves all.

        Raises:
            TrainError: it cannot be written, for the reason that the writer gives.
        """
        run_dir = Path(self.args.output_dir).parent
        if self.args.should_save:
            try:
                super()._save_checkpoint(model, trial)
                checkpoints.keep(run_dir, self.state.global_step)
            except (OSError, RuntimeError, SafetensorError) as problem:
                free = shutil.disk_usage(run_dir).free
                raise TrainError(
                    f"The checkpoint of step {self.state.global_step} could not be written below "
                    f"{run_dir}, where {free / 1e9:.3f} GB are free: {problem}. Make room or grant "
                    f"access there, and go on with train.resume=true run_dir={run_dir}."
                ) from problem
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return str(checkpoints.scratch(Path(self.args.output_dir).parent))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Checkpoint the trainable parameters: all that training changes in a model."""
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(dict(_trainable(self.model)), folder / _PARAMETERS)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        """Take the trainable parameters back.

        Raises:
            TrainError: the checkpoint is of another run.
        """
        path = Path(resume_from_checkpoint) / _PARAMETERS
        parameters = dict(_trainable(self.model if model is None else model))
        stored = load_file(path) if path.is_file() else {}
        shapes = ({n: t.shape for n, t in one.items()} for one in (parameters, stored))
        if operator.ne(*shapes):
            raise TrainError(
                f"{path} holds {len(stored)} parameters, and this run trains {len(parameters)} "
                "whose names or shapes differ: it is the checkpoint of another run. Set what is "
                "trained as in the killed run, or start anew with train.resume=false."
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stored[name])

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: SFTTrainer would put one into every checkpoint, and that is no result."""


def _hidden_states(model: torch.nn.Module, context: dict[str, Tensor]) -> Tensor:
    """Final hidden states [N, L, H]; of several processes, through the wrapper's own forward.

    DistributedDataParallel averages gradients only where its forward has run.
    """
    if not isinstance(model, DistributedDataParallel):
        return final_hidden_states(model, **context)
    output = model(**context, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    hidden: Tensor = output.hidden_states[-1]
    return hidden


def _trainable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, one) for name, one in model.named_parameters() if one.requires_grad)
