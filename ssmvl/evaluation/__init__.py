"""Evaluation: ask a trained model test questions and score its answers. Imports no Composer."""
