"""Test questions asked of a trained model, and its answers scored. Imports no Composer."""
