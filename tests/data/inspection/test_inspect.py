"""Inspection: statistics match the data, and sample cards match the ids and labels."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ssmvl.data.inspection.inspect import histogram, inspect
from ssmvl.data.inspection.tokens import read_runs, sample_card
from ssmvl.data.remote import send
from ssmvl.data.shards import ensure_shards
from ssmvl.drawing.sample_cards import BANDS, LINES, Run, wrapped
from ssmvl.errors import DataError, RecipeError
from ssmvl.interfaces import IGNORED, IMAGE_PLACE, ImageSpec
from ssmvl.processing.processor import Processor
from ssmvl.processing.prompts import MambaPrompt, PlainPrompt, VicunaPrompt
from ssmvl.processing.tokenizers import END, byte_tokenizer
from ssmvl.recipes.merge import load_recipe
from ssmvl.training.checked import stage_processor

PLACES = 9  # image places per image in the quickstart
RECIPE = """
base: quickstart
model:
  tokenizer: bytes
  language: {num_tokens: 257}
stages:
  align: {prompt: plain}
  finetune: {max_text_tokens: 60}
"""


def encoded(width: int = 8, height: int = 8, kind: str = "PNG", color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, kind)
    return buffer.getvalue()


def record(name: str, *texts: str, type_: str = "chat", images: tuple[bytes, ...] = ()) -> dict[str, Any]:
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"id": name, "type": type_, "conversation": talk, "images": list(images)}


RECORDS = [
    record("none", "Why?", "Because.", type_="text"),
    record("one", "What?", "A dog.", images=(encoded(20, 10),)),
    record("two", "<image> and <image>?", "Cats.", "Sure?", "Yes.", images=(encoded(), encoded(30, 30, "JPEG"))),
    record("long", "Tell!", "word " * 20, "More?", "No.", images=(encoded(9, 9),)),
    record("marks", "<image><image>?", "x", images=(encoded(10, 10),)),
    record("late", "a" * 80, "b", type_="text"),
    record("broken", "What?", "That.", images=(b"no image",)),
]


def shards_of(folder: Path, records: list[dict[str, Any]]) -> Path:
    ensure_shards(folder, lambda: records, len(records))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards_of(tmp_path_factory.mktemp("data") / "train", RECORDS)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return str(tmp_path / "mine.yaml")


@pytest.fixture
def inspected(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs `inspect` and returns its output, with repeated spaces collapsed."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(
        folder: Path, recipe: str | None = None, stage: str | None = None, samples: int = 0, png: Any = None
    ) -> str:
        capsys.readouterr()

        def reader() -> tuple[Processor, str]:
            return stage_processor(load_recipe(recipe), stage)

        inspect(str(folder), reader if recipe else None, samples, png)
        return "\n".join(" ".join(line.split()) for line in capsys.readouterr().out.splitlines())

    return run


def test_statistics_without_a_recipe(folder: Path, inspected: Any) -> None:
    size = (folder / "shard.00000.mds").stat().st_size
    text = inspected(folder.parent)
    assert text.splitlines()[:2] == [f"{folder}: 7 samples, 1 shard, {size / 1000:.1f} kB", "From all samples:"]
    assert "source samples share\nchat 5 71.4%\ntext 2 28.6%\n" in text
    assert "images samples share\n0 2 28.6%\n1 4 57.1%\n2 1 14.3%\n" in text
    assert "format images share\nPNG 4 66.7%\nJPEG 1 16.7%\ndamaged 1 16.7%\n" in text
    assert "turns per conversation: median 1, maximum 2" in text
    assert "image size in pixels: median 10 × 10, largest 30 × 30" in text
    assert "tokens" not in text


def test_samples_are_spread_over_all_shards(tmp_path: Path, inspected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssmvl.data.shards.SHARD_BYTES", 1_000)
    records = [record(f"s{n}", "?", "!" * 100, type_=f"type{n}") for n in range(20)]
    folder = shards_of(tmp_path / "train", records)
    assert len(list(folder.glob("*.mds"))) > 3
    text = inspected(folder, samples=4)
    assert "20 samples, " in text
    assert "From 4 samples, evenly spread:" in text
    assert [line.split()[0] for line in text.splitlines() if line.startswith("type")] == [
        f"type{n}" for n in (0, 5, 10, 15)
    ]
    assert "From all samples" in inspected(folder, samples=100)


def test_some_shards_of_a_bucket_are_fetched(
    bucket: str, tmp_path: Path, inspected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssmvl.data.shards.SHARD_BYTES", 2_000)
    shards = shards_of(tmp_path / "train", [record(f"{n}", "a", "b" * 500, type_=f"t{n // 10}") for n in range(100)])
    names = sorted(path.name for path in shards.iterdir())
    assert len(names) > 20
    send(shards, f"{bucket}/all/train", names)
    local, text = inspected(shards), inspected(f"{bucket}/all")
    assert text.startswith(local.partition("\n")[0].replace(str(shards), f"{bucket}/all/train"))
    assert "evenly spread over 8 shards:" in text
    assert {"t0", "t5", "t8"} <= set(re.findall(r"t\d", text))
    with pytest.raises(DataError, match=r"s3://no-such-bucket/x.* cannot be fetched"):
        inspected("s3://no-such-bucket/x")


def test_token_counts_match_training(folder: Path, inspected: Any, recipe: str) -> None:
    processor = Processor(byte_tokenizer(), MambaPrompt(), (ImageSpec(48),), PLACES)
    read = {r["id"]: r for r in RECORDS if r["id"] in ("none", "one", "two", "long")}
    samples = [processor.encode(r["conversation"], r["images"], train=True) for r in read.values()]
    lengths = sorted(len(sample["ids"]) for sample in samples)
    supervised = sum(int((sample["labels"] != IGNORED).sum()) for sample in samples)
    text = inspected(folder, recipe, "finetune")
    assert f"As mine, stage finetune, reads them ({PLACES} tokens per image):" in text
    assert f"tokens per sample: median {sum(lengths[1:3]) / 2:g}, maximum {lengths[-1]}" in text
    assert f"supervised: {supervised / sum(lengths):.1%} of all tokens" in text
    assert "truncated: 1 sample (14.3%), longer than 60 text tokens (max_text_tokens)" in text
    lines = text.splitlines()
    rejected = lines[lines.index("rejected: 3 samples (42.9%)") + 1 :]
    assert [line.split(":")[0] for line in rejected] == ["marks", "late", "broken"]
    assert "max_text_tokens" in rejected[1]


def test_the_stage_determines_prompt_and_limit(folder: Path, inspected: Any, recipe: str) -> None:
    captions = [
        len(m["content"].strip()) + 1 for r in RECORDS[:4] for m in r["conversation"] if m["role"] == "assistant"
    ]
    images = PLACES * sum(len(r["images"]) for r in RECORDS[:4])
    late, first_tokens = 2, 2  # tokens of the caption of `late`; unsupervised first tokens of `none` and `late`
    expected = (sum(captions) + late - first_tokens) / (sum(captions) + late + images)
    text = inspected(folder, recipe)
    assert "As mine, stage align, reads them" in text
    assert f"supervised: {expected:.1%} of all tokens" in text
    assert "truncated: 0 samples (0.0%), longer than 2,048 text tokens" in text


def test_the_sheet_shows_images_and_supervised_text(folder: Path, inspected: Any, recipe: str, tmp_path: Path) -> None:
    text = inspected(folder, recipe, "finetune", png=tmp_path / "sheet.png")
    assert text.endswith(f"{tmp_path}/sheet.png: 4 samples, as the model reads them")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    for color in (BANDS["supervised"], BANDS["image"], "red"):
        assert (np.abs(sheet - (np.array(to_rgb(color)) * 255).round()).max(axis=-1) <= 2).any()


def test_invalid_arguments_are_errors(folder: Path, inspected: Any, recipe: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist; give the output directory"):
        inspected(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"neither index\.json nor a directory with one"):
        inspected(tmp_path, "no-such-recipe")  # the recipe is read later
    with pytest.raises(DataError, match=r"--samples must be at least 0 \(0 means all\), received -5"):
        inspected(folder, samples=-5)
    with pytest.raises(
        RecipeError, match=r"unknown stage 'finetun'. Did you mean 'finetune'\? Allowed: align, finetune"
    ):
        inspected(folder, recipe, "finetun")
    with pytest.raises(RecipeError, match="unknown recipe 'quikstart'"):
        inspected(folder, "quikstart")
    Path(recipe).write_text(RECIPE.replace("bytes", str(tmp_path / "gone")))
    with pytest.raises(RecipeError, match="cannot load the tokenizer"):
        inspected(folder, recipe)
    Path(recipe).write_text(RECIPE.replace("max_text_tokens: 60", "max_text_tokens: none"))
    with pytest.raises(RecipeError, match=r"stages\.finetune\.max_text_tokens"):
        inspected(folder, recipe, "finetune")


def test_one_of_several_splits_must_be_chosen(tmp_path: Path, inspected: Any) -> None:
    for split in ("test", "train"):
        shards_of(tmp_path / split, RECORDS[:1])
    with pytest.raises(DataError, match=r"holds the splits test, train; give one of them, such as .*/test"):
        inspected(tmp_path)
    assert "1 sample, 1 shard" in inspected(tmp_path / "train")


def test_a_record_that_cannot_be_read_is_an_error(tmp_path: Path, inspected: Any) -> None:
    folder = shards_of(tmp_path / "train", RECORDS)
    path = folder / "shard.00000.mds"
    path.write_bytes(path.read_bytes().replace(b'{"role"', b'"{role"', 1))
    with pytest.raises(DataError, match=r"shard\.00000\.mds: sample 0 cannot be read.*run `ssmvl data verify"):
        inspected(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"shard\.00000\.mds: sample 0 cannot be read \(FileNotFoundError"):
        inspected(folder)


@pytest.mark.parametrize(
    ("entry", "message"), [("{}", "a shard cannot be read: its format is None"), ("", "lists no shards")]
)
def test_a_damaged_index_is_an_error(tmp_path: Path, inspected: Any, entry: str, message: str) -> None:
    folder = shards_of(tmp_path / "train", RECORDS)
    (folder / "index.json").write_text(f'{{"version": 2, "shards": [{entry}]}}')
    with pytest.raises(DataError, match=rf"train/index\.json:? {message}"):
        inspected(folder)


def test_shards_without_samples_are_an_error(folder: Path, tmp_path: Path, inspected: Any) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["samples"] = 0
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"index\.json lists no samples"):
        inspected(tmp_path)


def test_a_sheet_without_usable_samples_is_an_error(tmp_path: Path, inspected: Any, recipe: str) -> None:
    folder = shards_of(tmp_path / "train", RECORDS[-1:])
    with pytest.raises(DataError, match=r"x\.png was not drawn: none of the inspected samples"):
        inspected(folder, recipe, png=tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def words_tokenizer() -> Tokenizer:
    """Return a tokenizer like LLaMA's: a space belongs to the next word, and decoding drops a leading space."""
    texts = ["▁", *map(chr, range(33, 127)), "\n", "▁A", "▁dog", "<s>", END]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(texts)}, merges=[("▁", "A")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<s>", END)])
    return tokenizer


@pytest.mark.parametrize("prompt", [MambaPrompt(), PlainPrompt(), VicunaPrompt()])
def test_runs_match_ids_and_labels(prompt: Any) -> None:
    processor = Processor(byte_tokenizer(), prompt, (ImageSpec(8),), tokens_per_image=3)
    two = RECORDS[2]
    sample = processor.encode(two["conversation"], two["images"], train=True)
    runs = read_runs(sample, two["images"], processor, 10_000)
    ids = sample["ids"][sample["ids"] != IMAGE_PLACE].tolist()
    text = "".join(run.text for run in runs if run.kind != "image")
    assert text == processor.tokenizer.decode(ids, skip_special_tokens=False)
    assert [run.text for run in runs if run.kind == "supervised"] in (
        [f"Cats.{END}", f"Yes.{END}"],
        [f"Cats.{END}Yes.{END}"],
    )
    assert [run for run in runs if run.kind == "image"] == [Run("⟨image × 3⟩", "image")] * 2


def test_the_first_token_of_a_sample_is_not_supervised() -> None:
    processor = Processor(byte_tokenizer(), PlainPrompt(), (ImageSpec(8),), tokens_per_image=3)
    sample = processor.encode(RECORDS[0]["conversation"], train=True)
    assert read_runs(sample, [], processor, 100) == [Run("B", "context"), Run(f"ecause.{END}", "supervised")]


def test_runs_follow_the_labels_and_keep_every_space() -> None:
    processor = Processor(words_tokenizer(), MambaPrompt(), (ImageSpec(8),), tokens_per_image=3)
    sample = processor.encode(RECORDS[1]["conversation"], RECORDS[1]["images"], train=True)
    assert read_runs(sample, RECORDS[1]["images"], processor, 100)[-1].text == f" A dog.{END}"
    sample["labels"][-1] = IGNORED
    runs = read_runs(sample, RECORDS[1]["images"], processor, 100)
    assert runs[-2:] == [Run(" A dog.", "supervised"), Run(END, "context")]


def test_the_middle_of_a_long_text_is_cut_and_its_tokens_are_counted() -> None:
    processor = Processor(byte_tokenizer(), MambaPrompt(), (ImageSpec(8),), tokens_per_image=3)
    sample = processor.encode(
        [{"role": "user", "content": "q" * 500}, {"role": "assistant", "content": "a" * 700}], train=True
    )
    runs = read_runs(sample, [], processor, 90)
    assert [run.kind for run in runs] == ["context", "cut", "supervised"]
    hidden = len(sample["ids"]) - 90
    assert runs[1].text == f" … {hidden:,} tokens … "
    assert len(runs[0].text) == 60
    assert runs[2].text == "a" * 29 + END  # END is a single token
    card = sample_card(record("x", "?"), sample, processor)
    assert len(wrapped(card.runs)) <= LINES
    assert card.note == f"{len(sample['ids']):,} tokens, 701 supervised"


def test_a_card_shows_the_pixels_of_the_model() -> None:
    specs = (ImageSpec(4), ImageSpec(8, "letterbox"))
    processor = replace(Processor(byte_tokenizer(), MambaPrompt(), specs, tokens_per_image=3))
    one = record("x", "?", "!", images=(encoded(20, 10), encoded()))
    sample = processor.encode(one["conversation"], one["images"], train=True)
    images = sample_card(one, sample, processor).images
    assert [image.size for image in images] == [(8, 8), (8, 8)]
    assert [image.getpixel((4, 0)) for image in images] == [(0, 0, 0), (255, 0, 0)]


def test_a_histogram_has_round_edges_and_one_row_for_outliers() -> None:
    rows = histogram([*range(100, 1_100), 50_000])
    assert [name for name, _, _ in rows] == [f"{n:,} – {n + 99:,}" for n in range(100, 1_100, 100)] + ["1,100 or more"]
    assert [count for _, count, _ in rows] == [100] * 10 + [1]
    assert rows[0][2] == "█" * 40
    assert rows[-1][2] == "▍"


@pytest.mark.parametrize("numbers", [[7], [7] * 50, [1, 2], [0, 10**6], list(range(13)), [979] * 5 + [980]])
def test_a_histogram_counts_every_number(numbers: list[int]) -> None:
    rows = histogram(numbers)
    assert sum(count for _, count, _ in rows) == len(numbers)
    assert len(rows) <= 14
    assert all(bool(bar) == bool(count) for _, count, bar in rows)
