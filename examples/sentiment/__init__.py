"""Controlled sentiment: the demo of the whole pipeline on a real model and real human labels."""
