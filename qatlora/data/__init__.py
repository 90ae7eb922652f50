"""Conversations and general text as token rows; `load.load_data` is the way in."""
