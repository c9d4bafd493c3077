"""Uncertainty estimators: one class in one file, all behind `RewardHead`."""
