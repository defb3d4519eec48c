"""The loss of a run, drawn from its TensorBoard logs."""

from __future__ import annotations

from pathlib import Path


def plot_loss(logs: Path, picture: Path) -> None:
    """Draw `loss/train/total` of each stage under `logs` into a PNG; a resumed stage is one curve."""
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for folder in sorted((path for path in logs.iterdir() if path.is_dir()), key=lambda path: path.stat().st_ctime):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        if "loss/train/total" in events.Tags()["scalars"]:
            curve = {event.step: event.value for event in events.Scalars("loss/train/total")}
            axes.plot(sorted(curve), [curve[step] for step in sorted(curve)], label=folder.name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss per supervised token", yscale="log")
    axes.legend()
    figure.savefig(picture, dpi=120)
