"""Prompts of stages: those that differ from the model's, and the recipe saved with a stage's model."""

from __future__ import annotations

from typing import Any

from ssmvl.recipes.merge import Recipe


def recipe_after(recipe: Recipe, stage: str) -> Recipe:
    """Return the recipe saved with a stage's model: its prompt is the one that the stage trained with.

    This is the prompt that all streams of a mix share, else the stage's, else the model's.
    """
    model = recipe.data["model"]
    prompt, _ = _prompts(recipe.data["stages"].get(stage), model["prompt"])
    return (
        recipe
        if prompt == model["prompt"]
        else Recipe({**recipe.data, "model": {**model, "prompt": prompt}}, recipe.source)
    )


def prompts_of_stages(recipe: Recipe) -> list[str]:
    """Return one line per stage whose prompt is not the model's, and per stream whose prompt is not the saved one."""
    model, lines = recipe.data["model"].get("prompt"), []
    for name, stage in (recipe.data.get("stages") or {}).items():
        saved, streams = _prompts(stage, model)
        if saved != model:
            what = f"{_format(saved)} overrides model.prompt {_format(model)}"
            lines.append(f"stages.{name}.prompt: {what}; the stage's model is saved with {_format(saved)}")
        for stream, own in streams.items():
            if own != saved:
                what = f"{_format(own)}, but the stage's model is saved with {_format(saved)}"
                lines.append(f"stages.{name}.data.streams.{stream}.prompt: {what}")
    return lines


def _prompts(stage: Any, model: Any) -> tuple[Any, dict[str, Any]]:
    """Return the prompt saved with a stage's model and the prompt of each stream of its data, as in the recipe."""
    stage = stage if isinstance(stage, dict) else {}
    own, data = stage.get("prompt") or model, stage.get("data")
    shares = data.get("streams") if isinstance(data, dict) else None
    prompts = {name: share.get("prompt") or own for name, share in (shares or {}).items() if isinstance(share, dict)}
    streams = {name: {"name": prompt} if isinstance(prompt, str) else prompt for name, prompt in prompts.items()}
    first = next(iter(streams.values()), own)
    return (first if all(prompt == first for prompt in streams.values()) else own), streams


def _format(prompt: Any) -> str:
    name_only = isinstance(prompt, dict) and list(prompt) == ["name"]
    return repr(prompt["name"] if name_only else prompt)
