"""Will it fit, how long will it take: memory and time of a run, planned without its weights or a GPU."""
