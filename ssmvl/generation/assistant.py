"""Assistant: a model and its processor, asked questions about images; saved to and loaded from a folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi
from torch import Tensor

from ssmvl.checkpoints.hub import ID
from ssmvl.errors import BackendError, CheckpointError, ContractError, DataError, short
from ssmvl.generation.inputs import as_conversation, as_images, check_lists
from ssmvl.interfaces import IGNORED, IMAGE_PLACE, LanguageModel, Message
from ssmvl.model.blueprint import Blueprint
from ssmvl.model.build import build_model
from ssmvl.model.saved import (
    CARD_FILE,
    is_ours,
    own_tensors,
    require_loadable,
    save_folder,
    saved_folder,
    tokenizer_files,
    write_files,
)
from ssmvl.model.vlm import VisionLanguageModel
from ssmvl.processing.batch import collate, pad
from ssmvl.processing.processor import Processor
from ssmvl.processing.tokenizers import without_beginning
from ssmvl.processing.transforms import ImageLike
from ssmvl.recipes.merge import Recipe

__all__ = ["Assistant", "load"]


class Assistant:
    """Answers questions about images.

    Args:
        model: put into evaluation mode.
        processor: the model's.
        recipe: saved with the weights.
    """

    def __init__(self, model: VisionLanguageModel, processor: Processor, recipe: Recipe) -> None:
        self.model, self.processor, self.recipe = model.eval(), processor, recipe
        self._step: Callable[..., Tensor] = model.step

    @torch.no_grad()  # not inference_mode: what it caches could not be trained with afterwards
    def generate(
        self,
        prompts: Sequence[str | Sequence[Message]],
        images: Sequence[ImageLike | Sequence[ImageLike] | None] | None = None,
        *,
        max_new_tokens: int = 64,
    ) -> list[str]:
        """Greedy answers, one for each prompt; a row's answer does not depend on the others.

        Args:
            prompts: questions, or conversations that end with one.
            images: for each prompt an image, a list of them, or None; see `Processor.encode` for where they stand.
            max_new_tokens: length of an answer at the most.

        Raises:
            DataError: prompts is not a list of texts or conversations, images is not a list of the same length,
                max_new_tokens is not a whole number, or an image cannot be decoded.
            BackendError: the logits are NaN.
        """
        check_lists(prompts, images, max_new_tokens)
        images = [None] * len(prompts) if images is None else images
        if len(images) != len(prompts):
            raise DataError(f"{len(prompts)} prompts, but {len(images)} images; give one image or None for each prompt")
        if not prompts or max_new_tokens < 1:
            return [""] * len(prompts)
        samples = [
            self.processor.encode(as_conversation(prompt), as_images(own))
            for prompt, own in zip(prompts, images, strict=True)
        ]
        return self._answer(samples, max_new_tokens)

    @torch.no_grad()
    def generate_ids(
        self, ids: Tensor, mask: Tensor, images: Sequence[ImageLike] = (), *, max_new_tokens: int = 64
    ) -> list[str]:
        """Greedy answers to rows of ids that a caller made, padded on either side: only real positions are read.

        Args:
            ids: (B, T), -1 at image places; each image takes `Processor.tokens_of(image)` of them.
            mask: (B, T), true or 1 at real positions.
            images: in the order of their places.
            max_new_tokens: length of an answer at the most.

        Raises:
            DataError: ids and mask differ in shape, a row has no real position, an id is none of the tokenizer's,
                image places and images do not match in number, or max_new_tokens is no whole number.
        """
        check_lists([], images, max_new_tokens)
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise DataError(
                f"ids and mask must have one shape (B, T), received {tuple(ids.shape)}, {tuple(mask.shape)}"
            )
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise DataError(f"ids must be whole numbers, received {ids.dtype}")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise DataError("mask must be true or 1 at real positions and false or 0 elsewhere; it has other values")
        rows = [row[real] for row, real in zip(ids.cpu(), mask.cpu().bool(), strict=True)]
        limit = cast(int, self.model.language.num_tokens)
        for number, row in enumerate(rows):
            if not len(row):
                raise DataError(f"row {number} has no real position; give it at least one id")
            wrong = row[(row >= limit) | ((row < 0) & (row != IMAGE_PLACE))]
            if len(wrong):
                raise DataError(
                    f"row {number} has the id {int(wrong[0])}; ids are 0…{limit - 1}, or -1 at image places"
                )
        counts = [int((row == IMAGE_PLACE).sum()) for row in rows]
        tokens = [self.processor.tokens_of(image) for image in images]
        ends, row_ends = list(accumulate(tokens, initial=0)), list(accumulate(counts, initial=0))
        if ends[-1] != row_ends[-1] or not set(row_ends) <= set(ends):
            raise DataError(f"the images need {tokens} image places, but the rows have {counts}")
        owned = [ends.index(end) - ends.index(start) for start, end in pairwise(row_ends)]  # images of each row
        pixels = {spec: t.split(owned) for spec, t in self.processor.pixels(images).items()}
        samples = [
            {"ids": row, "labels": torch.full_like(row, IGNORED), "images": {s: t[number] for s, t in pixels.items()}}
            for number, row in enumerate(rows)
        ]
        return self._answer(samples, max_new_tokens) if rows and max_new_tokens > 0 else [""] * len(rows)

    def compile(self) -> None:
        """Compile the decoding step with torch.compile: equal answers, faster after a slow first one.

        Needs a C++ compiler on a CPU, Triton on a GPU. A new number of prompts compiles again, eight times at most.
        """
        self._step = torch.compile(self.model.step, dynamic=False)

    def _answer(self, samples: Sequence[Mapping[str, Any]], max_new_tokens: int) -> list[str]:
        device = next(self.model.parameters()).device
        inputs = self._padded(samples)
        lengths = torch.tensor([len(sample["ids"]) for sample in samples], device=device)
        visual = self.model.encode({spec: pixels.to(device) for spec, pixels in inputs["images"].items()})
        state = cast(LanguageModel, self.model.language).new_state(len(samples), device)
        ids, image_positions = (inputs[key].to(device) for key in ("ids", "image_positions"))
        logits = self.model.prefill(ids, lengths, visual, image_positions, state)
        if logits.isnan().any():
            raise BackendError("the model's logits are NaN; its weights or its visual tokens are not finite")
        answers = self._continue(logits, state, max_new_tokens)
        return [self.processor.decode(ids) for ids in answers]

    def _continue(self, logits: Tensor, state: Any, limit: int) -> list[list[int]]:
        """Step greedily until every row has ended; ids of each row without its end."""
        end, num_tokens = self.processor.end_id, cast(int, self.model.language.num_tokens)
        steps = []
        done = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        for number in range(limit):
            ids = logits[:, :num_tokens].argmax(-1)
            steps.append(ids)
            done |= ids == end
            if number + 1 == limit or self._ended(done):
                break
            logits = self._step(ids, state)
        rows = torch.stack(steps, dim=1).tolist()
        return [row[: row.index(end)] if end in row else row for row in rows]

    def _padded(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return pad(collate(samples))

    def _ended(self, done: Tensor) -> bool:
        return bool(done.all())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights (safetensors), recipe, tokenizer, model card and format version, whole or not at all.

        Args:
            folder: made if it is not there; a model card in it that somebody else wrote stays.

        Raises:
            CheckpointError: the folder holds other files, which would be lost, or cannot be written; or the model
                could not be loaded again: its tensors are not those of its recipe, or not finite.
        """
        save_folder(folder, own_tensors(self.model), self.recipe, self.processor, self.model)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload what `save_pretrained` writes to the hub, as the user that huggingface_hub is logged in as.

        Args:
            repo_id: `owner/model`; made if it is not there.
            private: whether a new one is.

        Returns:
            The address of the upload.

        Raises:
            CheckpointError: `repo_id` is no such id, or the hub refuses it or cannot be reached.
        """
        if not (isinstance(repo_id, str) and ID.fullmatch(repo_id)):
            raise CheckpointError(f"{repo_id!r} names no model of the hub; write owner/model")
        older = ["*.safetensors", "*.safetensors.index.json"]  # shards of a larger model would be read first
        with tempfile.TemporaryDirectory() as name:
            folder, api = Path(name) / "model", HfApi()
            self.save_pretrained(folder)
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                if api.file_exists(repo_id, CARD_FILE) and not is_ours(api.hf_hub_download(repo_id, CARD_FILE)):
                    (folder / CARD_FILE).unlink()  # the one that somebody wrote stays
                return str(api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=older))
            except (OSError, ValueError) as error:  # the hub's own errors are OSErrors, a malformed id is a ValueError
                reason = short(" ".join(str(error).split()))
                raise CheckpointError(f"{repo_id}: cannot be pushed to the hub ({reason})") from error

    def save_language(self, folder: str | Path) -> None:
        """Write the language model alone with its tokenizer in the layout of transformers, whole or not at all.

        Raises:
            ContractError: transformers has no such model.
            CheckpointError: the folder holds other files, which would be lost, or cannot be written; or the model is
                not the one of its recipe, see `save_pretrained`.
        """
        write = getattr(self.model.language, "to_transformers", None)
        if write is None:
            raise ContractError(f"{type(self.model.language).__name__} has no method to_transformers")
        require_loadable(str(folder), self.model.state_dict(), Blueprint.of(self.recipe), self.processor, self.model)
        tensors, config = write(self.processor.end_id)
        texts = {"config.json": json.dumps(config, indent=2) + "\n"} | tokenizer_files(self.processor)
        write_files(folder, tensors, texts)


def load(
    weights: str | Path,
    *,
    recipe: str | Path | Recipe | Blueprint | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> Assistant:
    """The assistant saved in a folder, in the `model` folder of a run, or in the hub; or one of weights from elsewhere.

    Args:
        weights: a run folder, one that `save_pretrained` wrote, or the id of a model in the hub, which is fetched. With
            a recipe, what `build_model` takes as `weights`, such as a released checkpoint.
        recipe: of the model, as `load_recipe` takes it; None if it was saved with the weights.
        device: where the model lies; the current CUDA device, or the CPU where there is none, if None.
        dtype: of the parameters, fp32 if None.
        verify: whether files are compared with the digests they were saved with, see `build_model`.

    Raises:
        RecipeError: the recipe has mistakes.
        CheckpointError: nothing of that name is found, or it holds no model, a damaged one, or one of a newer format.
        BackendError: there is no such device here, or `dtype` is no torch.dtype of floating point.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise BackendError(f"dtype must be one of floating point, such as torch.bfloat16; received {dtype!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BackendError(f"device {device!r} cannot be used here ({reason}); such as 'cpu' or 'cuda:0'") from error
    if recipe is None:
        folder, _ = saved_folder(weights)
        return load_saved(Blueprint.of(folder), folder, device=device, dtype=dtype, verify=verify)
    blueprint = Blueprint.of(recipe)
    model = build_model(blueprint, device=_usual(device), dtype=dtype, weights=weights, verify=verify)
    return Assistant(model, blueprint.processor, blueprint.recipe)


def load_saved(
    blueprint: Blueprint,
    folder: Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> Assistant:
    """The assistant saved in a folder whose recipe is bound; see `load`."""
    folder, version = saved_folder(folder)
    model = build_model(blueprint, device=_usual(device), dtype=dtype, weights=folder, verify=verify)
    processor = blueprint.processor_for(model, folder)
    if version == 1:
        without_beginning(processor.tokenizer)
    return Assistant(model, processor, blueprint.recipe)


def _usual(device: torch.device | str | None) -> torch.device | str | None:
    """The current CUDA device where none is named and there is one."""
    if device is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device
