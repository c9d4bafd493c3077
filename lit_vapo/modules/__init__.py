"""LightningModules: one per stage."""
