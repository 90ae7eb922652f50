"""The TRL trainer with losses over hidden states."""
