"""Prompts of stages: which differ from the model's, and the recipe that a stage's model is saved with."""

from __future__ import annotations

from typing import Any

from ssmvl.recipes.merge import Recipe


def recipe_after(recipe: Recipe, stage: str) -> Recipe:
    """The recipe that a stage's model is saved with: its prompt is the one that the stage trained with.

    That is the prompt of all streams of a mix, where they have one, else the stage's, else the model's.
    """
    model = recipe.data["model"]
    prompt, _ = _prompts(recipe.data["stages"].get(stage), model["prompt"])
    return (
        recipe
        if prompt == model["prompt"]
        else Recipe({**recipe.data, "model": {**model, "prompt": prompt}}, recipe.source)
    )


def prompts_of_stages(recipe: Recipe) -> list[str]:
    """One line for each stage, or stream of its data, that trains with another prompt than the model is asked with."""
    model, lines = recipe.data["model"].get("prompt"), []
    for name, stage in (recipe.data.get("stages") or {}).items():
        saved, streams = _prompts(stage, model)
        if saved != model:
            what = f"{_shown(saved)} overrides model.prompt {_shown(model)}"
            lines.append(f"stages.{name}.prompt: {what}; the stage's model is saved with {_shown(saved)}")
        for stream, own in streams.items():
            if own != saved:
                what = f"{_shown(own)}, but the stage's model is saved with {_shown(saved)}"
                lines.append(f"stages.{name}.data.streams.{stream}.prompt: {what}")
    return lines


def _prompts(stage: Any, model: Any) -> tuple[Any, dict[str, Any]]:
    """The prompt that a stage's model is saved with, and that of each stream of its data, as the recipe has them."""
    stage = stage if isinstance(stage, dict) else {}
    own, data = stage.get("prompt") or model, stage.get("data")
    shares = data.get("streams") if isinstance(data, dict) else None
    given = {name: share.get("prompt") or own for name, share in (shares or {}).items() if isinstance(share, dict)}
    streams = {name: {"name": prompt} if isinstance(prompt, str) else prompt for name, prompt in given.items()}
    first = next(iter(streams.values()), own)
    return (first if all(prompt == first for prompt in streams.values()) else own), streams


def _shown(prompt: Any) -> str:
    named = isinstance(prompt, dict) and list(prompt) == ["name"]
    return repr(prompt["name"] if named else prompt)
