"""Estimators of the advantage: what each token is better than."""
