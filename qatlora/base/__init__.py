"""Checkpoints as bases: sources, the three lists, storage in NF4, Q4_0 or bf16."""
