"""Conversion of published datasets (JSON, parquet, tars) to shards."""
