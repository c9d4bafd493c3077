"""Training an ensemble of reward models."""
