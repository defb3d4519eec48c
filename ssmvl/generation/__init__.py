"""Generation: answers from a trained model."""
