"""Cases of the suite `data`: converting, verifying and loading images, as shares of copying and decoding them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ssmvl.benchmarks.limits import seconds
from ssmvl.benchmarks.model_cases import Row, compare
from ssmvl.errors import DataError, MissingDependencyError
from ssmvl.interfaces import ImageSpec
from ssmvl.processing.batch import num_samples
from ssmvl.processing.image_decoding import open_image
from ssmvl.processing.processor import Processor
from ssmvl.processing.prompts import MambaPrompt
from ssmvl.processing.tokenizers import byte_tokenizer

MEMORY = 1.5e9  # limit in bytes for all processes of a conversion together
SAMPLE_EVERY = 0.2  # seconds
SSMVL = "import sys; from ssmvl.cli import main; sys.exit(main())"


class DataSize(NamedTuple):
    """Size of the generated data, and number of worker processes."""

    images: int = 4000  # JPEGs of 20 to 60 KB
    repeats: int = 4  # times that each image is converted
    conversations: int = 665_000  # about a gigabyte of JSON
    workers: int = 2
    side: int = 384  # pixels, height and width of a model input
    batch: int = 32


def data_cases(size: DataSize) -> Iterator[Row]:
    """Yield every row; needs about 4 GB in the directory for temporary files."""
    with TemporaryDirectory(prefix="ssmvl-bench-") as name:
        folder = Path(name)
        images = write_images(folder, size)
        yield from _convert(folder, images, size)
        yield _verify(folder, images, size)
        yield _load(folder, images, size)
        yield from _memory(folder, size)


def _convert(folder: Path, images: list[Path], size: DataSize) -> Iterator[Row]:
    """Megabytes of images per second, relative to reading, hashing and writing the same files as often."""
    from ssmvl.data.conversion.convert import convert

    source, out, copies = folder / "images.json", folder / "converted", folder / "copies"
    repeated = images * size.repeats
    megabytes = sum(path.stat().st_size for path in repeated) / 1e6
    _write_records(source, repeated)

    def rate(images: Path) -> float:
        run = partial(convert, [source], str(out), images=[str(images)], workers=size.workers)
        return megabytes / _write_seconds(out, run)

    def limit() -> float:
        return megabytes / _write_seconds(copies, lambda: _in_processes(_copy, list(enumerate(repeated)), size, copies))

    for case, path in (("convert, directory", folder / "images"), ("convert, zip", folder / "images.zip")):
        rate(path)
        yield compare(case, "MB/s", limit, partial(rate, path))
    shutil.rmtree(copies)
    shutil.rmtree(out)


def _verify(folder: Path, images: list[Path], size: DataSize) -> Row:
    """Images per second, relative to decoding them."""
    from ssmvl.data.conversion.convert import convert
    from ssmvl.data.inspection.verify import verify

    source = folder / "once.json"
    _write_records(source, images)
    with contextlib.redirect_stderr(io.StringIO()):
        convert([source], str(folder / "shards"), images=[str(folder / "images")], workers=size.workers)

    def rate() -> float:
        start = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):
            report = verify(str(folder / "shards"), size.workers)
        if report.problems or report.images != len(images):
            raise DataError(f"the shards that were just written are damaged: {report}")
        return len(images) / (time.perf_counter() - start)

    def limit() -> float:
        return len(images) / seconds(lambda: _in_processes(_decode, images, size), "cpu")

    rate()
    return compare("verify", "images/s", limit, rate)


class _Bare(Dataset[NDArray[np.uint8]]):
    """Encoded images, decoded and resized to (S, S, 3)."""

    def __init__(self, images: list[bytes], side: int) -> None:
        self.images, self.side = images, side

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        with open_image(self.images[index]) as image:
            return np.array(image.resize((self.side, self.side), Image.Resampling.BICUBIC))


def _load(folder: Path, images: list[Path], size: DataSize) -> Row:
    """Samples per second in batches, as in training, relative to torch's loader of the same resized images."""
    from ssmvl.data.mix import Loader
    from ssmvl.data.streams import train_loader

    processor = Processor(byte_tokenizer(), MambaPrompt(), (ImageSpec(size.side),), tokens_per_image=729)
    shards, workers = folder / "shards" / "train", size.workers
    ours = train_loader(shards, processor, batch=size.batch, seed=0, loader=Loader(workers=workers))
    bare = DataLoader(
        _Bare([path.read_bytes() for path in images], size.side),
        size.batch,
        num_workers=workers,
        persistent_workers=True,
        drop_last=True,
    )
    return compare("load", "images/s", partial(_rate, bare, len), partial(_rate, ours, num_samples))


def _rate(loader: Iterable[Any], count: Callable[[Any], int]) -> float:
    """Samples per second, from the first batch of an epoch to the last; the start of the processes is not counted."""
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    return sum(map(count, batches)) / (time.perf_counter() - start)


