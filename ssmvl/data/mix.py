"""Schema of a recipe's data: mixes of several streams, loader options and reading options."""

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
    """One stream of a mix. Without a weight, an epoch contains each of its samples once.

    Args:
        data: dataset, opened with the mix's split.
        proportion: share of an epoch, relative to the other streams; the epoch has as many samples as all streams.
        repeat: number of times that an epoch contains each sample; below 1, each epoch draws a different subset.
        choose: number of samples per epoch.
        prompt: prompt format of the conversations; None means the stage's.
    """

    data: DatasetPart
    proportion: Weight | None = None
    repeat: Weight | None = None
    choose: Count | None = None
    prompt: PromptPart | None = None


def weights(share: Share) -> list[str]:
    """Return the names of the weights that are set."""
    return [weight for weight in WEIGHTS if getattr(share, weight) is not None]


def _is_stream(share: Share) -> bool:
    return len(weights(share)) <= 1 and getattr(share.data, "factory", None) is not mix


def _proportions_agree(streams: dict[str, Share]) -> bool:
    return len({share.proportion is None for share in streams.values()}) == 1


Streams = Annotated[
    dict[
        str, Annotated[Share, Check("a stream, not a mix, with at most one of proportion, repeat, choose", _is_stream)]
    ],
    Check("streams of which either all or none have a proportion", _proportions_agree),
]


def mix(split: str, *, streams: Streams) -> list[Stream]:
    """Mix several datasets; a batch may contain samples of any of them.

    Args:
        split: split of each dataset.
        streams: the streams, by name.

    Raises:
        DataError: a stream is itself a mix. Errors of the datasets are passed on.
    """
    opened = []
    for name, share in streams.items():
        source = share.data(split=split)
        if isinstance(source, list):
            raise DataError(f"stream {name!r} is itself a mix; list its streams in this mix")
        prompt = share.prompt() if share.prompt else None
        opened.append(Stream(source, share.proportion, share.repeat, share.choose, prompt))
    return opened


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Loader options of a stage.

    Args:
        workers: processes per rank that prepare samples. None means 0 if a rank has fewer than four cores, else all but
            two of its cores, at most eight. More than the machine has cores are reduced to that.
        shuffle: True for a different order in each epoch.
        num_canonical_nodes: number of groups that the shards are divided into before shuffling; None means the number
            of nodes. To resume on other numbers of nodes in the same order, set a multiple of all of them.
        cache_limit: size limit of the fetched shards on each node, e.g. `500gb`; the least recently used are deleted.
            None means no limit. Only for data in a bucket.
    """

    workers: Annotated[int, Check("from 0 to 256", lambda number: 0 <= number <= 256)] | None = None
    shuffle: bool = True
    num_canonical_nodes: Count | None = None
    cache_limit: Annotated[str, Check("a number and a unit (kb, mb, gb, tb), e.g. 500gb", SIZE.fullmatch)] | None = None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Reading options of a stage.

    Args:
        prompt: prompt format of the conversations; None means the model's.
        max_text_tokens: samples are truncated to this length; image places are not counted and never cut.
    """

    prompt: PromptPart | None = None
    max_text_tokens: Count = 2048
