"""Export of a checkpoint in a bucket: the saved model is bit-equal, and downloaded files are removed."""

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

pytestmark = pytest.mark.filterwarnings("default")  # torch warns when it saves shards of one rank
OUT, RUN = Path("out"), "runs/quickstart"


@pytest.fixture
def tensors(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Tensor]]:
    """Tensors of the quickstart's model, whose run folder is in the working directory. No temporary file may remain."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    yield run_of("quickstart")[1]
    assert not list((tmp_path / "temporary").iterdir())


def upload(bucket: str, folder: str = "all/quickstart/align/") -> str:
    """Upload the run's checkpoints as with `checkpoints: s3://…`, and unrelated objects; return their URL."""
    client, name = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"]), bucket.removeprefix("s3://")
    for path in filter(Path.is_file, CHECKPOINTS.rglob("*")):
        client.upload_file(str(path), name, f"{folder}{path.relative_to(CHECKPOINTS)}")
    for other in ("ep0-ba4/", "ep0-ba4/logs/1.txt", "ep0-ba40", "notes.txt", "."):
        client.put_object(Bucket=name, Key=folder + other, Body=b"")
    shutil.rmtree(CHECKPOINTS)
    return f"{bucket}/{folder}".rstrip("/")


@pytest.mark.parametrize("kind", WRITERS)
def test_the_latest_complete_or_the_named_checkpoint(kind: str, tensors: dict[str, Tensor], bucket: str) -> None:
    complete = WRITERS[kind](state(tensors))
    newer = complete.rename(complete.with_name(complete.name.replace("ba4", "ba5")))
    WRITERS[kind](state(tensors))
    os.truncate(max(newer.rglob("*"), default=newer), 1000)  # the last name is that of a shard
    url = upload(bucket)
    name, (unreadable, damaged) = export(url, OUT, recipe=RUN)
    assert name == f"{url}/{complete.name}"
    assert unreadable.startswith(f"{url}/ep0-ba40 cannot be read")
    assert damaged.startswith(f"{url}/{newer.name} ")
    assert equal(weights(OUT), tensors)
    assert export(f"{url}/{complete.name}/", "one", recipe=RUN) == (name, [])
    assert equal(weights(Path("one")), tensors)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(damaged)}$"):
        export(f"{url}/{newer.name}", "none", recipe=RUN)
    with pytest.raises(CheckpointError, match=rf"^{name}, with the recipe .*, does not fit the model"):
        export(url, "none", recipe=load_recipe("quickstart", "model.language.num_layers=3"))
    assert not Path("none").exists()


def test_at_the_top_of_a_bucket(tensors: dict[str, Tensor], bucket: str) -> None:
    write_file(FILE, state(tensors))
    url = upload(bucket, "")
    assert export(f"{url}/{FILE.name}", OUT, recipe=RUN) == (f"{bucket}/{FILE.name}", [])
    assert export(f"{url}/", "latest", recipe=RUN)[0] == f"{bucket}/{FILE.name}"


def test_mistakes_are_reported_before_any_download(tensors: dict[str, Tensor], bucket: str) -> None:
    url = f"{bucket}/all"
    with patch.object(BucketStore, "fetch") as fetch:
        with pytest.raises(CheckpointError, match=rf"^{url} is not in a run folder, .*--recipe .* with the run folder"):
            export(url, OUT)
        with pytest.raises(RecipeError, match=r"unknown mixer 'none'"):
            export(url, OUT, recipe=load_recipe("quickstart", "model.language.mixer.name=none"))
        with pytest.raises(CheckpointError, match=rf"^{url} holds no checkpoint of a run; .*s3://BUCKET/DIR/NAME"):
            export(f"{url}/", OUT, recipe=RUN)
        with pytest.raises(CheckpointError, match=rf"^{url}/ep0-ba4: no such file or directory$"):
            export(f"{url}/ep0-ba4", OUT, recipe=RUN)
        with pytest.raises(RunError, match=r"^s3://nowhere/x cannot be used \(.*NoSuchBucket"):
            export("s3://nowhere/x", OUT, recipe=RUN)
        with patch.dict(sys.modules, boto3=None), pytest.raises(MissingDependencyError, match=r"ssmvl\[train\]"):
            export(url, OUT, recipe=RUN)
    fetch.assert_not_called()


def test_a_network_error_is_not_reported_as_a_full_disk(tensors: dict[str, Tensor], bucket: str) -> None:
    """Some of botocore's errors are OSErrors."""
    endpoint = os.environ["S3_ENDPOINT_URL"].replace("http:", "https:")  # a protocol that the server does not speak
    expected = rf"^{bucket}/all cannot be used \(SSL .*\); check the bucket's name, .* and S3_ENDPOINT_URL$"
    with patch.dict(os.environ, S3_ENDPOINT_URL=endpoint), pytest.raises(RunError, match=expected):
        export(f"{bucket}/all", OUT, recipe=RUN)


@pytest.mark.parametrize("when", ["listing", "download"])
def test_no_space_for_temporary_files(
    when: str, tensors: dict[str, Tensor], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(FILE, state(tensors))
    url, fetch, (soft, hard) = upload(bucket), BucketStore.fetch, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fetch_until_full(store: BucketStore, path: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # writing then fails like on a full disk
        fetch(store, path)

    if when == "download":
        monkeypatch.setattr(BucketStore, "fetch", fetch_until_full)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    location = url if when == "listing" else f"{url}/{FILE.name}"
    expected = rf"^{location} cannot be written to a temp.*too large.*space in .*temporary, or set TMPDIR"
    try:
        with pytest.raises(RunError, match=expected):
            export(url, OUT, recipe=RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not OUT.exists()


def test_a_checkpoint_removed_during_the_download(
    tensors: dict[str, Tensor], bucket: str, delete: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run removes old checkpoints."""
    write_file(FILE, state(tensors))
    url, fetch = upload(bucket), BucketStore.fetch

    def fetch_late(store: BucketStore, path: Path) -> None:
        delete(f"all/quickstart/align/{path.name}")
        fetch(store, path)

    monkeypatch.setattr(BucketStore, "fetch", fetch_late)
    with pytest.raises(RunError, match=rf"^{url}/{FILE.name} cannot be used \(.*404"):
        export(url, OUT, recipe=RUN)
