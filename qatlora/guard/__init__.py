"""The gates between a candidate and its publication."""
