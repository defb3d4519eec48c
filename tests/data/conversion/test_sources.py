"""Chunks yield the content of published files, compared with independent readers; damage is reported."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published import LAYOUTS, make
from reading import TALK, opened, read, until_error, write_json

from ssmvl.data.conversion.json_files import _Shallow, json_records
from ssmvl.errors import DataError


def write_layout(layout: str, folder: Path, samples: int = 24) -> tuple[list[str], list[str]]:
    """Write a published layout -> its sources and `--images` options."""
    arguments = make(layout, folder, samples)
    at = arguments.index("--images") if "--images" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :: 2]


# --- independent readers of published layouts


def roles(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]} for turn in turns]


def read_independently(layout: str, folder: Path) -> list[dict[str, Any]]:
    """Return the records of a published layout, without ids."""
    if layout in ("llava_558k", "lvis_220k", "llava_mix665k"):
        records = json.loads(next(folder.glob("*.json")).read_text())
        packed = {}
        for path in folder.glob("*.zip"):
            with zipfile.ZipFile(path) as archive:
                packed = {name: archive.read(name) for name in archive.namelist()}
        expected = []
        for record in records:
            name = record.get("image")
            entry = name.removeprefix("coco/") if name and layout == "lvis_220k" else name
            images = [packed[entry] if packed else (folder / name).read_bytes()] if name else []
            type_ = "text" if not name else "" if layout == "llava_558k" else name.split("/")[0]
            expected.append({"type": type_, "conversation": roles(record["conversations"]), "images": images})
        return expected
    if layout == "lrv":
        return [
            {
                "type": record["task"],
                "conversation": roles(
                    [{"from": "human", "value": record["question"]}, {"from": "gpt", "value": record["answer"]}]
                ),
                "images": [(folder / "image" / f"{record['image_id']}.jpg").read_bytes()],
            }
            for record in json.loads((folder / "filter_cap.json").read_text())
        ]
    if layout == "cauldron":
        rows = [
            row for path in sorted(folder.rglob("*.parquet")) for row in pyarrow.parquet.read_table(path).to_pylist()
        ]
        return [
            {
                "type": "",
                "conversation": [
                    {"role": role, "content": pair[role]} for pair in row["texts"] for role in ("user", "assistant")
                ],
                "images": [image["bytes"] for image in row["images"]],
            }
            for row in rows
        ]
    expected = []
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
        for key in dict.fromkeys(name.split(".")[0] for name in files):
            caption = files[f"{key}.txt"].decode()
            turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
            expected.append({"type": "", "conversation": roles(turns), "images": [files[f"{key}.jpg"]]})
    return expected


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_layout_is_read_exactly(tmp_path: Path, layout: str, size: int) -> None:
    sources, images = write_layout(layout, tmp_path)
    records = read(*sources, images=images, size=size)
    ids = [record.pop("id") for record in records]
    assert records == read_independently(layout, tmp_path)
    assert len(records) == len(set(ids)) == 24
    if layout == "llava_mix665k":
        assert ids[7] == f"{ids[0]}#2"
    if layout == "lrv":
        assert ids[:4] == ["2390000", "2390000#2", "2390000#3", "2390001"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_are_consecutive_and_deterministic(tmp_path: Path, layout: str) -> None:
    sources, images = write_layout(layout, tmp_path)
    chunks = list(opened(*sources, images=images))
    assert chunks == list(opened(*sources, images=images))
    for _, file_chunks in itertools.groupby(chunks, lambda chunk: chunk.source):
        first = 0
        for chunk in file_chunks:
            assert chunk.first == first
            first += len(chunk.ids)
            assert len(list(chunk.read())) == len(chunk.ids) <= (10 if layout == "cauldron" else 5)
    shares = [chunk.done for chunk in chunks]
    assert 0 < shares[0] <= shares[-1] <= 1
    assert shares == sorted(shares)
    assert shares[-1] > 0.8


def test_several_sources_have_unique_ids(tmp_path: Path) -> None:
    arguments = [write_layout(layout, tmp_path / layout, 8) for layout in LAYOUTS]
    sources = [source for sources, _ in arguments for source in sources]
    records = read(*sources, images=[option for _, options in arguments for option in options])
    names = [record.pop("id") for record in records]
    assert records == [record for layout in LAYOUTS for record in read_independently(layout, tmp_path / layout)]
    assert len(set(names)) == len(names) == 8 * len(LAYOUTS)


def test_repeated_ids_are_numbered_across_files(tmp_path: Path) -> None:
    one = write_json(tmp_path / "one.json", [{"id": id_, "conversations": TALK} for id_ in ("a", "a#2", "a", 5, "5")])
    two = write_json(tmp_path / "two.json", [{"conversations": TALK}, {"id": "a", "conversations": TALK}])
    ids = [record["id"] for record in read(one, two, two, size=2)]
    assert ids == ["a", "a#2", "a#3", "5", "5#2", "two.json:0", "a#4", "two.json:0#2", "a#5"]


# --- JSON


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(1 - 2**63, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.lists(VALUES, max_size=5), st.booleans(), st.sampled_from([None, 2]), st.booleans())
def test_any_json_is_parsed_like_the_json_module(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], ascii_: bool, indent: int | None, bom: bool
) -> None:
    folder = tmp_path_factory.mktemp("json")
    start = "\ufeff" if bom else ""
    (folder / "a.json").write_text(start + json.dumps(values, ensure_ascii=ascii_, indent=indent))
    objects = [{"value": value} for value in values]
    lines = "".join(json.dumps(value, ensure_ascii=ascii_) + "\n" for value in objects)
    (folder / "a.jsonl").write_text(start + lines.replace("\n", "\n\n" if indent else "\n"))
    for name, expected in (("a.json", values), ("a.jsonl", objects)):
        records = [record for record, _ in json_records(folder / name)]
        assert records == expected
        assert [repr(record) for record in records] == [repr(value) for value in expected]  # 1 is not 1.0, nor True


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_complete_records_of_a_truncated_json_are_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    records = [{"id": str(number), "conversations": TALK} for number in range(20)]
    path = tmp_path_factory.mktemp("json") / "cut.json"
    text = json.dumps(records)
    cut = data.draw(st.integers(2, len(text) - 1))
    path.write_text(text[:cut])
    ends = list(itertools.accumulate(len(json.dumps(record)) + 2 for record in records))
    complete = sum(end - 1 <= cut for end in ends)
    read_records, error = until_error(path, 3)
    assert [record["id"] for record in read_records] == [str(number) for number in range(complete // 3 * 3)]
    assert f"cut.json is truncated or malformed at about byte {cut}, after {complete} complete" in error


def test_a_malformed_byte_is_reported_with_its_offset(tmp_path: Path) -> None:
    lines = [json.dumps({"id": str(number), "conversations": TALK}) for number in range(5_000)]
    offset = sum(map(len, lines[:3_000])) + 3_000
    lines[3_000] = lines[3_000].replace(":", "=", 1)
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    chunks = opened(tmp_path / "a.jsonl", size=1_000)
    assert [next(chunks).first for _ in range(3)] == [0, 1_000, 2_000]
    with pytest.raises(DataError, match="after 3000 complete records") as raised:
        next(chunks)
    reported = int(str(raised.value).split("byte ")[1].split(",")[0])
    assert abs(reported - offset) < 70_000


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("pad", [0, 65_300, 65_400])
def test_a_json_that_is_nested_too_deeply_is_rejected(tmp_path: Path, suffix: str, pad: int) -> None:
    path, ends = tmp_path / f"a.{suffix}", ("[", "]") if suffix == "json" else ("", "")
    text = json.dumps('[{"' * 40 + "\\" * 3 + "x" * pad + '\\"]' + "{[" * 90)  # brackets within a string
    for levels, allowed in ((64 - len(ends[0]), True), (65 - len(ends[0]), False), (100, False)):
        pairs = (levels - 1) // 2
        value = "[" * (levels - 2 * pairs - 1) + '[{"a":' * pairs + f"[{text}, 1]" + "}]" * pairs
        value += "]" * (levels - 2 * pairs - 1)
        path.write_text(ends[0] + f"{text}{',' if ends[0] else chr(10)}{value}" + ends[1])
        if allowed:
            assert json.dumps(next(json_records(path))[0]) == text
        else:
            with pytest.raises(DataError, match=rf"a\.{suffix} is nested more than 64 levels deep before byte \d+"):
                list(json_records(path))


def test_an_integer_beyond_64_bits_is_reported(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [{"conversations": TALK}, {"id": 1 << 70}])
    with pytest.raises(
        DataError, match=r"has an integer beyond 64 bits at about byte .* after 1 complete .*write it as a"
    ):
        list(json_records(path))


@given(
    st.lists(
        st.recursive(
            st.floats() | st.none() | st.text(st.sampled_from('NaIinfty\\"-é,[ ')),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("Na\\", max_size=3), inner, max_size=3),
            max_leaves=8,
        ).map(lambda value: {"value": value}),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 40),
)
def test_nan_and_infinity_of_pythons_json_are_read_as_null(records: list[Any], size: int) -> None:
    written = json.dumps(records)
    file, text = _Shallow(io.BytesIO(written.encode()), Path("a.json")), b""
    while data := file.read(size):
        text += data
    assert json.loads(text) == json.loads(written, parse_constant=lambda _: None)


@pytest.mark.parametrize(
    ("name", "lines"), [("a.json", True), ("a.jsonl", False), ("a.jsonl", True), ("a.json", False)]
)
def test_json_lines_and_lists_are_told_apart_by_content(tmp_path: Path, name: str, lines: bool) -> None:
    records = [{"id": str(number), "image": None, "x": ["}\n{"]} for number in range(3)]
    text = "\n\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1)
    (tmp_path / name).write_text(text)
    assert [record for record, _ in json_records(tmp_path / name)] == records


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.json",
            '{"data": []}',
            "is one object; it must be a JSON list of records, .*, or JSON Lines; if the records are under one",
        ),
        ("a.json", "", "is empty"),
        ("a.json", "  \n", "is empty"),
        ("a.json", "[]", "contains no records"),
        ("a.jsonl", "", "contains no records"),
        ("a.json", "<html>", "beginning with b'<'"),
        ("a.json", "[", "at about byte 1, after 0 complete records"),
        ("a.json", '[{"a": NaM}]', "after 0 complete records"),
        ("a.jsonl", "version https://git-lfs", "after 0 complete records"),
        ("a.csv", "", r"a\.csv is not a supported source\. Allowed sources: \*\.json"),
        ("a.tar.gz", "", "is not a supported source"),
        ("a.parquet", "PAR1", r"a\.parquet is not a parquet file, or is damaged"),
        ("a.tar", "", r"a\.tar is not a tar"),
        ("a.tar", "text" * 1000, r"a\.tar is not a tar, or is damaged at byte 0"),
    ],
)
def test_unreadable_sources_are_reported(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        list(opened(tmp_path / name))
    assert str(tmp_path / name) in str(raised.value)


def test_missing_files_and_empty_directories_are_reported(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [])
    with pytest.raises(DataError, match=r"b\.json does not exist"):
        next(opened(tmp_path / "b.json"))
    with pytest.raises(DataError, match=r"c\.json cannot be read after 0 records"):
        list(json_records(tmp_path / "c.json"))
    with pytest.raises(DataError, match=r"is a directory without \*\.parquet or \*\.tar"):
        next(opened(tmp_path))
