"""What ranks find together: an error of one ends every rank, with one message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from composer.utils import dist

from ssmvl.errors import RunError, SsmvlError

Found = TypeVar("Found")


def first_rank(find: Callable[[], Found]) -> Found:
    """What the first rank finds, on every rank.

    Raises:
        SsmvlError: what the first rank raised; a RunError of its text on the others.
    """
    found: Found | None = None
    error: SsmvlError | None = None
    if dist.get_global_rank() == 0:
        try:
            found = find()
        except SsmvlError as raised:
            error = raised
    said: list[Any] = [str(error or ""), found]
    dist.broadcast_object_list(said)
    if said[0]:
        raise error or RunError(said[0])
    return cast(Found, said[1])


def every_rank(find: Callable[[], Found]) -> Found:
    """What each rank finds, the first rank of each node before its others.

    Raises:
        SsmvlError: what this rank raised; a RunError of the first such text where another did.
    """
    found: Found | None = None
    error: SsmvlError | None = None
    for first in (True, False):
        if (dist.get_local_rank() == 0) is first:
            try:
                found = find()
            except SsmvlError as raised:
                error = raised
        said = [text for text in dist.all_gather_object(str(error or "")) if text]
        if said:
            raise error or RunError(said[0])
    return cast(Found, found)
