"""Where a stage's checkpoints lie, a folder or a bucket: which is the newest, which go, one fetched. No Composer."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ssmvl.data.remote import hint
from ssmvl.errors import MissingDependencyError, RunError
from ssmvl.training.checkpoints.composer_files import METADATA_FILE
from ssmvl.training.checkpoints.newest import CHECKPOINT, newest_whole, surplus

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
        found, passed = newest_whole(self._folder, finite=True)
        for path in passed:
            if path.is_dir():
                (path / METADATA_FILE).unlink(missing_ok=True)
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
        MissingDependencyError: boto3 is not installed.
        RunError: it cannot be used as it is set up here.
    """

    local_copies = 0  # that Composer keeps, once they are uploaded

    def __init__(self, place: str) -> None:
        try:
            import boto3
        except ImportError as error:
            raise MissingDependencyError("checkpoints in a bucket need boto3: pip install 'ssmvl[train]'") from error
        self.place = place
        self._bucket, _, path = place.removeprefix("s3://").partition("/")
        self._prefix = f"{path}/" if path else ""
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
        with self.outline() as outline, self._reached():
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
        with self.outline() as outline, self._reached():
            for path in surplus(outline, kept):
                for name in path.iterdir() if path.is_dir() else [path]:
                    self._remove(outline, name)

    def _remove(self, outline: Path, path: Path) -> None:
        self._client.delete_object(Bucket=self._bucket, Key=self._prefix + str(path.relative_to(outline)))

    @contextmanager
    def outline(self, name: str = "") -> Iterator[Path]:
        """A temporary folder of files as large as the objects, of which it holds the indices and directories alone.

        Args:
            name: of the only checkpoint that is looked at; all if empty.

        Raises:
            RunError: the bucket cannot be reached, or the folder cannot be written.
        """
        with ExitStack() as stack:
            with self._reached():
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ssmvl-")))
                listing = self._client.get_paginator("list_objects_v2")
                pages = listing.paginate(Bucket=self._bucket, Prefix=self._prefix + name)
                for found in [found for page in pages for found in page.get("Contents", [])]:
                    parts = PurePosixPath(found["Key"].removeprefix(self._prefix)).parts
                    marker = found["Key"].endswith("/")  # consoles make such objects to show a folder
                    if not marker and len(parts) in (1, 2) and CHECKPOINT.fullmatch(parts[0]) and ".." not in parts:
                        self._draw(folder.joinpath(*parts), found)
            yield folder

    def fetch(self, checkpoint: Path) -> None:
        """Fetch the whole of a checkpoint of an outline.

        Raises:
            RunError: the bucket cannot be reached, or the outline cannot be written.
        """
        for file in checkpoint.iterdir() if checkpoint.is_dir() else [checkpoint]:
            name = str(file.relative_to(checkpoint.parent))
            with self._reached(f"/{name}"):
                self._client.download_file(self._bucket, self._prefix + name, str(file))

    @contextmanager
    def _reached(self, file: str = "") -> Iterator[None]:
        """What fails outside as a RunError: this machine's temporary folder, or the bucket."""
        from botocore.exceptions import BotoCoreError

        try:
            yield
        except Exception as error:  # botocore makes its classes of errors as it meets them
            if isinstance(error, OSError) and not isinstance(error, BotoCoreError):  # of which some are both
                what = f"what is read of it cannot be kept among temporary files ({error})"
                advice = f"make room in {tempfile.tempdir}, or let TMPDIR name another folder that exists"
                raise RunError(f"{self.place}{file}: {what}; {advice}") from error
            why = getattr(error, "last_exception", error)  # of a download that was tried again and again
            raise RunError(f"{self.place}{file} cannot be used ({why}){hint(self.place)}") from error

    def _draw(self, path: Path, found: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(found["Size"])
            if found["Size"] and (path.name == METADATA_FILE or path.suffix == ".pt"):
                file.seek(start := max(0, found["Size"] - TAIL) if path.suffix == ".pt" else 0)
                part = self._client.get_object(Bucket=self._bucket, Key=found["Key"], Range=f"bytes={start}-")
                file.write(part["Body"].read())


Store = FolderStore | BucketStore
