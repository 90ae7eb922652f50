"""Speed of lattice recovery: `python tests/grid/recovery_speed.py` prints weights per second.

The kinds of checkpoint take turns within every round, so that a disturbance hits all of them, and
so does a yardstick, one pass of exp and clamp over the same number of fp32 values, which says what
the machine gave at that time. Medians over the rounds; the threads are torch's.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qatlora.grid import decode, encode_reference, recover

ROWS, WIDTH, ROUNDS = 4096, 2048, 9


def on_grid(step_type: torch.dtype) -> Tensor:
    """Blocks with peak levels 4 to 8 and steps of one type, stored in bf16: [ROWS, WIDTH]."""
    generator = torch.Generator().manual_seed(11)
    latent = torch.randn(ROWS, WIDTH // 32, 32, generator=generator) * 0.02
    peak_levels = 3.6 + 5 * torch.rand(ROWS, WIDTH // 32, generator=generator)
    steps = (latent.abs().amax(-1) / peak_levels).to(step_type).float().unsqueeze(-1)
    return ((latent / steps).round().clamp(-8, 7) * steps).flatten(1).bfloat16()


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    generator = torch.Generator().manual_seed(5)
    ordinary = (torch.randn(ROWS // 8, WIDTH, generator=generator) * 0.02).bfloat16()
    latent = torch.randn(ROWS, WIDTH, generator=generator) * 0.02
    reference = decode(encode_reference(latent), torch.bfloat16)
    encoded_again = decode(encode_reference(on_grid(torch.float32)), torch.bfloat16)
    weights = {
        "bf16 steps": on_grid(torch.bfloat16),
        "fp16 steps": on_grid(torch.float16),
        "fp32 steps": on_grid(torch.float32),
        "reference encoder's steps": reference,
        "many levels without a 1": encoded_again,
        "off the grid, searched": ordinary,
    }
    plain = torch.randn(ROWS, WIDTH)
    buffer = torch.empty_like(plain)
    work = {name: (w.numel(), lambda w=w: recover(w)) for name, w in weights.items()}
    work["yardstick: exp and clamp"] = (
        plain.numel(),
        lambda: torch.exp(plain, out=buffer).clamp_(-8, 7),
    )
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, (_, call) in work.items():
            seconds[name].append(timed(call))
    print(f"{torch.get_num_threads()} threads, {ROUNDS} rounds; million weights per second")
    for name, (num_weights, _) in work.items():
        rates = [num_weights / taken / 1e6 for taken in seconds[name]]
        print(f"{name:<28}{statistics.median(rates):8.1f}   best {max(rates):8.1f}")


if __name__ == "__main__":
    main()
