"""What a run leaves for people and scripts, made from the dataclasses of `results` alone."""
