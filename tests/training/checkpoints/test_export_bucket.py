"""A checkpoint in a bucket becomes a folder that loads bit-equal, and nothing stays of what was fetched."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import boto3
import pytest
from made_checkpoints import CHECKPOINTS, FILE, WRITERS, equal, run_of, state, weights, write_file
from torch import Tensor

from ssmvl.errors import CheckpointError, MissingDependencyError, RecipeError, RunError
from ssmvl.recipes.merge import load_recipe
from ssmvl.training.checkpoints.export import export
from ssmvl.training.checkpoints.stores import BucketStore

pytestmark = pytest.mark.filterwarnings("default")  # torch warns where it saves shards of one rank
OUT, RUN = Path("out"), "runs/quickstart"


@pytest.fixture
def tensors(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Tensor]]:
    """Of the quickstart, whose run folder lies in the working folder; no temporary file is left."""
    (tmp_path / "made").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "made"))
    monkeypatch.chdir(tmp_path)
    yield run_of("quickstart")[1]
    assert not list((tmp_path / "made").iterdir())


def upload(bucket: str, folder: str = "all/quickstart/align/") -> str:
    """The run's checkpoints, as `checkpoints: s3://…` would have them, and what else may lie there; their URL."""
    client, name = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"]), bucket.removeprefix("s3://")
    for path in filter(Path.is_file, CHECKPOINTS.rglob("*")):
        client.upload_file(str(path), name, f"{folder}{path.relative_to(CHECKPOINTS)}")
    for other in ("ep0-ba4/", "ep0-ba4/logs/1.txt", "ep0-ba40", "notes.txt", "."):
        client.put_object(Bucket=name, Key=folder + other, Body=b"")
    shutil.rmtree(CHECKPOINTS)
    return f"{bucket}/{folder}".rstrip("/")


@pytest.mark.parametrize("kind", WRITERS)
def test_the_newest_whole_one_or_the_one_that_is_named(kind: str, tensors: dict[str, Tensor], bucket: str) -> None:
    whole = WRITERS[kind](state(tensors))
    newer = whole.rename(whole.with_name(whole.name.replace("ba4", "ba5")))
    WRITERS[kind](state(tensors))
    os.truncate(max(newer.rglob("*"), default=newer), 1000)  # the largest name is that of a shard
    url = upload(bucket)
    name, (odd, passed) = export(url, OUT, recipe=RUN)
    assert name == f"{url}/{whole.name}"
    assert odd.startswith(f"{url}/ep0-ba40 cannot be read")
    assert passed.startswith(f"{url}/{newer.name} ")
    assert equal(weights(OUT), tensors)
    assert export(f"{url}/{whole.name}/", "one", recipe=RUN) == (name, [])
    assert equal(weights(Path("one")), tensors)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(passed)}$"):
        export(f"{url}/{newer.name}", "none", recipe=RUN)
    with pytest.raises(CheckpointError, match=rf"^{name}, with the recipe .*, does not fit the model"):
        export(url, "none", recipe=load_recipe("quickstart", "model.language.num_layers=3"))
    assert not Path("none").exists()


def test_at_the_top_of_a_bucket(tensors: dict[str, Tensor], bucket: str) -> None:
    write_file(FILE, state(tensors))
    url = upload(bucket, "")
    assert export(f"{url}/{FILE.name}", OUT, recipe=RUN) == (f"{bucket}/{FILE.name}", [])
    assert export(f"{url}/", "newest", recipe=RUN)[0] == f"{bucket}/{FILE.name}"


def test_what_is_wrong_is_said_before_anything_is_fetched(tensors: dict[str, Tensor], bucket: str) -> None:
    url = f"{bucket}/all"
    with patch.object(BucketStore, "fetch") as fetch:
        with pytest.raises(CheckpointError, match=rf"^{url} does not lie in a run folder, .*--recipe: the run folder"):
            export(url, OUT)
        with pytest.raises(RecipeError, match=r"no mixer named 'none'"):
            export(url, OUT, recipe=load_recipe("quickstart", "model.language.mixer.name=none"))
        with pytest.raises(CheckpointError, match=rf"^{url} holds no checkpoint of a run; .*s3://BUCKET/FOLDER/NAME"):
            export(f"{url}/", OUT, recipe=RUN)
        with pytest.raises(CheckpointError, match=rf"^{url}/ep0-ba4: no such file or folder$"):
            export(f"{url}/ep0-ba4", OUT, recipe=RUN)
        with pytest.raises(RunError, match=r"^s3://nowhere/x cannot be used \(.*NoSuchBucket"):
            export("s3://nowhere/x", OUT, recipe=RUN)
        with patch.dict(sys.modules, boto3=None), pytest.raises(MissingDependencyError, match=r"ssmvl\[train\]"):
            export(url, OUT, recipe=RUN)
    fetch.assert_not_called()


def test_a_network_that_fails_is_no_full_disk(tensors: dict[str, Tensor], bucket: str) -> None:
    """Some of botocore's errors are OSErrors."""
    endpoint = os.environ["S3_ENDPOINT_URL"].replace("http:", "https:")  # which the server does not speak
    expected = rf"^{bucket}/all cannot be used \(SSL .*\); look at the name of the bucket, .* and S3_ENDPOINT_URL$"
    with patch.dict(os.environ, S3_ENDPOINT_URL=endpoint), pytest.raises(RunError, match=expected):
        export(f"{bucket}/all", OUT, recipe=RUN)


@pytest.mark.parametrize("when", ["looked at", "fetched"])
def test_no_room_for_temporary_files(
    when: str, tensors: dict[str, Tensor], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(FILE, state(tensors))
    url, fetch, (soft, hard) = upload(bucket), BucketStore.fetch, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fetch_until_full(store: BucketStore, path: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a writer is told so as it is of a full disk
        fetch(store, path)

    if when == "fetched":
        monkeypatch.setattr(BucketStore, "fetch", fetch_until_full)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    place = url if when == "looked at" else f"{url}/{FILE.name}"
    try:
        with pytest.raises(RunError, match=rf"^{place}: what is read of it .*too large.*room in .*made, or let TMPDIR"):
            export(url, OUT, recipe=RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not OUT.exists()


def test_one_that_goes_while_it_is_fetched(
    tensors: dict[str, Tensor], bucket: str, delete: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run removes old ones."""
    write_file(FILE, state(tensors))
    url, fetch = upload(bucket), BucketStore.fetch

    def fetch_late(store: BucketStore, path: Path) -> None:
        delete(f"all/quickstart/align/{path.name}")
        fetch(store, path)

    monkeypatch.setattr(BucketStore, "fetch", fetch_late)
    with pytest.raises(RunError, match=rf"^{url}/{FILE.name} cannot be used \(.*404"):
        export(url, OUT, recipe=RUN)
