"""Preferences that people stated, studied as they are."""
