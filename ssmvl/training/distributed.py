"""Functions that all ranks run together: an error on one rank ends every rank with one message."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
from composer.utils import dist

from ssmvl.errors import RunError, SsmvlError

Result = TypeVar("Result")
PATIENCE = timedelta(hours=1)  # how long ranks wait when one of them may be downloading or writing


@cache
def patient() -> torch.distributed.ProcessGroup | None:
    """Return a gloo group of all ranks whose timeout is `PATIENCE`; None if there is only one rank.

    Every rank must make the first call at the same point. GPU runs use gloo here too. Training itself uses the default
    group, whose timeout, `session.WAIT`, is shorter: that is how the loss of a machine is noticed.
    """
    if dist.get_world_size() == 1:
        return None
    return torch.distributed.new_group(timeout=PATIENCE, backend="gloo")


def first_rank(function: Callable[[], Result]) -> Result:
    """Call a function on the first rank and return its result on every rank.

    Raises:
        SsmvlError: the first rank's error; on the other ranks, a RunError with the same text.
    """
    result: Result | None = None
    error: SsmvlError | None = None
    if dist.get_global_rank() == 0:
        try:
            result = function()
        except SsmvlError as raised:
            error = raised
    outcome: list[Any] = [str(error or ""), result]
    dist.broadcast_object_list(outcome, group=patient())
    if outcome[0]:
        raise error or RunError(outcome[0])
    return cast(Result, outcome[1])


def every_rank(function: Callable[[], Result]) -> Result:
    """Call a function on every rank, on each node's first rank before its others, and return this rank's result.

    Raises:
        SsmvlError: this rank's error; if only other ranks failed, a RunError with the text of the first of them.
    """
    result: Result | None = None
    error: SsmvlError | None = None
    for first in (True, False):
        if (dist.get_local_rank() == 0) is first:
            try:
                result = function()
            except SsmvlError as raised:
                error = raised
        messages = [text for text in dist.all_gather_object(str(error or ""), patient()) if text]
        if messages:
            raise error or RunError(messages[0])
    return cast(Result, result)
