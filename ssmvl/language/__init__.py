"""Language models and their state."""
