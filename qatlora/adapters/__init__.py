"""Adapters inside the grid: attach, deployed_weight, save, load."""
