"""Make a random base of about 1 GB on a Q4_0 grid, load and train it, and print the peaks.

    python peak_worker.py BASE RUN STORAGE CHECKPOINTING

Runs in a process of its own: a peak belongs to a process, and the baseline is what importing takes.
BASE is a folder with a tokenizer and a chat template, which gets config, weights and data once.
"""

import json
import sys
from pathlib import Path

import torch
from pipeline_cases import settings, write_data
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from qatlora import memory, pipeline, preflight
from qatlora.base.layout import plain_config
from qatlora.config import RootConfig, Storage, TeacherKind
from qatlora.plan.footprint import footprint
from qatlora.plan.shape import model_shape
from qatlora.state import Run


def write_base(folder: Path) -> None:
    """0.5 B parameters; linears are whole levels times one power of two."""
    config = Gemma3TextConfig(
        vocab_size=32_768,
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=14,
        num_attention_heads=6,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        architectures=["Gemma3ForCausalLM"],
    )
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    torch.manual_seed(0)
    tensors = {}
    for name, meta in shapes.items():
        if name.endswith("_proj.weight"):
            levels = torch.randint(-8, 8, meta.shape, dtype=torch.int8)
            tensors[name] = levels.bfloat16().mul_(2.0**-9)
        elif name != "lm_head.weight":
            tensors[name] = torch.randn(meta.shape).mul_(0.05).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)


def long_chats(folder: Path) -> dict[str, Path]:
    """Conversations that fill every row."""
    files = write_data(folder)
    with files["chats"].open("w", encoding="utf-8") as lines:
        for number in range(60):
            said = f"and then {number} old friends walk home together in the evening sun " * 100
            turns = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": said}]
            lines.write(json.dumps({"messages": turns}) + "\n")
    return files


def configured(base: Path, run: Path, storage: str, checkpointing: str) -> RootConfig:
    cfg = settings(base, long_chats(base), run)
    cfg.stages = ["preflight", "load_data", "load_base", "attach", "train"]
    cfg.storage.kind = Storage[storage]
    cfg.teacher.kind = TeacherKind.none
    cfg.teacher.kl_weight = cfg.teacher.general_kl_weight = 0.0
    cfg.data.max_length_tokens, cfg.data.replay_rows_per_step = 512, 0
    cfg.train.max_steps, cfg.train.save_steps = 2, 10
    cfg.train.rows_per_step = cfg.train.micro_batch_rows = 2
    cfg.train.gradient_checkpointing = cfg.train.keep_blocks = False
    if checkpointing == "true":
        cfg.train.gradient_checkpointing = True
    cfg.evaluate.hold_weights = False
    return cfg


def main(base: Path, run: Path, storage: str, checkpointing: str) -> None:
    if not (base / "config.json").is_file():
        write_base(base)
    cfg = configured(base, run, storage, checkpointing)
    state = Run.start(cfg)
    run.mkdir(parents=True, exist_ok=True)
    memory.forget_peak_rss()
    baseline, peaks = memory.resident_bytes(), {}
    for stage in cfg.stages:
        memory.forget_peak_rss()
        pipeline.STAGES[stage](state)
        peaks[stage] = memory.peak_rss_since_forgotten() - baseline
    job = preflight.planned_job(cfg, on_host=True)
    needs = footprint(model_shape(plain_config(base)), job)
    predicted = {"load_base": needs.load, "train": needs.train}
    print(json.dumps({"measured": peaks, "predicted": predicted, "baseline": baseline}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]), *sys.argv[3:])
