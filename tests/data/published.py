"""Miniatures of the published data sets, each in its own layout, with real images and talk about what is drawn there.

`make("llava_558k", folder, samples=2_000)` writes one and gives the arguments of `ssmvl data convert` that read it.
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

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 200), "yellow": (230, 210, 60)}
GROUNDS = {"white": (240, 240, 240), "grey": (128, 128, 128), "black": (16, 16, 16)}
SIDES = ("left", "right")
Turn = dict[str, str]


class Drawn(NamedTuple):
    """An image and what is true of it."""

    data: bytes
    colour: str
    ground: str
    side: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} square on the {self.side} of a {self.ground} ground"

    def questions(self) -> list[tuple[str, str]]:
        return [
            ("What is the colour of the square?", f"The square is {self.colour}."),
            ("On which side is it?", f"It is on the {self.side}."),
            ("Is the ground white?", "Yes" if self.ground == "white" else "No"),
            ("Describe the image.", f"There is {self.caption}."),
        ]


def draw(number: int, kind: str = "JPEG") -> Drawn:
    """The image of a number: a square on a ground, a little noisy, 48 to 111 pixels wide."""
    rng = np.random.default_rng(number)
    colour, ground, side = rng.choice(list(COLOURS)), rng.choice(list(GROUNDS)), rng.choice(SIDES)
    height, width = (int(pixels) for pixels in rng.integers(48, 112, size=2))
    pixels = np.full((height, width, 3), GROUNDS[ground])
    half = width // 2
    pixels[height // 4 : height * 3 // 4, 4 : half - 4] = COLOURS[colour]
    pixels = pixels if side == "left" else pixels[:, ::-1]
    noisy = (pixels + rng.integers(-12, 13, size=pixels.shape)).clip(0, 255).astype(np.uint8)
    written = io.BytesIO()
    Image.fromarray(noisy).save(written, kind)
    return Drawn(written.getvalue(), str(colour), str(ground), str(side))


def make(layout: str, folder: Path, samples: int = 24) -> list[str]:
    """Write one layout of `LAYOUTS` into a folder -> source files and `--images` options for the command line."""
    folder.mkdir(parents=True, exist_ok=True)
    return LAYOUTS[layout](folder, samples)


def _llava_558k(folder: Path, samples: int) -> list[str]:
    """Captions, images in one zip, in numbered folders."""
    records = []
    with zipfile.ZipFile(folder / "images.zip", "w") as packed:
        for number in range(samples):
            name, drawn = f"{number % 660:05}/{number % 660:05}{number:04}.jpg", draw(number)
            packed.writestr(zipfile.ZipInfo(name), drawn.data)
            asked = ("<image>\nGive a brief description of the image.", "What is in the photo?\n<image>")[number % 2]
            record = {"id": Path(name).stem, "image": name, "conversations": _talk([(asked, drawn.caption)])}
            records.append({**record, "blip_caption": drawn.caption})
    return [_written(folder / "blip_laion_cc_sbu_558k.json", records), "--images", str(folder / "images.zip")]


def _llava_mix665k(folder: Path, samples: int) -> list[str]:
    """Conversations: folders of LLaVA's README beside the JSON, ids that come again, text without images."""
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
        of = number - 7 if number % 8 == 7 else number  # the eighth asks about the image of the first, under its id
        name, kind = names[of % 8].format(of), "PNG" if of % 8 == 2 else "JPEG"
        drawn = draw(of, kind)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(drawn.data)
        questions = drawn.questions() * (3 if number % 8 == 3 else 1)
        questions[0] = ("<image>\n" + questions[0][0], questions[0][1])
        records.append({"id": Path(name).stem, "image": name, "conversations": _talk(questions)})
    return [_written(folder / "llava_v1_5_mix665k.json", records)]


def _lvis_220k(folder: Path, samples: int) -> list[str]:
    """Conversations about COCO's images, read from COCO's own zip."""
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
    json_file = _written(folder / "lvis_instruct4v_220k.json", records)
    return [json_file, "--images", f"coco={folder / 'train2017.zip'}"]


def _lrv(folder: Path, samples: int) -> list[str]:
    """One question a record, three records an image, half of them about what is not there."""
    records = []
    (folder / "image").mkdir()
    for number in range(samples):
        of = number // 3
        drawn = draw(of)
        (folder / "image" / f"{2_390_000 + of}.jpg").write_bytes(drawn.data)
        asked, said = drawn.questions()[number % 3] if number % 2 else ("Where is the dog?", "There is no dog.")
        task = "positive" if number % 2 else "negative"
        records.append({"image_id": str(2_390_000 + of), "question": asked, "answer": said, "task": task})
    return [_written(folder / "filter_cap.json", records), "--images", str(folder / "image")]


def _cauldron(folder: Path, samples: int) -> list[str]:
    """Parquet with the images' bytes: one or two a sample, several pairs of question and answer."""
    rows = []
    for number in range(samples):
        images = [draw(number), draw(number + 1_000_000, "PNG")][: 1 + (number % 4 == 3)]
        pairs = [pair for drawn in images for pair in drawn.questions()[:2]]
        texts = [{"user": asked, "assistant": said, "source": "squares"} for asked, said in pairs]
        rows.append({"images": [{"bytes": drawn.data, "path": None} for drawn in images], "texts": texts})
    half = (samples + 1) // 2
    for part, some in enumerate((rows[:half], rows[half:])):
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
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some, schema=schema), path, row_group_size=10)
    return [str(folder / "squares")]


def _wds(folder: Path, samples: int) -> list[str]:
    """Tars as img2dataset writes them: image, caption, and a JSON about them."""
    (folder / "tars").mkdir()
    for first in range(0, samples, 100):
        with tarfile.open(folder / "tars" / f"{first // 100:05}.tar", "w") as tar:
            for number in range(first, min(first + 100, samples)):
                key, drawn = f"{number:09}", draw(number)
                about = {"caption": drawn.caption, "url": "", "key": key, "status": "success"}
                for suffix, data in (
                    ("jpg", drawn.data),
                    ("json", json.dumps(about).encode()),
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


def _written(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(records))
    return str(path)
