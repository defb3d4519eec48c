"""Miniatures of the published datasets in their original layouts, with real images and questions about them.

`make("llava_558k", folder, samples=2_000)` writes one and returns the arguments for `ssmvl data convert`.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

COLORS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 200), "yellow": (230, 210, 60)}
BACKGROUNDS = {"white": (240, 240, 240), "gray": (128, 128, 128), "black": (16, 16, 16)}
SIDES = ("left", "right")
Turn = dict[str, str]


class Drawn(NamedTuple):
    """An image and its properties."""

    data: bytes
    color: str
    background: str
    side: str

    @property
    def caption(self) -> str:
        return f"a {self.color} square on the {self.side} of a {self.background} background"

    def questions(self) -> list[tuple[str, str]]:
        return [
            ("What is the color of the square?", f"The square is {self.color}."),
            ("On which side is it?", f"It is on the {self.side}."),
            ("Is the background white?", "Yes" if self.background == "white" else "No"),
            ("Describe the image.", f"There is {self.caption}."),
        ]


def draw(number: int, kind: str = "JPEG") -> Drawn:
    """Draw the image of a number: a square on a background, with some noise, 48 to 111 pixels wide."""
    rng = np.random.default_rng(number)
    color, background, side = rng.choice(list(COLORS)), rng.choice(list(BACKGROUNDS)), rng.choice(SIDES)
    height, width = (int(pixels) for pixels in rng.integers(48, 112, size=2))
    pixels = np.full((height, width, 3), BACKGROUNDS[background])
    half = width // 2
    pixels[height // 4 : height * 3 // 4, 4 : half - 4] = COLORS[color]
    pixels = pixels if side == "left" else pixels[:, ::-1]
    noisy = (pixels + rng.integers(-12, 13, size=pixels.shape)).clip(0, 255).astype(np.uint8)
    written = io.BytesIO()
    Image.fromarray(noisy).save(written, kind)
    return Drawn(written.getvalue(), str(color), str(background), str(side))


def make(layout: str, folder: Path, samples: int = 24) -> list[str]:
    """Write one of `LAYOUTS` to a directory. Returns source files and `--images` options for the command line."""
    folder.mkdir(parents=True, exist_ok=True)
    return LAYOUTS[layout](folder, samples)


def _llava_558k(folder: Path, samples: int) -> list[str]:
    """Write captions, with images in numbered directories of one zip."""
    records = []
    with zipfile.ZipFile(folder / "images.zip", "w") as packed:
        for number in range(samples):
            name, drawn = f"{number % 660:05}/{number % 660:05}{number:04}.jpg", draw(number)
            packed.writestr(zipfile.ZipInfo(name), drawn.data)
            question = ("<image>\nGive a brief description of the image.", "What is in the photo?\n<image>")[number % 2]
            record = {"id": Path(name).stem, "image": name, "conversations": _talk([(question, drawn.caption)])}
            records.append({**record, "blip_caption": drawn.caption})
    return [_write_json(folder / "blip_laion_cc_sbu_558k.json", records), "--images", str(folder / "images.zip")]


def _llava_mix665k(folder: Path, samples: int) -> list[str]:
    """Write conversations: LLaVA's directories next to the JSON, repeated ids, and records without images."""
    names = [
        "coco/train2017/{:012}.jpg",
        "gqa/images/{}.jpg",
        "ocr_vqa/images/{}.png",
        "textvqa/train_images/{:016x}.jpg",
        "vg/VG_100K/{}.jpg",
        "vg/VG_100K_2/{}.jpg",
    ]
    records: list[dict[str, Any]] = []
    for number in range(samples):
        if number % 8 == 6:
            talk = [
                ("How many sides has a square?", "Four."),
                ("And a cube?", 'Six faces, café ☕, "twelve" edges.'),
            ] * 3
            records.append({"id": f"wgByO4Y_{number}", "model": "", "conversations": _talk(talk)})
            continue
        image = number - 7 if number % 8 == 7 else number  # the eighth record shares the image and id of the first
        name, kind = names[image % 8].format(image), "PNG" if image % 8 == 2 else "JPEG"
        drawn = draw(image, kind)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(drawn.data)
        questions = drawn.questions() * (3 if number % 8 == 3 else 1)
        questions[0] = ("<image>\n" + questions[0][0], questions[0][1])
        records.append({"id": Path(name).stem, "image": name, "conversations": _talk(questions)})
    return [_write_json(folder / "llava_v1_5_mix665k.json", records)]


