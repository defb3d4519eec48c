"""Stages and runs; the only package that imports Composer."""