def _memory(folder: Path, size: DataSize) -> Iterator[Row]:
    """Memory and speed of converting a JSON of the papers' largest size, without images and with images in a zip."""
    for case, images in (("texts", None), ("images in a zip", folder / "many.zip")):
        source, out = folder / "many.json", folder / "many"
        write_conversations(source, images, size.conversations)
        shutil.rmtree(out, ignore_errors=True)
        options = ["--out", str(out), "--workers", str(size.workers), *(["--images", str(images)] if images else [])]
        start = time.perf_counter()
        peak = peak_memory([sys.executable, "-c", SSMVL, "data", "convert", str(source), *options])
        yield Row(f"convert, {case}", size.conversations / (time.perf_counter() - start), "1/s")
        yield Row(f"memory, {case}", peak / 1e6, "MB", MEMORY / 1e6, peak / MEMORY)


def peak_memory(command: list[str]) -> int:
    """Peak memory in bytes of a command and its child processes; shared memory is counted once."""
    try:
        import psutil
    except ImportError as error:
        raise MissingDependencyError("measuring memory needs psutil: pip install 'ssmvl[train]'") from error
    peak = 0
    with TemporaryFile("w+") as errors:
        process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            total = 0
            with contextlib.suppress(psutil.Error):  # a process may have ended
                for each in [process, *process.children(recursive=True)]:
                    total += each.memory_full_info().pss
            peak = max(peak, total)
            time.sleep(SAMPLE_EVERY)
        if process.returncode:
            errors.seek(0)
            raise DataError(f"{' '.join(command)} failed: {errors.read()}")
    return peak


def _write_seconds(target: Path, run: Callable[[], object]) -> float:
    """Seconds until everything that `run` writes to the directory is on disk; earlier writes are flushed first."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        run()
    os.sync()
    return time.perf_counter() - start


def _in_processes(work: Callable[..., None], items: Sequence[Any], size: DataSize, *more: Path) -> None:
    from ssmvl.data.workers import processes

    for folder in more:
        folder.mkdir()
    with processes(size.workers) as pool:
        list(pool.map(partial(work, *more), items, chunksize=64))


def _copy(folder: Path, numbered: tuple[int, Path]) -> None:
    from streaming.base.hashing import get_hash

    number, path = numbered
    data = path.read_bytes()
    (folder / f"{number}.{get_hash('xxh64', data)}").write_bytes(data)


def _decode(path: Path) -> None:
    with open_image(path) as image:
        image.load()


def write_images(folder: Path, size: DataSize) -> list[Path]:
    """Write JPEGs to a directory and to a zip; returns the paths in the directory."""
    paths = [folder / "images" / f"{number:06}.jpg" for number in range(size.images)]
    paths[0].parent.mkdir()
    _in_processes(_draw, paths, size)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for path in paths:
            archive.write(path, path.name)
    return paths


def _write_records(source: Path, images: list[Path]) -> None:
    """Write a JSON file in LLaVA's layout."""
    texts = ["<image>\nWhat is this?", "Colored patches without a name, larger ones and smaller ones."]
    source.write_text(json.dumps([_record(path.stem, path.name, texts) for path in images]))


def _draw(path: Path) -> None:
    rng = np.random.default_rng(int(path.stem))
    width, height, patch = int(rng.integers(420, 580)), int(rng.integers(340, 460)), int(rng.integers(8, 13))
    patches = rng.integers(0, 256, (height // patch, width // patch, 3), np.uint8)
    image = Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)
    image.save(path, quality=int(rng.integers(70, 84)))


def _record(name: str, image: str | None, texts: list[str]) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"id": name, **({"image": image} if image else {}), "conversations": turns}


def write_conversations(path: Path, images: Path | None, count: int) -> None:
    """Write records of about 1.5 KB in LLaVA's layout, each with its own image in the zip `images` if there is one."""
    rng = np.random.default_rng(0)
    words = ["".join(letters) for letters in rng.choice(list("abcdefghiklmnoprstuvwy"), (2000, 6))]
    text = " ".join(rng.choice(words, 200_000))
    starts = rng.integers(0, len(text) - 600, (count, 6))
    jpeg = io.BytesIO()
    Image.new("RGB", (32, 32), "teal").save(jpeg, "JPEG")
    with path.open("w") as file, contextlib.ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(images, "w")) if images else None
        for number in range(count):
            texts = [text[start : start + (50, 400)[turn % 2]] for turn, start in enumerate(starts[number].tolist())]
            name = f"coco/train2017/{number:012}.jpg" if archive else None
            if archive and name:
                archive.writestr(name, jpeg.getvalue())
                texts[0] = f"<image>\n{texts[0]}"
            file.write(("[" if number == 0 else ",\n") + json.dumps(_record(f"{number:012}", name, texts)))
        file.write("]\n")
