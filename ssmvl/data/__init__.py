"""Streams of samples from shards. The only package that imports mosaicml-streaming."""