def _lvis_220k(folder: Path, samples: int) -> list[str]:
    """Write conversations about COCO's images, with the images in COCO's own zip."""
    records = []
    with zipfile.ZipFile(folder / "train2017.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for number in range(samples):
            name, drawn = f"train2017/{number:012}.jpg", draw(number)
            packed.writestr(
                zipfile.ZipInfo(name), drawn.data, zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            )
            questions = drawn.questions()
            questions[0] = (questions[0][0] + "\n<image>", questions[0][1])
            records.append({"id": f"{number:012}", "image": f"coco/{name}", "conversations": _talk(questions)})
    json_file = _write_json(folder / "lvis_instruct4v_220k.json", records)
    return [json_file, "--images", f"coco={folder / 'train2017.zip'}"]


def _lrv(folder: Path, samples: int) -> list[str]:
    """Write one question per record and three records per image, half of them about absent objects."""
    records = []
    (folder / "image").mkdir()
    for number in range(samples):
        image = number // 3
        drawn = draw(image)
        (folder / "image" / f"{2_390_000 + image}.jpg").write_bytes(drawn.data)
        question, answer = drawn.questions()[number % 3] if number % 2 else ("Where is the dog?", "There is no dog.")
        task = "positive" if number % 2 else "negative"
        records.append({"image_id": str(2_390_000 + image), "question": question, "answer": answer, "task": task})
    return [_write_json(folder / "filter_cap.json", records), "--images", str(folder / "image")]


def _cauldron(folder: Path, samples: int) -> list[str]:
    """Write parquet files with image bytes: one or two images and several question-answer pairs per sample."""
    rows = []
    for number in range(samples):
        images = [draw(number), draw(number + 1_000_000, "PNG")][: 1 + (number % 4 == 3)]
        pairs = [pair for drawn in images for pair in drawn.questions()[:2]]
        texts = [{"user": question, "assistant": answer, "source": "squares"} for question, answer in pairs]
        rows.append({"images": [{"bytes": drawn.data, "path": None} for drawn in images], "texts": texts})
    half = (samples + 1) // 2
    for part, part_rows in enumerate((rows[:half], rows[half:])):
        path = folder / "squares" / f"train-{part:05}-of-00002.parquet"
        path.parent.mkdir(exist_ok=True)
        schema = pyarrow.schema(
            [
                ("images", pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))),
                (
                    "texts",
                    pyarrow.list_(pyarrow.struct([(f, pyarrow.string()) for f in ("user", "assistant", "source")])),
                ),
            ]
        )
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part_rows, schema=schema), path, row_group_size=10)
    return [str(folder / "squares")]


def _wds(folder: Path, samples: int) -> list[str]:
    """Write tars like those of img2dataset: image, caption and a JSON of metadata."""
    (folder / "tars").mkdir()
    for first in range(0, samples, 100):
        with tarfile.open(folder / "tars" / f"{first // 100:05}.tar", "w") as tar:
            for number in range(first, min(first + 100, samples)):
                key, drawn = f"{number:09}", draw(number)
                metadata = {"caption": drawn.caption, "url": "", "key": key, "status": "success"}
                for suffix, data in (
                    ("jpg", drawn.data),
                    ("json", json.dumps(metadata).encode()),
                    ("txt", drawn.caption.encode()),
                ):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return [str(folder / "tars")]


LAYOUTS: dict[str, Callable[[Path, int], list[str]]] = {
    "llava_558k": _llava_558k,
    "llava_mix665k": _llava_mix665k,
    "lvis_220k": _lvis_220k,
    "lrv": _lrv,
    "cauldron": _cauldron,
    "wds": _wds,
}


def _talk(pairs: list[tuple[str, str]]) -> list[Turn]:
    return [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)]


def _write_json(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(records))
    return str(path)
