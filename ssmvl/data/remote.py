"""Files in a bucket: fetched whole, sent whole. Whatever mosaicml-streaming reaches: s3, gs, oci, azure, hf.

`S3_ENDPOINT_URL` names an endpoint other than Amazon's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ssmvl.errors import DataError
from ssmvl.files import written_whole

TIMEOUT = 120.0  # seconds to wait for an answer


def is_remote(place: str) -> bool:
    """Whether a place is a URL such as `s3://bucket/folder`, and no path."""
    return "://" in place


def hint(url: str) -> str:
    """What to look at where a URL cannot be reached, to end a message."""
    return "; look at the name of the bucket, its rights and S3_ENDPOINT_URL" if url.startswith("s3://") else ""


def fetch(url: str, path: Path, check: Callable[[Path], None] | None = None) -> None:
    """Download one file, whole or not at all.

    Args:
        url: of the file.
        path: where it will lie.
        check: looks at the file before it has that name, and raises a DataError if it is not as it should be.

    Raises:
        DataError: it is not there, cannot be reached or written, or `check` refuses it.
    """
    from streaming.base.storage import CloudDownloader

    _refuse_marks(url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as partial:
            partial.unlink(missing_ok=True)  # what is there is taken for downloaded
            CloudDownloader.direct_download(url, str(partial), TIMEOUT)
            if check:
                check(partial)
    except DataError:
        raise
    except Exception as error:  # each cloud's library has errors of its own
        raise DataError(f"{url} cannot be fetched ({type(error).__name__}: {error}){hint(url)}") from error


def send(folder: Path, url: str, names: Sequence[str]) -> None:
    """Upload files of a folder, one after another, to the folder `url`; each appears whole or not at all.

    Raises:
        DataError: the bucket does not exist, refuses, or cannot be reached.
    """
    from streaming.base.storage import CloudUploader

    _refuse_marks(url)
    try:
        uploader = CloudUploader.get((str(folder), url), keep_local=True, exist_ok=True)
        for name in names:
            uploader.upload_file(name)
    except Exception as error:  # each cloud's library has errors of its own
        raise DataError(f"{url} cannot be written ({type(error).__name__}: {error}){hint(url)}") from error


def _refuse_marks(url: str) -> None:
    if "#" in url or "?" in url:  # streaming would cut the name there: all files of a folder would be one
        raise DataError(f"{url}: a URL cannot have # or ? in it; choose another name")
