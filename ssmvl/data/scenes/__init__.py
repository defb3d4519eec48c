"""The quickstart's dataset: scenes of handwritten digits."""
