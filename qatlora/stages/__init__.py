"""Stages that only some recipes have; each takes the `Run`, and pipeline.py lists them."""
