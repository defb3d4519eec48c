"""Checks and normalization of the arguments of `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex, cast

from ssmvl.errors import DataError
from ssmvl.interfaces import Message
from ssmvl.processing.transforms import ImageLike


def check_lists(prompts: object, images: object, max_new_tokens: object) -> None:
    """Check the arguments of `Assistant.generate`.

    Raises:
        DataError: prompts is not a list of texts or conversations, images not a list, or max_new_tokens not an integer.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        received = "a single text" if isinstance(prompts, str) else f"a {type(prompts).__name__}"
        raise DataError(f"prompts must be a list of texts, received {received}; write generate([prompt], [image])")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str | list | tuple):
            what = f"prompt {number} has type {type(prompt).__name__}: {prompt!r}"
            raise DataError(f"prompts must be a list of texts or conversations; {what}")
        if not isinstance(prompt, str) and len(prompt) % 2 == 0:
            raise DataError(f"prompt {number} must end with a user message; it has {len(prompt)} messages")
    if isinstance(images, str | bytes) or not (images is None or isinstance(images, Sequence)):
        raise DataError(f"images must be a list, received a {type(images).__name__}; write generate([prompt], [image])")
    if not isinstance(max_new_tokens, SupportsIndex):
        raise DataError(f"max_new_tokens must be an integer, received {max_new_tokens!r}")


def as_conversation(prompt: str | Sequence[Message]) -> Sequence[Message]:
    """Return a prompt as a conversation."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def as_images(own: ImageLike | Sequence[ImageLike] | None) -> Sequence[ImageLike]:
    """Return the images of one prompt as a list."""
    if own is None:
        return []
    return own if isinstance(own, list | tuple) else [cast(ImageLike, own)]
