"""Candidates and their publication."""
