"""Images named by a JSON: wrong directories, skipped records, and errors that stop the conversion."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
from reading import CHAT, IMAGE, TALK, opened, read, write_json

from ssmvl.data.conversion.records import Skipped
from ssmvl.errors import DataError


def test_a_wrong_image_directory_is_reported_before_the_first_chunk(tmp_path: Path) -> None:
    good = write_json(tmp_path / "good.json", [{"conversations": TALK}])
    records = [{"id": "t", "conversations": TALK}, *({"image": f"{n}.jpg", "conversations": TALK} for n in range(300))]
    bad = write_json(tmp_path / "bad.json", records)
    with pytest.raises(
        DataError, match=r"none of the first 200 images of .*bad\.json is in .*, e\.g\. 0\.jpg; .*--images"
    ):
        next(opened(good, bad))
    with pytest.raises(DataError, match=r"the image directory or zip .*nowhere does not exist"):
        next(opened(good, images=[str(tmp_path / "nowhere")]))
    (tmp_path / "199.jpg").write_bytes(IMAGE)
    assert sum(isinstance(item, Skipped) for item in read(good, bad)) == 299


def test_skipped_records_state_reason_and_position(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out.jpg").write_bytes(IMAGE)
    for name, data in {"good.jpg": IMAGE, "gone.jpg": IMAGE, "cut.jpg": IMAGE[:-9], "page.jpg": b"<html>"}.items():
        (tmp_path / "in" / name).write_bytes(data)
    names = ["good.jpg", "lost.jpg", "../out.jpg", str(tmp_path / "out.jpg"), "cut.jpg", "page.jpg", "gone.jpg"]
    records: list[Any] = [{"id": name, "image": ["good.jpg", name], "conversations": TALK} for name in names]
    records += [{"id": "marks", "conversations": [{"from": "human", "value": "<image>"}, TALK[1]]}]
    records += [{"id": "blank", "conversations": [TALK[0], {"from": "gpt", "value": " "}]}, {"id": "none"}, 5]
    path = write_json(tmp_path / "in" / "a.json", records)
    (chunk,) = opened(path, size=100)
    (tmp_path / "in" / "gone.jpg").unlink()
    good, *skipped = chunk.read()
    assert good == {"id": "good.jpg", "type": "", "conversation": CHAT, "images": [IMAGE, IMAGE]}
    assert [(item.id, item.source, item.record) for item in skipped] == [
        *((name, str(path), number) for number, name in enumerate(names[1:], 1)),
        *(("marks", str(path), 7), ("blank", str(path), 8), ("none", str(path), 9), ("a.json:10", str(path), 10)),
    ]
    assert [(item.reason, item.detail.removeprefix(item.id).partition(", beginning")[0]) for item in skipped[:6]] == [
        ("missing image", " not found"),
        ("missing image", " is outside of the image directory"),
        ("missing image", f" is in none of the image directories; give --images {tmp_path}=DIRECTORY"),
        ("damaged image", f": not a valid JPEG ({len(IMAGE) - 9} bytes"),
        ("damaged image", ": not a valid image (6 bytes"),
        ("missing image", " not found"),
    ]
    assert [item.reason for item in skipped[6:]] == [
        "image marks",
        "empty answer",
        "no conversation",
        "no conversation",
    ]


def test_an_image_directory_or_zip_that_vanishes_halfway_stops_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "in" / name).write_bytes(IMAGE)
    packed = tmp_path / "a.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("1.jpg", IMAGE)
    records = [{"image": name, "conversations": TALK} for name in ("1.jpg", "2.jpg", "1.jpg")]
    path = write_json(tmp_path / "a.json", records)
    for container in (tmp_path / "in", packed):
        chunks = opened(path, images=[str(container)], size=1)
        chunk = next(chunks)
        assert [item["images"] for item in chunk.read()] == [[IMAGE]]
        container.rename(tmp_path / "away")
        with pytest.raises(DataError, match=rf"{container.name} no longer exists; restore it"):
            list(chunk.read())
        if container != packed:
            with pytest.raises(DataError, match=r"in no longer exists; restore it"):
                next(chunks)
        (tmp_path / "away").rename(container)


def test_an_image_that_cannot_be_read_from_disk_stops_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(IMAGE)
    (chunk,) = opened(write_json(tmp_path / "a.json", [{"image": "1.jpg", "conversations": TALK}]))
    (tmp_path / "1.jpg").unlink()
    (tmp_path / "1.jpg").mkdir()
    with pytest.raises(DataError, match=r"1\.jpg cannot be read"):
        list(chunk.read())
