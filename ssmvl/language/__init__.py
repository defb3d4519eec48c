"""Language models and their states."""
