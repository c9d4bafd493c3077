"""What PPO maximises: one class in one file, all behind `Objective`."""
