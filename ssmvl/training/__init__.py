"""Stages, runs and Composer; the only room that imports Composer."""
