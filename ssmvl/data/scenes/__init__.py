"""Scenes of handwritten digits, the quickstart's data set."""
