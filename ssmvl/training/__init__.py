"""Stages and runs; the only room that imports Composer."""
