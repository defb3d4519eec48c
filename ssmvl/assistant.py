"""Assistant: a model and its processor, asked questions about images; saved to and loaded from a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ssmvl import __version__
from ssmvl.batch import collate, pad
from ssmvl.build import build_model, build_processor
from ssmvl.checkpoints import write_folder
from ssmvl.errors import CheckpointError, DataError
from ssmvl.interfaces import LanguageModel
from ssmvl.recipe import Recipe, load_recipe
from ssmvl.text.processor import Processor
from ssmvl.vision.transforms import ImageLike
from ssmvl.vlm import VisionLanguageModel

FORMAT_VERSION = 1
ABOUT_FILE = "ssmvl.json"


class Assistant:
    """Answers questions about images.

    Args:
        model: put into evaluation mode.
        processor: the model's.
        recipe: saved with the weights.
    """

    def __init__(self, model: VisionLanguageModel, processor: Processor, recipe: Recipe) -> None:
        self.model, self.processor, self.recipe = model.eval(), processor, recipe

    @torch.no_grad()  # not inference_mode: what it caches could not be trained with afterwards
    def generate(
        self,
        prompts: Sequence[str],
        images: Sequence[ImageLike | None] | None = None,
        *,
        max_new_tokens: int = 64,
    ) -> list[str]:
        """Greedy answers, one for each prompt; a row's answer does not depend on the others.

        Args:
            prompts: questions.
            images: one or None for each prompt.
            max_new_tokens: length of an answer at the most.

        Raises:
            DataError: prompts is one text, prompts and images differ in number, or an image cannot be decoded.
        """
        if isinstance(prompts, str):
            raise DataError("prompts must be a list of texts, received one text; write generate([prompt], [image])")
        images = [None] * len(prompts) if images is None else images
        if len(images) != len(prompts):
            raise DataError(f"{len(prompts)} prompts, but {len(images)} images; give one image or None for each prompt")
        if not prompts or max_new_tokens < 1:
            return [""] * len(prompts)
        device = next(self.model.parameters()).device
        encode = self.processor.encode
        samples = [
            encode([{"role": "user", "content": text}], [] if image is None else [image])
            for text, image in zip(prompts, images, strict=True)
        ]
        inputs = pad(collate(samples))
        visual = self.model.encode({spec: pixels.to(device) for spec, pixels in inputs["images"].items()})
        state = cast(LanguageModel, self.model.language).new_state(len(prompts), device)
        moved = [inputs[key].to(device) for key in ("ids", "lengths", "image_positions")]
        logits = self.model.prefill(moved[0], moved[1], visual, moved[2], state)
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
            if number + 1 == limit or bool(done.all()):
                break
            logits = self.model.step(ids, state)
        rows = torch.stack(steps, dim=1).tolist()
        return [row[: row.index(end)] if end in row else row for row in rows]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights (safetensors), recipe, tokenizer and format version into `folder`, whole or not at all.

        Raises:
            CheckpointError: the folder holds other files, which would be lost.
        """
        save_folder(folder, self.model.state_dict(), self.recipe, self.processor)


def save_folder(folder: str | Path, tensors: dict[str, Tensor], recipe: Recipe, processor: Processor) -> None:
    """Write what `load` reads; an older such folder stays until the new one is complete.

    Raises:
        CheckpointError: the folder holds other files, which would be lost.
    """
    about = {"format_version": FORMAT_VERSION, "ssmvl": __version__, "torch": torch.__version__}
    texts = {
        "recipe.yaml": recipe.to_yaml(),
        "tokenizer.json": processor.tokenizer.to_str(pretty=True),
        ABOUT_FILE: json.dumps(about, indent=2) + "\n",
    }
    write_folder(Path(folder), tensors, texts)


def load(
    folder: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Assistant:
    """The assistant saved in `folder`, or in the `model` folder of a run.

    Args:
        folder: a run folder, or one that `save_pretrained` wrote.
        device: where the model lies; the current CUDA device, or the CPU where there is none, if None.
        dtype: of the parameters, fp32 if None.

    Raises:
        CheckpointError: the folder holds no model, a damaged one, or one of a newer format.
    """
    folder = Path(folder)
    try:
        folder = folder / "model" if (folder / "model" / ABOUT_FILE).is_file() else folder
        about = json.loads((folder / ABOUT_FILE).read_text())
        version = int(about["format_version"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{folder} holds no saved model: {ABOUT_FILE} cannot be read ({error})") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}; this ssmvl reads up to {FORMAT_VERSION}; update it"
        )
    if device is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    recipe = load_recipe(folder)
    model = build_model(recipe, device=device, dtype=dtype, weights=folder)
    return Assistant(model, build_processor(recipe, model, folder), recipe)
