"""Stages that belong to one recipe only; `qatlora.pipeline` joins them to its own."""
