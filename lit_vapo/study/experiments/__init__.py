"""What a study repeats."""
