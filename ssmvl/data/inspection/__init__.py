"""Inspection of shards: verification, statistics, and how a model reads them."""
