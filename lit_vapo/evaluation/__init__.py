"""How good a reward ensemble is, whether it knows where it is not, and what a policy gains: reports, tables, files."""
