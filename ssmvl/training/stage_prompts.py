"""Prompts of stages: which differ from the model's, and the recipe that a stage's model is saved with."""

from __future__ import annotations

from typing import Any

from ssmvl.recipes.merge import Recipe


def recipe_after(recipe: Recipe, stage: str) -> Recipe:
    """The recipe that a stage's model is saved with: its prompt is the one that the stage trained with."""
    prompt = (recipe.data["stages"].get(stage) or {}).get("prompt")
    if prompt is None:
        return recipe
    return Recipe({**recipe.data, "model": {**recipe.data["model"], "prompt": prompt}}, recipe.source)


def prompts_of_stages(recipe: Recipe) -> list[str]:
    """One line for each stage, or stream of its data, that trains with another prompt than `model.prompt`."""
    model, lines = recipe.data["model"].get("prompt"), []
    for name, stage in (recipe.data.get("stages") or {}).items():
        if not isinstance(stage, dict):
            continue
        own = stage.get("prompt") or model
        if own != model:
            what = (
                f"{_shown(own)} overrides model.prompt {_shown(model)}; the stage's model is saved with {_shown(own)}"
            )
            lines.append(f"stages.{name}.prompt: {what}")
        data = stage.get("data")
        streams = data.get("streams") if isinstance(data, dict) else None
        for stream, share in streams.items() if isinstance(streams, dict) else ():
            if isinstance(share, dict) and share.get("prompt") not in (None, own):
                what = f"{_shown(share['prompt'])}, but the stage's model is saved with {_shown(own)}"
                lines.append(f"stages.{name}.data.streams.{stream}.prompt: {what}")
    return lines


def _shown(prompt: Any) -> str:
    named = isinstance(prompt, dict) and list(prompt) == ["name"]
    return repr(prompt["name"] if named else prompt)
