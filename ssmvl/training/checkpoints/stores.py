"""Stores of a stage's checkpoints (directory or bucket): find the latest, prune, download. Does not import Composer."""

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
from ssmvl.training.checkpoints.latest import CHECKPOINT, latest_complete, outdated

TAIL = 1 << 20  # bytes at the end of a .pt file, a zip archive; they contain its central directory


class FolderStore:
    """Checkpoints in a directory.

    Args:
        folder: the directory.
    """

    local_copies = -1  # checkpoints that Composer keeps: all (-1), because `remove_old` prunes them

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self._folder = folder

    def latest(self) -> tuple[str | None, list[str]]:
        """Return the latest complete checkpoint, or None, and the problem of each newer one.

        Removes the indices of the newer ones, so that a checkpoint written over one of them is incomplete until its own
        index is written.
        """
        if not self._folder.is_dir():
            return None, []
        checkpoint, skipped = latest_complete(self._folder, finite=True)
        for path in skipped:
            if path.is_dir():
                (path / METADATA_FILE).unlink(missing_ok=True)
        return str(checkpoint) if checkpoint else None, list(skipped.values())

    def remove_old(self, kept: int) -> None:
        """Remove checkpoints older than the latest `kept` complete ones."""
        for path in outdated(self._folder, kept):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


class BucketStore:
    """Checkpoints in a bucket on S3, or on the service at `S3_ENDPOINT_URL`.

    Args:
        url: URL of the directory.

    Raises:
        MissingDependencyError: boto3 is not installed.
        RunError: the bucket cannot be used with this machine's settings.
    """

    local_copies = 0  # local checkpoints that Composer keeps after uploading them

    def __init__(self, url: str) -> None:
        try:
            import boto3
        except ImportError as error:
            raise MissingDependencyError("checkpoints in a bucket require boto3: pip install 'ssmvl[train]'") from error
        self.location = url
        self._bucket, _, path = url.removeprefix("s3://").partition("/")
        self._prefix = f"{path}/" if path else ""
        try:
            self._client: Any = boto3.client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"))
        except Exception as error:  # each cause has its own type: malformed endpoint, no region, no credentials
            raise RunError(f"{url} cannot be used ({error}){hint(url)}") from error

    def latest(self) -> tuple[str | None, list[str]]:
        """Return the latest complete checkpoint, or None, and the problem of each newer one.

        Removes the newer ones if they are sharded: an upload starts with the index, which would make a checkpoint with
        old shards look complete.

        Raises:
            RunError: the bucket cannot be reached.
        """
        with self.outline() as outline, self._as_run_errors():
            checkpoint, skipped = latest_complete(outline)
            for path in skipped:
                for file in path.iterdir() if path.is_dir() else ():
                    self._remove(outline, file)
            url = f"{self.location}/{checkpoint.name}" if checkpoint else None
            return url, [text.replace(str(outline), self.location) for text in skipped.values()]

    def remove_old(self, kept: int) -> None:
        """Remove checkpoints older than the latest `kept` complete ones.

        Raises:
            RunError: the bucket cannot be reached.
        """
        with self.outline() as outline, self._as_run_errors():
            for path in outdated(outline, kept):
                for file in path.iterdir() if path.is_dir() else [path]:
                    self._remove(outline, file)

    def _remove(self, outline: Path, path: Path) -> None:
        self._client.delete_object(Bucket=self._bucket, Key=self._prefix + str(path.relative_to(outline)))

    @contextmanager
    def outline(self, name: str = "") -> Iterator[Path]:
        """Yield a temporary directory of sparse files with the names and sizes of the objects.

        Only indices, and the ends of .pt files with their zip central directories, are downloaded.

        Args:
            name: the only checkpoint to include; all if empty.

        Raises:
            RunError: the bucket cannot be reached, or the directory cannot be written.
        """
        with ExitStack() as stack:
            with self._as_run_errors():
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ssmvl-")))
                listing = self._client.get_paginator("list_objects_v2")
                pages = listing.paginate(Bucket=self._bucket, Prefix=self._prefix + name)
                for item in [item for page in pages for item in page.get("Contents", [])]:
                    parts = PurePosixPath(item["Key"].removeprefix(self._prefix)).parts
                    marker = item["Key"].endswith("/")  # consoles create such objects to represent directories
                    if not marker and len(parts) in (1, 2) and CHECKPOINT.fullmatch(parts[0]) and ".." not in parts:
                        self._add(folder.joinpath(*parts), item)
            yield folder

    def fetch(self, checkpoint: Path) -> None:
        """Download all files of a checkpoint into its outline.

        Raises:
            RunError: the bucket cannot be reached, or the outline cannot be written.
        """
        for file in checkpoint.iterdir() if checkpoint.is_dir() else [checkpoint]:
            name = str(file.relative_to(checkpoint.parent))
            with self._as_run_errors(f"/{name}"):
                self._client.download_file(self._bucket, self._prefix + name, str(file))

    @contextmanager
    def _as_run_errors(self, file: str = "") -> Iterator[None]:
        """Convert errors of the bucket and of the local temporary directory to `RunError`."""
        from botocore.exceptions import BotoCoreError

        try:
            yield
        except Exception as error:  # botocore creates its error classes at runtime
            if isinstance(error, OSError) and not isinstance(error, BotoCoreError):  # some BotoCoreErrors are OSErrors
                what = f"cannot be written to a temporary file ({error})"
                advice = f"free up space in {tempfile.tempdir}, or set TMPDIR to another existing directory"
                raise RunError(f"{self.location}{file} {what}; {advice}") from error
            cause = getattr(error, "last_exception", error)  # set by a download that ran out of retries
            raise RunError(f"{self.location}{file} cannot be used ({cause}){hint(self.location)}") from error

    def _add(self, path: Path, item: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(item["Size"])
            if item["Size"] and (path.name == METADATA_FILE or path.suffix == ".pt"):
                file.seek(start := max(0, item["Size"] - TAIL) if path.suffix == ".pt" else 0)
                part = self._client.get_object(Bucket=self._bucket, Key=item["Key"], Range=f"bytes={start}-")
                file.write(part["Body"].read())


Store = FolderStore | BucketStore
