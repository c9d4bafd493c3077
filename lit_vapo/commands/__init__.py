"""What is done to finished runs and folders, and how a run lives in its folder."""
