"""Failed conversions to a bucket raise a clear error and keep finished parts, and a rerun resumes."""

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
from ssmvl.data.conversion.manifest import confirm_settings, conversion_settings
from ssmvl.errors import DataError

Objects = Callable[[], dict[str, bytes]]


@pytest.fixture
def denying_bucket(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on a server that denies every request."""

    class Handler(BaseHTTPRequestHandler):
        def __getattr__(self, name: str) -> Callable[[], None]:
            return self.deny if name.startswith("do_") else super().__getattribute__(name)

        def deny(self) -> None:
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


def test_a_bucket_that_denies_access_is_reported(denying_bucket: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s3://closed/in/train cannot be read .*(403|Forbidden)"):
        convert([source(tmp_path, 10)], denying_bucket)


def test_a_bucket_that_does_not_exist_is_reported(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s3://no-such-bucket/in/train cannot be read .*(404|Not Found)"):
        convert([source(tmp_path, 10)], "s3://no-such-bucket/in")


def test_a_bucket_with_other_files_or_settings_is_rejected(bucket: str, objects: Objects, tmp_path: Path) -> None:
    json_path = source(tmp_path, 10)
    convert([json_path], bucket)
    before = objects()
    with pytest.raises(DataError, match=r"other sources or settings; .*\n  max_side: was None, now 9"):
        convert([json_path], bucket, max_side=9)
    put_object(bucket, "train/mine/thesis.txt", b"mine")
    with pytest.raises(DataError, match=r"train holds other files \(mine\)"):
        convert([json_path], bucket)
    assert objects() == before | {"train/mine/thesis.txt": b"mine"}


def test_no_index_is_written_to_a_bucket_if_all_samples_are_skipped(
    bucket: str, objects: Objects, tmp_path: Path
) -> None:
    cut_images(tmp_path)
    for _ in range(2):
        with pytest.raises(
            DataError, match=rf"none of the samples can .* after fixing .*, delete {bucket}/train and run again"
        ):
            convert([tmp_path / "made.json"], bucket, part_size=4)
    assert "train/index.json" not in objects()


def put_object(bucket: str, key: str, data: bytes) -> None:
    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    client.put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=data)


def test_the_settings_in_a_bucket_are_confirmed(bucket: str, objects: Objects, tmp_path: Path) -> None:
    settings = conversion_settings([source(tmp_path, 10)], [], None, 10)
    put_object(bucket, "train/conversion.json", json.dumps(settings).encode())
    confirm_settings(f"{bucket}/train", settings, tmp_path / "temporary")
    put_object(bucket, "train/conversion.json", json.dumps({**settings, "max_side": 9}).encode())
    with pytest.raises(DataError, match=f"another conversion, .*, also writes to {bucket}/train; stop it, delete"):
        confirm_settings(f"{bucket}/train", settings, tmp_path / "temporary")


@pytest.mark.long
def test_a_concurrent_conversion_to_the_same_bucket_stops(bucket: str, objects: Objects, tmp_path: Path) -> None:
    process = start(source(tmp_path, 16_000), "--out", bucket)
    wait_until(lambda: any(name.endswith("part-00000/index.json") for name in objects()), process)
    put_object(bucket, "train/conversion.json", b'{"format": 1, "max_side": 9}')
    _, stderr = process.communicate()
    assert process.returncode == 2, stderr
    assert f"another conversion, of other sources or settings, also writes to {bucket}/train" in stderr
    assert "train/index.json" not in objects()


def test_a_directory_made_in_a_cloud_console_is_accepted(bucket: str, tmp_path: Path) -> None:
    """It is an empty object with the name of the directory."""
    put_object(bucket, "d/train/", b"")
    assert convert([source(tmp_path, 10)], f"{bucket}/d").samples == 10


@pytest.mark.long
def test_a_bucket_that_vanishes_halfway_is_reported(
    bucket: str, objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    json_path = source(tmp_path, 16_000)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("S3_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        process = start(json_path, "--out", bucket)
    wait_until(lambda: any(name.endswith("part-00000/index.json") for name in objects()), process)
    server.stop()
    _, stderr = process.communicate()
    assert process.returncode == 2, stderr
    assert f"error: {bucket}/train/part-000" in stderr
    assert "S3_ENDPOINT_URL" in stderr
    assert "Traceback" not in stderr
    uploaded = objects()
    assert "train/index.json" not in uploaded
    convert([json_path], bucket)
    convert([json_path], str(tmp_path / "out"))
    assert {name: data for name, data in objects().items() if name in uploaded} == uploaded
    assert objects() == {
        name: (tmp_path / "out" / name).read_bytes() for name in tree(tmp_path / "out") if "lock" not in name
    }
