"""Plots of a run's loss and accuracy, from its TensorBoard logs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssmvl.drawing.saving import save_png

LOSS, ACCURACY = "loss/train/total", "accuracy/"
SMOOTH = 5  # logged values averaged for each point of a curve
Curve = dict[int, float]


def draw_curves(logs: Mapping[str, Path], png: Path) -> None:
    """Plot the loss, and the accuracy by type of question, of consecutive stages to a PNG.

    Args:
        logs: TensorBoard directory of each stage, in order; missing directories are skipped.
        png: file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = dict(zip((LOSS, ACCURACY), figure.subplots(1, 2), strict=True))
    curves: dict[str, Curve] = {}
    start = 0
    for stage, folder in logs.items():
        scalars = read_scalars(folder) if folder.is_dir() else {}
        for name, curve in scalars.items():
            curves.setdefault(name, {}).update({start + step: value for step, value in curve.items()})
        for each in axes.values():
            each.axvline(start, color="0.8", linewidth=1, zorder=0)
            each.text(start, 1.01, f" {stage}", transform=each.get_xaxis_transform(), color="0.4", parse_math=False)
        start += max((max(curve) for curve in scalars.values()), default=0)
    lines: dict[str, Any] = {}
    for name, curve in sorted(curves.items()):
        if name == LOSS or name.startswith(ACCURACY):
            each = axes[LOSS if name == LOSS else ACCURACY]
            steps = sorted(curve)
            (line,) = each.plot(steps, _smooth([curve[s] for s in steps]), linewidth=1.2)
            lines[name.removeprefix(ACCURACY)] = line
    axes[LOSS].set(xlabel="step", ylabel="loss per supervised token", yscale="log")
    axes[ACCURACY].set(xlabel="step", ylabel="accuracy in training", ylim=(0, 1.02))
    lines.pop(LOSS, None)
    if lines:
        legend = axes[ACCURACY].legend(lines.values(), lines.keys(), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    save_png(figure, png, dpi=140)


def read_scalars(folder: Path) -> dict[str, Curve]:
    """Read {name: {step: value}} from a TensorBoard directory; for a step repeated after resuming, the later value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def _smooth(values: list[float]) -> list[float]:
    padded = np.pad(values, SMOOTH // 2, mode="edge")
    return list(np.convolve(padded, np.ones(SMOOTH) / SMOOTH, mode="valid"))
