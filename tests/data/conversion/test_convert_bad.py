"""Failed conversions raise a clear error and keep finished parts, and a rerun resumes."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import zipfile
from pathlib import Path

import published
import pytest
from convert_runs import children, cut_images, expected, jpeg, parts, source, start, tree, wait_until
from filelock import FileLock

from ssmvl.data.conversion.convert import convert
from ssmvl.data.streams import read_records
from ssmvl.errors import DataError


def unfinished(json_path: Path, out: Path, part_size: int = 10) -> dict[str, str]:
    """Create a conversion with only its first part finished -> its files."""
    convert([json_path], str(out), part_size=part_size)
    for path in sorted((out / "train").rglob("*"), reverse=True):
        if path.name in ("index.json", "skipped.jsonl") and path.parent.name == "train":
            path.unlink()
        elif not {path.name, path.parent.name} & {"part-00000", "conversion.json"}:
            path.unlink() if path.is_file() else path.rmdir()
    return tree(out)


@pytest.mark.parametrize("key", ["sources", "name", "images", "max_side", "part_size"])
def test_other_settings_are_rejected(key: str, tmp_path: Path) -> None:
    json_path, out = source(tmp_path, 40), tmp_path / "out"
    before = unfinished(json_path, out)
    if key == "sources":
        json_path.write_text(json_path.read_text().replace("Answer 7.", "Answer 8."))
    if key == "name":
        json_path = json_path.rename(tmp_path / "renamed.json")
    images = [str(tmp_path)] if key == "images" else []
    side, size = (9, 10) if key == "max_side" else (None, 11) if key == "part_size" else (None, 10)
    shown = "sources" if key == "name" else key
    with pytest.raises(
        DataError,
        match=rf"other sources or settings; choose .*, or delete {out}/train to .*\n  {shown}: was .*, now",
    ):
        convert([json_path], str(out), images=images, max_side=side, part_size=size)
    assert tree(out) == before


def test_a_directory_with_other_files_is_rejected(tmp_path: Path) -> None:
    json_path, out = source(tmp_path, 10), tmp_path / "out"
    (out / "train").mkdir(parents=True)
    (out / "train" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"train holds other files \(thesis\.txt\); choose another --out"):
        convert([json_path], str(out))
    assert parts(out / "train") == []


def test_shards_of_unknown_origin_are_rejected(tmp_path: Path) -> None:
    json_path, out = source(tmp_path, 10), tmp_path / "out"
    convert([json_path], str(out))
    (out / "train" / "conversion.json").unlink()
    before = tree(out)
    with pytest.raises(DataError, match=r"unknown origin \(index\.json, but no conversion\.json\)"):
        convert([json_path], str(out))
    assert tree(out) == before


def test_a_damaged_conversion_json_is_rejected(tmp_path: Path) -> None:
    json_path, out = source(tmp_path, 10), tmp_path / "out"
    convert([json_path], str(out))
    (out / "train" / "conversion.json").write_text('{"format": ')
    with pytest.raises(DataError, match=r"conversion\.json is damaged .*; choose another --out or delete it"):
        convert([json_path], str(out))


def test_a_concurrent_conversion_is_rejected(tmp_path: Path) -> None:
    json_path, out = source(tmp_path, 10), tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".train.lock"), pytest.raises(DataError, match=r"another conversion is writing .*train"):
        convert([json_path], str(out))
    assert convert([json_path], str(out)).samples == 10


def test_a_json_truncated_in_the_middle(tmp_path: Path) -> None:
    json_path, out = source(tmp_path, 100), tmp_path / "out"
    text = json_path.read_text()
    json_path.write_text(text[: len(text) // 2])
    with pytest.raises(
        DataError, match=r"made\.json is truncated .* at about byte \d+, after \d+ complete records"
    ) as caught:
        convert([json_path], str(out), part_size=10)
    complete = int(re.findall(r"after (\d+) complete", str(caught.value))[0])
    assert 30 < complete < 70
    assert parts(out / "train") == [f"part-{number:05}" for number in range(complete // 10)]
    assert not (out / "train" / "index.json").exists()
    before = tree(out)
    with pytest.raises(DataError, match="is truncated"):  # a rerun fails again, and keeps the parts
        convert([json_path], str(out), part_size=10)
    assert tree(out) == before
    json_path.write_text(text)  # downloaded again: the finished parts are kept
    kept = {path: path.stat().st_mtime_ns for path in (out / "train").glob("part-*/*")}
    convert([json_path], str(out), part_size=10)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    convert([json_path], str(tmp_path / "whole"), part_size=10)
    assert tree(out) == tree(tmp_path / "whole")


def test_a_json_with_a_changed_beginning_is_rejected(tmp_path: Path) -> None:
    json_path, out = source(tmp_path, 100), tmp_path / "out"
    text = json_path.read_text()
    json_path.write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match="is truncated"):
        convert([json_path], str(out), part_size=10)
    json_path.write_text(text.replace("Answer 3.", "Answer 4."))
    with pytest.raises(DataError, match=r"other sources or settings; choose another --out, or delete .*\n  sources: "):
        convert([json_path], str(out), part_size=10)


def test_a_wrong_image_directory_writes_nothing(tmp_path: Path) -> None:
    json_path, out = source(tmp_path, 10), tmp_path / "out"
    (tmp_path / "right").mkdir()
    (tmp_path / "pictures").rename(tmp_path / "right" / "pictures")
    (tmp_path / "wrong").mkdir()
    with pytest.raises(DataError, match=r"none of the first \d+ images .*wrong.*--images"):
        convert([json_path], str(out), images=[str(tmp_path / "wrong")])
    assert convert([json_path], str(out), images=[str(tmp_path / "right")]).samples == 10


def test_a_missing_source_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json"):
        convert([tmp_path / "nowhere.json"], str(tmp_path / "out"))


ALL_SKIPPED = (
    r"none of the samples can be used: 10 skipped \(damaged image 10\), e\.g\. damaged image in record 0 of .*"
)


def test_no_parts_are_kept_if_all_samples_are_skipped(tmp_path: Path) -> None:
    repair, out = cut_images(tmp_path), tmp_path / "out"
    with pytest.raises(DataError, match=ALL_SKIPPED + "nothing is kept; after fixing the images or sources, run again"):
        convert([tmp_path / "made.json"], str(out), part_size=4)
    assert not list((out / "train").iterdir())
    repair()
    assert convert([tmp_path / "made.json"], str(out), part_size=4).samples == 10


def zipped(path: Path, images: Path, side: int) -> None:
    with zipfile.ZipFile(path, "w") as written:
        for image in images.iterdir():
            written.writestr(f"pictures/{image.name}", jpeg(int(image.stem), side))


@pytest.mark.parametrize("spec", ["i.zip", "p=images", "nothing"])
def test_images_in_another_directory_are_rejected(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same relative paths lead to other images in another working directory."""
    json_path = source(tmp_path / "a", 40)
    (tmp_path / "b").mkdir()
    images = [] if spec == "nothing" else [spec]
    for name, side in (("a", 40), ("b", 41)):
        if spec == "i.zip":
            zipped(tmp_path / name / "i.zip", tmp_path / "a" / "pictures", side)
        (tmp_path / name / "images").mkdir()
    if spec == "nothing":
        (tmp_path / "b" / "made.json").write_text(json_path.read_text())
        (tmp_path / "b" / "pictures").mkdir()
    sources = [Path("made.json")] if spec == "nothing" else [json_path]
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path / "a")
    convert(sources, str(out), images=images)
    assert convert(sources, str(out), images=images).samples == 40  # the same images are accepted
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(DataError, match=r"other sources or settings; .*\n  images: was .*, now"):
        convert(sources, str(out), images=images)


