"""Streams of samples from shards. The only room that imports mosaicml-streaming."""
