"""A language model of half a million parameters, for studies that repeat PPO hundreds of times."""
