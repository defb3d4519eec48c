"""Inspection of shards: verification, statistics, and samples as a model reads them."""
