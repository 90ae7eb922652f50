"""What a Q4_0 export would keep of a merged checkpoint, a plain LoRA or a finished GGUF."""
