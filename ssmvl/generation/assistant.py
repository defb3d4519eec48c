"""Assistant: a model and its processor, which answer questions about images; saved, loaded and pushed to the Hub."""

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
from ssmvl.processing.tokenizers import disable_bos
from ssmvl.processing.transforms import ImageLike
from ssmvl.recipes.merge import Recipe

__all__ = ["Assistant", "load"]


class Assistant:
    """Answers questions about images.

    Args:
        model: is set to evaluation mode.
        processor: the model's.
        recipe: saved with the weights.
    """

    def __init__(self, model: VisionLanguageModel, processor: Processor, recipe: Recipe) -> None:
        self.model, self.processor, self.recipe = model.eval(), processor, recipe
        self._step: Callable[..., Tensor] = model.step

    @torch.no_grad()  # not inference_mode: tensors cached here could not be used in training
    def generate(
        self,
        prompts: Sequence[str | Sequence[Message]],
        images: Sequence[ImageLike | Sequence[ImageLike] | None] | None = None,
        *,
        max_new_tokens: int = 64,
    ) -> list[str]:
        """Generate a greedy answer to each prompt, independent of the other prompts.

        Args:
            prompts: questions, or conversations that end with one.
            images: for each prompt an image, a list of images, or None; `Processor.encode` says where they are put.
            max_new_tokens: maximum length of an answer.

        Raises:
            DataError: prompts is not a list of texts or conversations, images is not a list of the same length,
                max_new_tokens is not an integer, or an image cannot be decoded.
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
        """Generate greedy answers to rows of ids. Padding, on either side, is not read.

        Args:
            ids: (B, T), -1 at image places; each image takes `Processor.tokens_of(image)` of them.
            mask: (B, T), True or 1 at real positions.
            images: in the order of their image places.
            max_new_tokens: maximum length of an answer.

        Raises:
            DataError: ids and mask differ in shape, a row has no real position, an id is not in the vocabulary,
                the numbers of image places and images do not match, or max_new_tokens is not an integer.
        """
        check_lists([], images, max_new_tokens)
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise DataError(
                f"ids and mask must both have shape (B, T), received {tuple(ids.shape)}, {tuple(mask.shape)}"
            )
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise DataError(f"ids must be integers, received {ids.dtype}")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise DataError("mask must be True or 1 at real positions and False or 0 elsewhere, but has other values")
        rows = [row[real] for row, real in zip(ids.cpu(), mask.cpu().bool(), strict=True)]
        limit = cast(int, self.model.language.num_tokens)
        for number, row in enumerate(rows):
            if not len(row):
                raise DataError(f"row {number} has no real position; it needs at least one")
            wrong = row[(row >= limit) | ((row < 0) & (row != IMAGE_PLACE))]
            if len(wrong):
                raise DataError(
                    f"row {number} has id {int(wrong[0])}; allowed are 0…{limit - 1}, and -1 at image places"
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
        """Compile the decoding step with torch.compile: same answers, faster after a slow first one.

        Needs a C++ compiler on a CPU, Triton on a GPU. Each new number of prompts recompiles, at most eight times.
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
        """Decode greedily until every row has ended. Returns each row's ids, without the end token."""
        end, num_tokens = self.processor.end_id, cast(int, self.model.language.num_tokens)
        steps = []
        done = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        for step in range(limit):
            ids = logits[:, :num_tokens].argmax(-1)
            steps.append(ids)
            done |= ids == end
            if step + 1 == limit or self._ended(done):
                break
            logits = self._step(ids, state)
        rows = torch.stack(steps, dim=1).tolist()
        return [row[: row.index(end)] if end in row else row for row in rows]

    def _padded(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return pad(collate(samples))

    def _ended(self, done: Tensor) -> bool:
        return bool(done.all())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights (safetensors), recipe, tokenizer, model card and format version atomically.

        Args:
            folder: directory, created if it does not exist. A model card in it without ssmvl's marker is kept.

        Raises:
            CheckpointError: the directory holds other files, which would be lost, or cannot be written; or the model
                could not be loaded again, because its tensors do not match its recipe or are not finite.
        """
        save_folder(folder, own_tensors(self.model), self.recipe, self.processor, self.model)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload the files of `save_pretrained` to the Hub, as the user logged in with huggingface_hub.

        Args:
            repo_id: `owner/model`; created if it does not exist.
            private: whether a new repository is private.

        Returns:
            The URL of the upload.

        Raises:
            CheckpointError: `repo_id` is malformed, or the Hub rejects it or cannot be reached.
        """
        if not (isinstance(repo_id, str) and ID.fullmatch(repo_id)):
            raise CheckpointError(f"{repo_id!r} is not a Hub model id; write owner/model")
        older = ["*.safetensors", "*.safetensors.index.json"]  # shards of an earlier, larger model would be read first
        with tempfile.TemporaryDirectory() as name:
            folder, api = Path(name) / "model", HfApi()
            self.save_pretrained(folder)
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                if api.file_exists(repo_id, CARD_FILE) and not is_ours(api.hf_hub_download(repo_id, CARD_FILE)):
                    (folder / CARD_FILE).unlink()  # keep a card without our marker
                return str(api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=older))
            except (OSError, ValueError) as error:  # Hub errors are OSErrors, a malformed id is a ValueError
                reason = short(" ".join(str(error).split()))
                raise CheckpointError(f"{repo_id} cannot be pushed to the Hub ({reason})") from error

    def save_language(self, folder: str | Path) -> None:
        """Write only the language model and its tokenizer, in the layout of transformers, atomically.

        Raises:
            ContractError: transformers has no such model.
            CheckpointError: the directory holds other files, which would be lost, or cannot be written; or the model
                does not match its recipe, see `save_pretrained`.
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
    """Load a saved model from a directory, a run folder or the Hub; or, with a recipe, weights from elsewhere.

    Args:
        weights: a run folder, a directory written by `save_pretrained`, or a Hub id, which is downloaded. With a
            recipe, any `weights` of `build_model`, such as a released checkpoint.
        recipe: of the model, as for `load_recipe`; None if it was saved with the weights.
        device: device of the model; None means the current CUDA device, or the CPU if there is none.
        dtype: of the parameters; None means fp32.
        verify: whether files are compared with the digests saved with them, see `build_model`.

    Raises:
        RecipeError: the recipe has mistakes.
        CheckpointError: the model is not found, or the files hold no model, a damaged one, or one of a newer format.
        BackendError: the device is not available, or `dtype` is not a floating-point torch.dtype.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise BackendError(f"dtype must be a floating-point torch.dtype, such as torch.bfloat16; received {dtype!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BackendError(f"device {device!r} is not available ({reason}); use 'cpu' or 'cuda:0'") from error
    if recipe is None:
        folder, _ = saved_folder(weights)
        return load_saved(Blueprint.of(folder), folder, device=device, dtype=dtype, verify=verify)
    blueprint = Blueprint.of(recipe)
    model = build_model(blueprint, device=_or_current_cuda(device), dtype=dtype, weights=weights, verify=verify)
    return Assistant(model, blueprint.processor, blueprint.recipe)


def load_saved(
    blueprint: Blueprint,
    folder: Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> Assistant:
    """Load a saved model whose recipe is already bound; see `load`."""
    folder, version = saved_folder(folder)
    model = build_model(blueprint, device=_or_current_cuda(device), dtype=dtype, weights=folder, verify=verify)
    processor = blueprint.processor_for(model, folder)
    if version == 1:
        disable_bos(processor.tokenizer)
    return Assistant(model, processor, blueprint.recipe)


def _or_current_cuda(device: torch.device | str | None) -> torch.device | str | None:
    """Return the given device; if it is None, the current CUDA device, or None without CUDA."""
    if device is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device
