"""Lightning callbacks: what a run writes besides its metrics."""
