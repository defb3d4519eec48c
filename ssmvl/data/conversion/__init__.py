"""Conversion of published data sets (JSON, parquet, tars) to shards."""
