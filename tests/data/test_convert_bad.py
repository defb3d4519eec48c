"""What cannot be converted: a clear error, nothing that was good is lost, and a rerun continues."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import boto3
import pytest
from conversion import children, expected, parts, source, start, tree, wait_until
from filelock import FileLock
from moto.server import ThreadedMotoServer

from ssmvl.data.convert import convert
from ssmvl.data.streams import read_records
from ssmvl.errors import DataError

Objects = Callable[[], dict[str, bytes]]


def unfinished(made: Path, out: Path, part_size: int = 10) -> dict[str, str]:
    """A conversion of which the first part is there; its files."""
    convert([made], str(out), part_size=part_size)
    for path in sorted((out / "train").rglob("*"), reverse=True):
        if path.name in ("index.json", "skipped.jsonl") and path.parent.name == "train":
            path.unlink()
        elif not {path.name, path.parent.name} & {"part-00000", "conversion.json"}:
            path.unlink() if path.is_file() else path.rmdir()
    return tree(out)


@pytest.mark.parametrize("key", ["sources", "name", "images", "max_side", "part_size"])
def test_other_settings_are_refused(key: str, tmp_path: Path) -> None:
    made, out = source(tmp_path, 40), tmp_path / "out"
    before = unfinished(made, out)
    if key == "sources":
        made.write_text(made.read_text().replace("Answer 7.", "Answer 8."))
    if key == "name":
        made = made.rename(tmp_path / "renamed.json")
    images = [str(tmp_path)] if key == "images" else []
    side, size = (9, 10) if key == "max_side" else (None, 11) if key == "part_size" else (None, 10)
    shown = "sources" if key == "name" else key
    with pytest.raises(
        DataError, match=rf"other settings; choose another --out or delete it\n  {shown}: .* there, .*now"
    ):
        convert([made], str(out), images=images, max_side=side, part_size=size)
    assert tree(out) == before


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    made, out = source(tmp_path, 10), tmp_path / "out"
    (out / "train").mkdir(parents=True)
    (out / "train" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"train holds other files \(thesis\.txt\); choose another --out"):
        convert([made], str(out))
    assert parts(out / "train") == []


def test_shards_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    made, out = source(tmp_path, 10), tmp_path / "out"
    convert([made], str(out))
    (out / "train" / "conversion.json").unlink()
    before = tree(out)
    with pytest.raises(DataError, match=r"unknown origin \(index\.json, but no conversion\.json\)"):
        convert([made], str(out))
    assert tree(out) == before


def test_a_damaged_conversion_json_is_refused(tmp_path: Path) -> None:
    made, out = source(tmp_path, 10), tmp_path / "out"
    convert([made], str(out))
    (out / "train" / "conversion.json").write_text('{"format": ')
    with pytest.raises(DataError, match=r"conversion\.json is damaged .*; choose another --out or delete it"):
        convert([made], str(out))


def test_a_second_conversion_at_once_is_refused(tmp_path: Path) -> None:
    made, out = source(tmp_path, 10), tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".train.lock"), pytest.raises(DataError, match=r"another conversion is writing .*train"):
        convert([made], str(out))
    assert convert([made], str(out)).samples == 10


def test_a_json_cut_in_the_middle(tmp_path: Path) -> None:
    made, out = source(tmp_path, 100), tmp_path / "out"
    text = made.read_text()
    made.write_text(text[: len(text) // 2])
    with pytest.raises(
        DataError, match=r"made\.json is cut off .* at about byte \d+, after \d+ whole records"
    ) as caught:
        convert([made], str(out), part_size=10)
    whole = int(re.findall(r"after (\d+) whole", str(caught.value))[0])
    assert 30 < whole < 70
    assert parts(out / "train") == [f"part-{number:05}" for number in range(whole // 10)]
    assert not (out / "train" / "index.json").exists()
    before = tree(out)
    with pytest.raises(DataError, match="is cut off"):  # a rerun finds the same, and keeps what there is
        convert([made], str(out), part_size=10)
    assert tree(out) == before
    made.write_text(text)  # downloaded again: what was made of its beginning stays
    kept = {path: path.stat().st_mtime_ns for path in (out / "train").glob("part-*/*")}
    convert([made], str(out), part_size=10)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    convert([made], str(tmp_path / "whole"), part_size=10)
    assert tree(out) == tree(tmp_path / "whole")


def test_a_json_mended_in_another_way_is_refused(tmp_path: Path) -> None:
    made, out = source(tmp_path, 100), tmp_path / "out"
    text = made.read_text()
    made.write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match="is cut off"):
        convert([made], str(out), part_size=10)
    made.write_text(text.replace("Answer 3.", "Answer 4."))
    with pytest.raises(DataError, match=r"other settings; choose another --out or delete it\n  sources: "):
        convert([made], str(out), part_size=10)


def test_a_wrong_image_folder_begins_nothing(tmp_path: Path) -> None:
    made, out = source(tmp_path, 10), tmp_path / "out"
    (tmp_path / "right").mkdir()
    (tmp_path / "pictures").rename(tmp_path / "right" / "pictures")
    (tmp_path / "wrong").mkdir()
    with pytest.raises(DataError, match=r"none of the first \d+ images .*wrong.*--images"):
        convert([made], str(out), images=[str(tmp_path / "wrong")])
    assert convert([made], str(out), images=[str(tmp_path / "right")]).samples == 10


def test_a_missing_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json"):
        convert([tmp_path / "nowhere.json"], str(tmp_path / "out"))


def test_nothing_usable(tmp_path: Path) -> None:
    made = source(tmp_path, 10)
    records = json.loads(made.read_text())
    for record in records:
        record["conversations"][1]["value"] = ""
    made.write_text(json.dumps(records))
    with pytest.raises(
        DataError, match=r"(?s)none of the samples can be used; .*skipped\.jsonl says why.*empty answer 10"
    ):
        convert([made], str(tmp_path / "out"))
    assert not (tmp_path / "out" / "train" / "index.json").exists()


def test_an_out_that_cannot_be_written(tmp_path: Path) -> None:
    made = source(tmp_path, 10)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match=r"file/train cannot be written .*Not a directory|File exists"):
        convert([made], str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_split_that_is_a_file(tmp_path: Path) -> None:
    made = source(tmp_path, 10)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train").write_text("mine")
    with pytest.raises(DataError, match=r"out/train cannot be read .*Not a directory"):
        convert([made], str(tmp_path / "out"))


def test_a_full_disk(tmp_path: Path) -> None:
    """No file may grow beyond 200 kB: the parts of short texts can be written, that of the images cannot."""
    made = source(tmp_path, 2_200)
    records = json.loads(made.read_text())
    for record in records[:2_100]:
        record.pop("image", None)
        record["conversations"][0]["value"] = "What?"
    made.write_text(json.dumps(records))
    out, limit = tmp_path / "out", 200_000
    process = start(made, "--out", out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, said = process.communicate()
    assert process.returncode == 2, said
    assert "part-00002 cannot be written ([Errno 27] File too large" in said
    assert "Traceback" not in said
    assert set(parts(out / "train")) <= {"part-00000", "part-00001"}  # the latter may have been under way
    assert not list((out / "train").glob(".*"))
    assert not (out / "train" / "index.json").exists()
    convert([made], str(out))
    convert([made], str(tmp_path / "whole"))
    assert tree(out) == tree(tmp_path / "whole")


def test_a_worker_that_is_killed_ends_the_run(tmp_path: Path) -> None:
    made, out = source(tmp_path, 16_000), tmp_path / "out"
    process = start(made, "--out", out)
    wait_until(lambda: parts(out / "train"), process)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == 2, said
    assert "error: a process was killed" in said
    assert "Traceback" not in said
    assert not list((out / "train").glob(".*"))
    convert([made], str(out))
    assert read_records(out / "train") == expected(made)


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
    with pytest.raises(DataError, match=r"other settings; .*\n  max_side: None there, 9 now"):
        convert([made], bucket, max_side=9)
    boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"]).put_object(
        Bucket=bucket.removeprefix("s3://"), Key="train/mine/thesis.txt", Body=b"mine"
    )
    with pytest.raises(DataError, match=r"train holds other files \(mine\)"):
        convert([made], bucket)
    assert objects() == before | {"train/mine/thesis.txt": b"mine"}


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
