"""Several processes of one run, as torchrun starts them: all of them train, the first one writes.

Gradients are averaged by DistributedDataParallel. What comes before and after training, the first
process does alone; the others wait for it at the next collective call, or have ended.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import distributed

from qatlora.errors import ConfigError

_LONGEST_WAIT = timedelta(days=2)  # for an evaluation or an export by the first process

# What `accelerate launch` tells its processes; Trainer acts on it, whatever model it is given.
_SHARDING = (
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)

Result = TypeVar("Result")


def is_first() -> bool:
    """True in the process that writes, and where there is only one."""
    return int(os.environ.get("RANK", "0")) == 0


def count() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count_here() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count()))


def require_one(recipe: str) -> None:
    """Refuse several processes for a recipe without training.

    Raises:
        ConfigError: there are several.
    """
    if count() > 1:
        raise ConfigError(
            f"recipe={recipe} in {count()} processes: they share the training, and this recipe "
            "does not train. Start it without torchrun."
        )


def _refuse_sharding() -> None:
    chosen = [name for name in _SHARDING if os.environ.get(name) == "true"]
    if chosen:
        raise ConfigError(
            f"accelerate was told to shard the model ({chosen[0]}=true), and a base on the grid is "
            "packed bytes beside its steps, which cannot be cut into pieces of parameters. Launch "
            "with distributed_type: MULTI_GPU, as docs/accelerate/two_gpus.yaml has it."
        )


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """Connect the processes for a run; without torchrun nothing is done.

    Args:
        device: the setting train.device; each process takes the GPU of its local rank.

    Raises:
        ConfigError: accelerate's configuration asks for FSDP or the like.
    """
    _refuse_sharding()
    if count() == 1:
        yield
        return
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    PartialState(cpu=on_cpu, timeout=_LONGEST_WAIT)
    yield
    distributed.destroy_process_group()


def of_first(text: str) -> str:
    """What the first process says, in all of them."""
    said = [text]
    if distributed.is_initialized():
        distributed.broadcast_object_list(said)
    return said[0]


def first_before_rest(action: Callable[[], Result]) -> Result:
    """Let the first process do it before the others do the same: files are then in place."""
    if not is_first():
        _wait()
    result = action()
    if is_first():
        _wait()
    return result


def largest(number: int) -> int:
    """Over all processes."""
    if not distributed.is_initialized():
        return number
    value = torch.tensor(number, device=PartialState().device)
    distributed.all_reduce(value, distributed.ReduceOp.MAX)
    return int(value)


def _wait() -> None:
    if distributed.is_initialized():
        distributed.barrier()
