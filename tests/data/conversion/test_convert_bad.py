"""What cannot be converted: a clear error, nothing that was good is lost, and a rerun continues."""

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
        DataError,
        match=rf"other sources or settings; choose .*, or delete {out}/train to .*\n  {shown}: .* there, .*now",
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
    with pytest.raises(DataError, match=r"other sources or settings; choose another --out, or delete .*\n  sources: "):
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


NOTHING = r"none of the samples can be used: 10 left out \(damaged image 10\), e\.g\. damaged image in record 0 of .*"


def test_nothing_usable_is_not_kept(tmp_path: Path) -> None:
    mend, out = cut_images(tmp_path), tmp_path / "out"
    with pytest.raises(DataError, match=NOTHING + "after mending the images or sources, run again"):
        convert([tmp_path / "made.json"], str(out), part_size=4)
    assert not list((out / "train").iterdir())
    mend()
    assert convert([tmp_path / "made.json"], str(out), part_size=4).samples == 10


def zipped(path: Path, images: Path, side: int) -> None:
    with zipfile.ZipFile(path, "w") as written:
        for image in images.iterdir():
            written.writestr(f"pictures/{image.name}", jpeg(int(image.stem), side))


@pytest.mark.parametrize("given", ["i.zip", "p=images", "nothing"])
def test_images_of_another_place_are_refused(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words in two folders, in which other images are."""
    made = source(tmp_path / "a", 40)
    (tmp_path / "b").mkdir()
    images = [] if given == "nothing" else [given]
    for name, side in (("a", 40), ("b", 41)):
        if given == "i.zip":
            zipped(tmp_path / name / "i.zip", tmp_path / "a" / "pictures", side)
        (tmp_path / name / "images").mkdir()
    if given == "nothing":
        (tmp_path / "b" / "made.json").write_text(made.read_text())
        (tmp_path / "b" / "pictures").mkdir()
    sources = [Path("made.json")] if given == "nothing" else [made]
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path / "a")
    convert(sources, str(out), images=images)
    assert convert(sources, str(out), images=images).samples == 40  # the very same are no others
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(DataError, match=r"other sources or settings; .*\n  images: .* there, .* now"):
        convert(sources, str(out), images=images)


def test_a_source_folder_may_get_hidden_files(tmp_path: Path) -> None:
    """As macOS writes them beside others."""
    published.make("cauldron", tmp_path / "made", samples=60)
    [folder] = {path.parent for path in (tmp_path / "made").rglob("*.parquet")}
    found = convert([folder], str(tmp_path / "out"))
    (folder / f"._{next(folder.glob('*.parquet')).name}").write_bytes(b"\0\5\x16\7")
    assert convert([folder], str(tmp_path / "out")) == found


def test_a_cut_jsonl_that_was_mended(tmp_path: Path) -> None:
    """Unlike a JSON it is begun anew; both messages say how."""
    whole = "".join(json.dumps(record) + "\n" for record in json.loads(source(tmp_path, 40).read_text()))
    made, out = tmp_path / "made.jsonl", tmp_path / "out"
    made.write_text(whole[:-30])
    with pytest.raises(DataError, match=r"is cut off or malformed .*; mend it"):
        convert([made], str(out), part_size=10)
    made.write_text(whole)
    with pytest.raises(
        DataError, match=f"begun with other sources or settings; .* or delete {out}/train to do it anew"
    ):
        convert([made], str(out), part_size=10)


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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.parametrize("out", ["", "s3://", "s3:bucket/x", "s3:///x/"])
def test_an_out_that_is_no_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"is no place; write a folder, or a URL with a bucket"):
        convert([tmp_path / "x.json"], out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["azure://a/b", "hf://a/b", "file:///tmp/x", "foo://bar"])
def test_a_cloud_that_cannot_be_listed_is_refused_at_once(tmp_path: Path, out: str) -> None:
    with pytest.raises(DataError, match=r"to s3://, gs://, oci://; convert to a folder and copy it"):
        convert([tmp_path / "x.json"], out)


@pytest.mark.parametrize("split", ["../other", "..", ".", "", "a/b", "/tmp/x", ".hidden", "-x", "a b", "x\n"])
def test_a_split_is_a_folder_in_out(tmp_path: Path, split: str) -> None:
    for out in (str(tmp_path / "out"), "s3://bucket/out"):
        with pytest.raises(DataError, match=r"(?s)--split .* must name a folder in --out"):
            convert([tmp_path / "a.json"], out, split=split)
    assert list(tmp_path.iterdir()) == []
