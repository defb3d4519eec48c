"""Shards, written and streamed; the only room that imports streaming."""
