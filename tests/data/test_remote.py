"""Transfer of files to and from a real S3 endpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ssmvl.data.remote import fetch, is_remote, send
from ssmvl.errors import DataError


def test_sending_and_fetching(bucket: str, objects: Callable[[], dict[str, bytes]], tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"one" * 100_000)
    (tmp_path / "b.bin").write_bytes(b"two")
    send(tmp_path, f"{bucket}/in/here", ["a.bin"])
    assert objects() == {"in/here/a.bin": b"one" * 100_000}
    fetch(f"{bucket}/in/here/a.bin", tmp_path / "new" / "c.bin")
    assert (tmp_path / "new" / "c.bin").read_bytes() == b"one" * 100_000
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["c.bin"]


def test_fetching_replaces_an_existing_file(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"new")
    send(tmp_path, bucket, ["a.bin"])
    (tmp_path / "existing.bin").write_bytes(b"old")
    fetch(f"{bucket}/a.bin", tmp_path / "existing.bin")
    assert (tmp_path / "existing.bin").read_bytes() == b"new"


def test_a_missing_object_is_named(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "kept.bin").write_bytes(b"old")
    with pytest.raises(DataError, match=r"nowhere\.bin cannot be fetched.*S3_ENDPOINT_URL"):
        fetch(f"{bucket}/nowhere.bin", tmp_path / "kept.bin")
    assert (tmp_path / "kept.bin").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.bin"]


def test_a_missing_bucket_is_named(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"one")
    with pytest.raises(DataError, match=r"s3://no-such-bucket/x cannot be written"):
        send(tmp_path, "s3://no-such-bucket/x", ["a.bin"])


@pytest.mark.parametrize("mark", ["#", "?"])
def test_a_name_that_would_be_truncated_is_rejected(
    bucket: str, objects: Callable[[], dict[str, bytes]], tmp_path: Path, mark: str
) -> None:
    (tmp_path / "a.bin").write_bytes(b"one")
    with pytest.raises(DataError, match=r"must not contain # or \?"):
        send(tmp_path, f"{bucket}/x{mark}y", ["a.bin"])
    with pytest.raises(DataError, match=r"must not contain # or \?"):
        fetch(f"{bucket}/x{mark}y", tmp_path / "b.bin")
    assert objects() == {}


def test_a_file_has_its_name_only_after_the_check(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"one")
    send(tmp_path, bucket, ["a.bin"])

    def reject(partial: Path) -> None:
        assert partial.read_bytes() == b"one"
        raise DataError("not as expected")

    with pytest.raises(DataError, match=r"^not as expected$"):
        fetch(f"{bucket}/a.bin", tmp_path / "b.bin", reject)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_only_urls_are_remote() -> None:
    assert is_remote("s3://bucket/folder")
    assert is_remote("gs://bucket/folder")
    assert not is_remote("data/folder")
    assert not is_remote("/data/s3")
