"""qatlora: QLoRA on QAT checkpoints, exported to GGUF Q4_0 without losing what was trained."""

__version__ = "0.1.0"
