"""Where a run is followed besides its own folder: wandb, TensorBoard."""
