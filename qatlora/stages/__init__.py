"""Stages that belong to one recipe; `qatlora.pipeline` lists them with all others."""
