"""How good a reward ensemble is, and whether it knows where it is not: reports, tables and files."""