def test_hidden_files_in_a_source_directory_are_ignored(tmp_path: Path) -> None:
    """macOS writes such files."""
    published.make("cauldron", tmp_path / "made", samples=60)
    [folder] = {path.parent for path in (tmp_path / "made").rglob("*.parquet")}
    summary = convert([folder], str(tmp_path / "out"))
    (folder / f"._{next(folder.glob('*.parquet')).name}").write_bytes(b"\0\5\x16\7")
    assert convert([folder], str(tmp_path / "out")) == summary


def test_a_truncated_jsonl_that_was_completed(tmp_path: Path) -> None:
    """Unlike a JSON it must be converted from the start; both messages say how."""
    text = "".join(json.dumps(record) + "\n" for record in json.loads(source(tmp_path, 40).read_text()))
    json_path, out = tmp_path / "made.jsonl", tmp_path / "out"
    json_path.write_text(text[:-30])
    with pytest.raises(DataError, match=r"is truncated or malformed .*; fix it"):
        convert([json_path], str(out), part_size=10)
    json_path.write_text(text)
    with pytest.raises(
        DataError, match=f"started with other sources or settings; .* or delete {out}/train to start over"
    ):
        convert([json_path], str(out), part_size=10)


def test_an_out_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    json_path = source(tmp_path, 10)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match=r"file/train cannot be written .*Not a directory|File exists"):
        convert([json_path], str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_split_that_is_a_file_is_reported(tmp_path: Path) -> None:
    json_path = source(tmp_path, 10)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train").write_text("mine")
    with pytest.raises(DataError, match=r"out/train cannot be read .*Not a directory"):
        convert([json_path], str(tmp_path / "out"))


@pytest.mark.long
def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    """Files are limited to 200 kB: the parts of short texts can be written, but not the one with images."""
    json_path = source(tmp_path, 2_200)
    records = json.loads(json_path.read_text())
    for record in records[:2_100]:
        record.pop("image", None)
        record["conversations"][0]["value"] = "What?"
    json_path.write_text(json.dumps(records))
    out, limit = tmp_path / "out", 200_000
    process = start(
        json_path, "--out", out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    _, stderr = process.communicate()
    assert process.returncode == 2, stderr
    assert "part-00002 cannot be written ([Errno 27] File too large" in stderr
    assert "Traceback" not in stderr
    assert set(parts(out / "train")) <= {"part-00000", "part-00001"}  # the second may have been unfinished
    assert not list((out / "train").glob(".*"))
    assert not (out / "train" / "index.json").exists()
    convert([json_path], str(out))
    convert([json_path], str(tmp_path / "whole"))
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.long
def test_a_killed_worker_ends_the_run(tmp_path: Path) -> None:
    json_path, out = source(tmp_path, 16_000), tmp_path / "out"
    process = start(json_path, "--out", out)
    wait_until(lambda: parts(out / "train"), process)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, stderr = process.communicate()
    assert process.returncode == 2, stderr
    assert "error: a process was killed" in stderr
    assert "Traceback" not in stderr
    assert not list((out / "train").glob(".*"))
    convert([json_path], str(out))
    assert read_records(out / "train") == expected(json_path)


@pytest.mark.parametrize("out", ["", "s3://", "s3:bucket/x", "s3:///x/"])
def test_an_out_that_is_neither_directory_nor_url_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"--out must be a directory, or a URL with a bucket"):
        convert([tmp_path / "x.json"], out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["azure://a/b", "hf://a/b", "file:///tmp/x", "foo://bar"])
def test_a_cloud_that_cannot_be_listed_is_rejected(tmp_path: Path, out: str) -> None:
    with pytest.raises(DataError, match=r"to s3://, gs://, oci://; convert to a directory and copy it"):
        convert([tmp_path / "x.json"], out)


@pytest.mark.parametrize("split", ["../other", "..", ".", "", "a/b", "/tmp/x", ".hidden", "-x", "a b", "x\n"])
def test_a_split_must_name_a_subdirectory_of_out(tmp_path: Path, split: str) -> None:
    for out in (str(tmp_path / "out"), "s3://bucket/out"):
        with pytest.raises(DataError, match=r"(?s)--split must name a subdirectory of --out .*received"):
            convert([tmp_path / "a.json"], out, split=split)
    assert list(tmp_path.iterdir()) == []
