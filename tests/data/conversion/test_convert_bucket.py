"""What cannot be converted to a bucket: a clear error, nothing that was good is lost, and a rerun continues."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import boto3
import pytest
from convert_runs import cut_images, source, start, tree, wait_until
from moto.server import ThreadedMotoServer

from ssmvl.data.conversion.convert import convert
from ssmvl.data.conversion.manifest import confirm, conversion_settings
from ssmvl.errors import DataError

Objects = Callable[[], dict[str, bytes]]


@pytest.fixture
def forbidding(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on a server that refuses everything."""

    class Handler(BaseHTTPRequestHandler):
        def __getattr__(self, name: str) -> Callable[[], None]:
            return self.refuse if name.startswith("do_") else super().__getattribute__(name)

        def refuse(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        yield "s3://closed/in"
        server.shutdown()
        thread.join()


def test_a_bucket_that_refuses(forbidding: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s3://closed/in/train cannot be read .*(403|Forbidden)"):
        convert([source(tmp_path, 10)], forbidding)


def test_a_bucket_that_does_not_exist(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s3://no-such-bucket/in/train cannot be read .*(404|Not Found)"):
        convert([source(tmp_path, 10)], "s3://no-such-bucket/in")


def test_a_bucket_with_other_files_or_settings_is_refused(bucket: str, objects: Objects, tmp_path: Path) -> None:
    made = source(tmp_path, 10)
    convert([made], bucket)
    before = objects()
    with pytest.raises(DataError, match=r"other sources or settings; .*\n  max_side: None there, 9 now"):
        convert([made], bucket, max_side=9)
    put_object(bucket, "train/mine/thesis.txt", b"mine")
    with pytest.raises(DataError, match=r"train holds other files \(mine\)"):
        convert([made], bucket)
    assert objects() == before | {"train/mine/thesis.txt": b"mine"}


def test_nothing_usable_in_a_bucket(bucket: str, objects: Objects, tmp_path: Path) -> None:
    cut_images(tmp_path)
    for _ in range(2):
        with pytest.raises(
            DataError, match=rf"none of the samples can .* after mending .*, delete {bucket}/train and run again"
        ):
            convert([tmp_path / "made.json"], bucket, part_size=4)
    assert "train/index.json" not in objects()


def put_object(bucket: str, key: str, data: bytes) -> None:
    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    client.put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=data)


def test_the_settings_in_a_bucket_are_read_back(bucket: str, objects: Objects, tmp_path: Path) -> None:
    now = conversion_settings([source(tmp_path, 10)], [], None, 10)
    put_object(bucket, "train/conversion.json", json.dumps(now).encode())
    confirm(f"{bucket}/train", now, tmp_path / "temporary")
    put_object(bucket, "train/conversion.json", json.dumps({**now, "max_side": 9}).encode())
    with pytest.raises(DataError, match=f"another conversion, .*, writes to {bucket}/train too; stop it, delete"):
        confirm(f"{bucket}/train", now, tmp_path / "temporary")


@pytest.mark.long
def test_another_conversion_to_the_same_bucket(bucket: str, objects: Objects, tmp_path: Path) -> None:
    process = start(source(tmp_path, 16_000), "--out", bucket)
    wait_until(lambda: any(name.endswith("part-00000/index.json") for name in objects()), process)
    put_object(bucket, "train/conversion.json", b'{"format": 1, "max_side": 9}')
    _, said = process.communicate()
    assert process.returncode == 2, said
    assert f"another conversion, of other sources or settings, writes to {bucket}/train too" in said
    assert "train/index.json" not in objects()


def test_a_folder_made_in_a_console(bucket: str, tmp_path: Path) -> None:
    """An empty object with the name of the folder."""
    put_object(bucket, "d/train/", b"")
    assert convert([source(tmp_path, 10)], f"{bucket}/d").samples == 10


@pytest.mark.long
def test_a_bucket_that_vanishes_halfway(
    bucket: str, objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = source(tmp_path, 16_000)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("S3_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        process = start(made, "--out", bucket)
    wait_until(lambda: any(name.endswith("part-00000/index.json") for name in objects()), process)
    server.stop()
    _, said = process.communicate()
    assert process.returncode == 2, said
    assert f"error: {bucket}/train/part-000" in said
    assert "S3_ENDPOINT_URL" in said
    assert "Traceback" not in said
    there = objects()
    assert "train/index.json" not in there
    convert([made], bucket)
    convert([made], str(tmp_path / "out"))
    assert {name: data for name, data in objects().items() if name in there} == there
    assert objects() == {
        name: (tmp_path / "out" / name).read_bytes() for name in tree(tmp_path / "out") if "lock" not in name
    }
