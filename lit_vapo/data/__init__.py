"""Preferences and prompts: files, formats, tokens, batches."""
