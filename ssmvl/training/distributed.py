"""What ranks find together: an error of one ends every rank, with one message."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
from composer.utils import dist

from ssmvl.errors import RunError, SsmvlError

Found = TypeVar("Found")
PATIENCE = timedelta(hours=1)  # for which ranks wait where one of them may be fetching or writing


@cache
def patient() -> torch.distributed.ProcessGroup | None:
    """All ranks, which wait for each other for `PATIENCE`; every rank asks for it at the same moment. None of one rank.

    Through gloo, on GPUs too. While they train they wait as long as `session.WAIT` says: a machine that is lost without
    a word is missed then.
    """
    if dist.get_world_size() == 1:
        return None
    return torch.distributed.new_group(timeout=PATIENCE, backend="gloo")


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
    dist.broadcast_object_list(said, group=patient())
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
        said = [text for text in dist.all_gather_object(str(error or ""), patient()) if text]
        if said:
            raise error or RunError(said[0])
    return cast(Found, found)
