"""Atomic transfer of files to and from a bucket through mosaicml-streaming: s3, gs, oci, azure, hf.

Set `S3_ENDPOINT_URL` to use an endpoint other than Amazon's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ssmvl.errors import DataError
from ssmvl.files import written_whole

TIMEOUT = 120.0  # seconds to wait for a response


def is_remote(location: str) -> bool:
    """Return True for a URL such as `s3://bucket/dir`, False for a local path."""
    return "://" in location


def hint(url: str) -> str:
    """Return the advice that ends a message about an unreachable S3 URL; empty for other URLs."""
    return "; check the bucket's name, its permissions and S3_ENDPOINT_URL" if url.startswith("s3://") else ""


def fetch(url: str, path: Path, check: Callable[[Path], None] | None = None) -> None:
    """Download one file atomically.

    Args:
        url: URL of the file.
        path: local path to write to.
        check: called with the downloaded file before it is renamed to `path`; raises a DataError to reject it.

    Raises:
        DataError: the file does not exist, cannot be reached or written, or is rejected by `check`.
    """
    from streaming.base.storage import CloudDownloader

    _reject_marks(url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as partial:
            partial.unlink(missing_ok=True)  # streaming takes an existing file for downloaded
            CloudDownloader.direct_download(url, str(partial), TIMEOUT)
            if check:
                check(partial)
    except DataError:
        raise
    except Exception as error:  # each cloud's library has its own errors
        raise DataError(f"{url} cannot be fetched ({type(error).__name__}: {error}){hint(url)}") from error


def send(folder: Path, url: str, names: Sequence[str]) -> None:
    """Upload files of a local directory to the directory `url`, one by one, each atomically.

    Raises:
        DataError: the bucket does not exist, rejects the upload, or cannot be reached.
    """
    from streaming.base.storage import CloudUploader

    _reject_marks(url)
    try:
        uploader = CloudUploader.get((str(folder), url), keep_local=True, exist_ok=True)
        for name in names:
            uploader.upload_file(name)
    except Exception as error:  # each cloud's library has its own errors
        raise DataError(f"{url} cannot be written ({type(error).__name__}: {error}){hint(url)}") from error


def _reject_marks(url: str) -> None:
    if "#" in url or "?" in url:  # streaming would truncate the name there, and all files of a directory would be one
        raise DataError(f"{url}: a URL must not contain # or ?; choose another name")
