"""Peak host memory of the builds: `python tests/export/build_memory.py FOLDER [GB]`.

Makes a Llama-shaped bf16 checkpoint on a grid in shards of about 1 GB under FOLDER (8 GB of weights
unless told otherwise; twice that is free at the end of the largest build), runs
q4_0_build and nf4_build on it, each in a process of its own and without the table of fidelity
(which runs the bf16 model, where there is memory for it), and prints the largest resident set of
each, pages of mapped files among it. Run it from the repository's root.
"""

import functools
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from qatlora.base.unpack import embedded_base
from qatlora.export.folders import copy_side_files
from qatlora.export.shards import ShardWriter

WIDTH, INNER, HEADS, KEY_HEADS = 3072, 8192, 24, 8
SHARD_BYTES = 1e9
EMBEDDINGS = "model.embed_tokens.weight"


def tensors(num_layers: int, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """Name and bf16 weight of every tensor of a tied Llama, layer by layer.

    Whole random levels times a power of two, a copy of the same for each tensor of a shape: on a
    grid, as a QAT checkpoint is, or most of a build's time would be the search for steps.
    """
    generator = torch.Generator().manual_seed(0)

    @functools.cache
    def linear(rows: int, width: int) -> Tensor:
        levels = torch.randint(-8, 8, (rows, width), generator=generator, dtype=torch.int8)
        return levels.bfloat16().mul_(2.0**-8)

    yield EMBEDDINGS, linear(vocab_size, WIDTH)
    yield "model.norm.weight", torch.ones(WIDTH, dtype=torch.bfloat16)
    keys = WIDTH // HEADS * KEY_HEADS
    for layer in range(num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", torch.ones(WIDTH, dtype=torch.bfloat16)
        shapes = {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (keys, WIDTH),
            "self_attn.v_proj": (keys, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
        }
        for name, shape in shapes.items():
            yield f"model.layers.{layer}.{name}.weight", linear(*shape).clone()


def write_checkpoint(folder: Path, num_bytes: float) -> int:
    """A checkpoint of about `num_bytes`; returns the bytes of its weights."""
    small = embedded_base("smollm2_135m")
    folder.mkdir(parents=True)
    copy_side_files(small, folder)
    config = LlamaConfig.from_pretrained(small)
    per_layer = 2 * (2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // HEADS * KEY_HEADS + 3 * WIDTH * INNER)
    config.num_hidden_layers = max(1, round(num_bytes / per_layer))
    config.hidden_size, config.intermediate_size = WIDTH, INNER
    config.num_attention_heads, config.num_key_value_heads = HEADS, KEY_HEADS
    config.head_dim = WIDTH // HEADS
    config.save_pretrained(folder)
    weights = ShardWriter(folder, SHARD_BYTES)
    for name, tensor in tensors(config.num_hidden_layers, config.vocab_size):
        weights.add(name, tensor)
    weights.close()
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def run(recipe: str, base: Path, run_dir: Path) -> tuple[float, float]:
    """Largest resident set in bytes and wall seconds of a build in a process of its own."""
    command = [sys.executable, "-m", "qatlora", f"recipe={recipe}", f"base.path={base}"]
    command.append("stages=[preflight,build,report]")
    start = time.perf_counter()
    process = os.spawnv(os.P_NOWAIT, sys.executable, [*command, f"run_dir={run_dir}"])
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{recipe} failed with status {status}")
    return usage.ru_maxrss * 1024, time.perf_counter() - start


def main(folder: Path, gigabytes: float) -> None:
    base = folder / "checkpoint"
    total = write_checkpoint(base, gigabytes * 1e9)
    print(f"checkpoint of {total / 1e9:.2f} GB", flush=True)
    for recipe in ("q4_0_build", "nf4_build"):
        peak, seconds = run(recipe, base, folder / recipe)
        print(f"{recipe}: peak {peak / 1e9:.2f} GB, {seconds:.0f} s", flush=True)
        shutil.rmtree(folder / recipe)
    shutil.rmtree(base)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 8)
