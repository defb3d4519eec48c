"""What a recipe says about data beyond a data set's own options: several streams at once, and how they are loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from ssmvl.errors import DataError
from ssmvl.interfaces import Check, Count, DatasetPart, PromptPart, Stream

WEIGHTS = ("proportion", "repeat", "choose")
SIZE = re.compile(r"\d+(\.\d+)?[kmgt]b", re.IGNORECASE)
Weight = Annotated[float, Check("a number above 0", lambda weight: 0 < weight < float("inf"))]


@dataclass(frozen=True, kw_only=True)
class Share:
    """One stream of a mix; without a weight an epoch brings each of its samples once.

    Args:
        data: asked for the split that the mix is asked for.
        proportion: its share of an epoch, relative to the others'; the epoch has as many samples as all streams.
        repeat: how often an epoch brings each of its samples; below 1 another part of them each epoch.
        choose: how many of its samples an epoch brings.
        prompt: how its conversations are written; as the stage does if None.
    """

    data: DatasetPart
    proportion: Weight | None = None
    repeat: Weight | None = None
    choose: Count | None = None
    prompt: PromptPart | None = None


def weights(share: Share) -> list[str]:
    """Names of the weights that a stream has."""
    return [weight for weight in WEIGHTS if getattr(share, weight) is not None]


def _is_stream(share: Share) -> bool:
    return len(weights(share)) <= 1 and getattr(share.data, "factory", None) is not mix


def _agree(streams: dict[str, Share]) -> bool:
    return len({share.proportion is None for share in streams.values()}) == 1


Streams = Annotated[
    dict[
        str, Annotated[Share, Check("a stream of no mix, with at most one of proportion, repeat, choose", _is_stream)]
    ],
    Check("streams of which all have a proportion or none", _agree),
]


def mix(split: str, *, streams: Streams) -> list[Stream]:
    """Several data sets at once, each batch with samples of any of them.

    Args:
        split: asked of each.
        streams: by name.

    Raises:
        DataError: one of them is a mix itself; or what a data set raises.
    """
    found = []
    for name, share in streams.items():
        source = share.data(split=split)
        if isinstance(source, list):
            raise DataError(f"stream {name!r} is a mix itself; list its streams beside the others")
        prompt = share.prompt() if share.prompt else None
        found.append(Stream(source, share.proportion, share.repeat, share.choose, prompt))
    return found


@dataclass(frozen=True, kw_only=True)
class Loader:
    """How a stage reads its data.

    Args:
        workers: processes of each rank that make samples; if None, none with fewer than four cores for each rank,
            else all cores but two, eight at most.
        shuffle: whether each epoch has another order.
        num_canonical_nodes: parts that shards are dealt to before they are shuffled; with the number of nodes, which
            it is if None, a run may go on at another number of nodes in the same order.
        cache_limit: of fetched shards on each node, e.g. `500gb`; those that were not used for the longest time are
            deleted. No limit if None. For data in a bucket only.
    """

    workers: Annotated[int, Check("from 0 to 256", lambda number: 0 <= number <= 256)] | None = None
    shuffle: bool = True
    num_canonical_nodes: Count | None = None
    cache_limit: Annotated[str, Check("a number and a unit (kb, mb, gb, tb), e.g. 500gb", SIZE.fullmatch)] | None = None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a stage reads a sample.

    Args:
        prompt: how conversations are written; as the model does if None.
        max_text_tokens: what a conversation has beyond is cut off; image places are not counted and never cut.
    """

    prompt: PromptPart | None = None
    max_text_tokens: Count = 2048
