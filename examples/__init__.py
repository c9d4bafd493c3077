"""Worked examples that use the installed package from outside."""
