"""Where a stage's checkpoints lie, in a folder or a bucket: which it goes on from, and how many are kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from composer import Callback, Logger, State
from composer.callbacks import CheckpointSaver
from composer.utils import dist
from tqdm.auto import tqdm

from ssmvl.checkpoints.run_files import INDEX_FILE
from ssmvl.data.remote import hint
from ssmvl.errors import RunError
from ssmvl.training.resuming import CHECKPOINT, newest_whole, surplus

TAIL = 1 << 20  # bytes at the end of a file that hold its directory


class FolderStore:
    """Checkpoints in a folder.

    Args:
        place: the folder.
    """

    local_copies = -1  # that Composer keeps: all, `remove_old` removes them

    def __init__(self, place: Path) -> None:
        self.place = str(place)
        self._folder = place

    def newest(self) -> tuple[str | None, list[str]]:
        """The newest checkpoint that is whole, or None, and what is wrong with newer ones, which lose their index.

        What is written over them is not whole before its own index is there.
        """
        found, passed = newest_whole(self._folder)
        for path in passed:
            if path.is_dir():
                (path / INDEX_FILE).unlink(missing_ok=True)
        return str(found) if found else None, list(passed.values())

    def remove_old(self, kept: int) -> None:
        """Remove those older than the newest `kept` whole ones."""
        for path in surplus(self._folder, kept):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


class BucketStore:
    """Checkpoints in a bucket of S3, or of what `S3_ENDPOINT_URL` names.

    Args:
        place: URL of the folder.

    Raises:
        RunError: boto3 cannot be used as it is set up here.
    """

    local_copies = 0  # that Composer keeps, once they are uploaded

    def __init__(self, place: str) -> None:
        import boto3

        self.place = place
        self._bucket, _, path = place.removeprefix("s3://").partition("/")
        self._prefix = f"{path}/"
        try:
            self._client: Any = boto3.client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"))
        except Exception as error:  # a malformed endpoint, no region, no credentials: each has an error of its own
            raise RunError(f"{place} cannot be used ({error}){hint(place)}") from error

    def newest(self) -> tuple[str | None, list[str]]:
        """The newest checkpoint that is whole, or None, and what is wrong with newer ones; of these shards are removed.

        An index is sent first here: beside older shards it would make them look whole.

        Raises:
            RunError: the bucket cannot be reached.
        """
        with self._outline() as outline:
            found, passed = newest_whole(outline)
            for path in passed:
                for name in path.iterdir() if path.is_dir() else ():
                    self._remove(outline, name)
            url = f"{self.place}/{found.name}" if found else None
            return url, [text.replace(str(outline), self.place) for text in passed.values()]

    def remove_old(self, kept: int) -> None:
        """Remove those older than the newest `kept` whole ones.

        Raises:
            RunError: the bucket cannot be reached.
        """
        with self._outline() as outline:
            for path in surplus(outline, kept):
                for name in path.iterdir() if path.is_dir() else [path]:
                    self._remove(outline, name)

    def _remove(self, outline: Path, path: Path) -> None:
        self._client.delete_object(Bucket=self._bucket, Key=self._prefix + str(path.relative_to(outline)))

    @contextmanager
    def _outline(self) -> Iterator[Path]:
        """A folder of files that are as large as the objects, of which it holds the indices and directories alone."""
        try:
            with tempfile.TemporaryDirectory() as name:
                pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
                for found in [found for page in pages for found in page.get("Contents", [])]:
                    path = PurePosixPath(found["Key"].removeprefix(self._prefix))
                    marker = found["Key"].endswith("/")  # consoles make such objects to show a folder
                    if not marker and CHECKPOINT.fullmatch(path.parts[0]) and ".." not in path.parts:
                        self._draw(Path(name) / path, found)
                yield Path(name)
        except RunError:
            raise
        except Exception as error:  # botocore makes its classes of errors as it meets them
            raise RunError(f"{self.place} cannot be used ({error}){hint(self.place)}") from error

    def _draw(self, path: Path, found: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(found["Size"])
            if found["Size"] and (path.name == INDEX_FILE or path.suffix == ".pt"):
                file.seek(start := max(0, found["Size"] - TAIL) if path.suffix == ".pt" else 0)
                part = self._client.get_object(Bucket=self._bucket, Key=found["Key"], Range=f"bytes={start}-")
                file.write(part["Body"].read())


Store = FolderStore | BucketStore


class OldCheckpoints(Callback):
    """Removes them, on the first rank, once a newer one has been saved. Composer forgets those of earlier launches.

    On every rank also what Composer made on this machine to send it to a bucket: it removes the first rank's alone.

    Args:
        store: where they are.
        kept: how many whole ones stay.
    """

    def __init__(self, store: Store, kept: int) -> None:
        self._store, self._kept = store, kept
        self._saved: Any = None

    def batch_start(self, state: State, logger: Logger) -> None:
        """Look whether one was saved after the step before."""
        (saver,) = (callback for callback in state.callbacks if isinstance(callback, CheckpointSaver))
        if saver.last_checkpoint_batch != self._saved:
            self._saved = saver.last_checkpoint_batch
            self._clean(Path(saver.folder))

    def fit_end(self, state: State, logger: Logger) -> None:
        """After the last; others may still be on their way to a bucket."""
        (saver,) = (callback for callback in state.callbacks if isinstance(callback, CheckpointSaver))
        self._clean(Path(saver.folder))

    def _clean(self, made: Path) -> None:
        for path in made.iterdir() if self._store.local_copies == 0 else ():
            shutil.rmtree(path, ignore_errors=True)
        if dist.get_global_rank() == 0:
            remove_old(self._store, self._kept)


def remove_old(store: Store, kept: int) -> None:
    """Remove those older than the newest `kept` whole ones, or say why not: the next save tries again."""
    try:
        store.remove_old(kept)
    except (RunError, OSError) as error:
        tqdm.write(f"an old checkpoint could not be removed: {error}")
