"""Shards, read as streams of samples; the only room that imports streaming."""
