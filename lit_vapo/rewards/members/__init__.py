"""The members of an ensemble: what they are made of, how they score, how they learn."""
