"""Fixtures for a real S3 endpoint on the loopback address: server, bucket and objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Yield the URL of an S3 server that runs for the whole test session."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the URL `s3://name` of an empty bucket for this test. Processes started by the test can reach it too."""
    for key, value in {
        "S3_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "2",
    }.items():
        monkeypatch.setenv(key, value)
    name = f"test-{abs(hash(request.node.nodeid)) % 10**12}"
    client = boto3.client("s3", endpoint_url=s3_server)
    client.create_bucket(Bucket=name)
    yield f"s3://{name}"
    for key in _keys(client, name):
        client.delete_object(Bucket=name, Key=key)
    client.delete_bucket(Bucket=name)


@pytest.fixture
def objects(s3_server: str, bucket: str) -> Callable[[], dict[str, bytes]]:
    """Return a function: `objects()` returns the content of every object in the bucket, by name."""
    client, name = boto3.client("s3", endpoint_url=s3_server), bucket.removeprefix("s3://")
    return lambda: {key: client.get_object(Bucket=name, Key=key)["Body"].read() for key in _keys(client, name)}


@pytest.fixture
def put(s3_server: str, bucket: str) -> Callable[[str, bytes], None]:
    """Return a function: `put(name, content)` writes one object of the bucket."""
    client, name = boto3.client("s3", endpoint_url=s3_server), bucket.removeprefix("s3://")
    return lambda key, content: client.put_object(Bucket=name, Key=key, Body=content)


@pytest.fixture
def delete(s3_server: str, bucket: str) -> Callable[[str], None]:
    """Return a function: `delete(name)` deletes one object of the bucket."""
    client, name = boto3.client("s3", endpoint_url=s3_server), bucket.removeprefix("s3://")
    return lambda key: client.delete_object(Bucket=name, Key=key)


def _keys(client: Any, name: str) -> list[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=name)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]
