"""Aligning the policy."""
