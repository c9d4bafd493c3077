"""Variance-aware policy optimisation: alignment only as far as an ensemble of reward models agrees."""

__version__ = "0.1.0"
