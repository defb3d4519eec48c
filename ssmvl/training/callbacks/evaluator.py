"""Evaluation during a stage: loss and generated answers on its evaluation set, sharded or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from composer import Callback, Event, Logger, State, Timestamp
from composer.callbacks import EarlyStopper, ThresholdStopper
from composer.core import get_precision_context
from composer.utils import create_interval_scheduler, dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.nn import functional as F
from tqdm.auto import tqdm

from ssmvl.errors import RunError
from ssmvl.evaluation.results import results
from ssmvl.evaluation.runner import ask, one_question_each
from ssmvl.generation.assistant import Assistant
from ssmvl.processing.batch import collate, pad
from ssmvl.processing.processor import Processor
from ssmvl.recipes.merge import Recipe
from ssmvl.training.composer_classes import LABEL, SHARES
from ssmvl.training.composer_model import ComposerVLM
from ssmvl.training.schema import StageEvaluation

ENTRIES = ("encode", "prefill", "step")  # methods other than forward that enter shard units


class StageEvaluator(Callback):
    """Logs `evaluation/loss`, and `evaluation/<share>/<type>` for each type of question and for `all` questions.

    The loss is the mean over the supervised tokens of all records, truncated as in training. Generation uses the
    stage's prompt, keeps parameters sharded, and runs in the training precision.

    Args:
        options: the stage's.
        records: the evaluation set, the same on every rank; see `ssmvl.evaluation.runner.require_answerable`.
        processor: the stage's.
        recipe: the run's.
    """

    def __init__(
        self, options: StageEvaluation, records: Sequence[Mapping[str, Any]], processor: Processor, recipe: Recipe
    ) -> None:
        self._options, self._records, self._processor, self._recipe = options, records, processor, recipe
        ends = {Event.BATCH_END, Event.EPOCH_END}
        self._due = create_interval_scheduler(options.interval, checkpoint_events=False, final_events=ends)
        self._questions = one_question_each(records)
        self._last_step = 0  # step of the last evaluation
        self._stoppers: list[EarlyStopper | ThresholdStopper] = []
        self._stopped = False  # whether early stopping ended the stage
        self._best: dict[str, list[float]] = {}  # per stopper, from the checkpoint: value, epoch and batch

    def fit_start(self, state: State, logger: Logger) -> None:
        """Restore early stopping, and register the methods that enter FSDP2 units."""
        self._stoppers = [c for c in state.callbacks if isinstance(c, EarlyStopper | ThresholdStopper)]
        for stopper in self._stoppers:
            if isinstance(stopper, EarlyStopper) and type(stopper).__name__ in self._best:
                best, epoch, batch = self._best[type(stopper).__name__]
                stopper.best, stopper.best_occurred = torch.tensor(best), Timestamp(epoch=int(epoch), batch=int(batch))
        if self._stopped and self._stoppers:  # the stage was killed after stopping, before its model was saved
            state.stop_training()
        for module in _model(state).modules():
            for name in ENTRIES if isinstance(module, FSDPModule) else ():
                if hasattr(module, name):
                    register_fsdp_forward_method(module, name)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of early stopping, which Composer does not save, as text; see `Identity.state_dict`."""
        best = {
            type(stopper).__name__: [float(stopper.best), at.epoch.value, at.batch.value]
            for stopper in self._stoppers
            if isinstance(stopper, EarlyStopper) and stopper.best is not None
            if (at := stopper.best_occurred) is not None
        }
        return {"stoppers": json.dumps({"best": best, "stopped": self._stopped})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of early stopping when the stage resumes."""
        saved = json.loads(state.get("stoppers", "{}"))
        self._best, self._stopped = saved.get("best", {}), saved.get("stopped", False)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Evaluate if due."""
        if self._due(state, Event.BATCH_END):
            self._evaluate(state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Evaluate if due."""
        if self._due(state, Event.EPOCH_END):
            self._evaluate(state, logger)

    def _evaluate(self, state: State, logger: Logger) -> None:
        if self._last_step == state.timestamp.batch.value:  # the end of an epoch follows that of its last step
            return
        self._last_step = state.timestamp.batch.value
        model = _model(state)
        with _evaluating(model), torch.no_grad(), get_precision_context(state.precision):
            losses = self._losses(model, state)
            assistant = _RankedAssistant(model.model, self._processor, self._recipe)
            answered = ask(assistant, self._questions, _own_indices(len(self._questions)), self._options)
        total, count = map(sum, zip(*_in_order(losses, len(self._records)), strict=True))
        answers = _in_order(answered, len(self._questions))
        rows = results(answers)
        if dist.get_global_rank() == 0:
            accuracy = ", ".join(f"{type_ or 'all'} {row['accuracy']:.1%}" for type_, row in rows.items())
            tqdm.write(f"evaluation after step {self._last_step}: loss {total / count:.4f}, accuracy: {accuracy}")
        metrics = {"evaluation/loss": total / count}
        for type_, row in rows.items():
            shares = dict(zip(SHARES, (row["accuracy"], row["blind"], row["swapped"]), strict=True))
            metrics |= {f"evaluation/{key}/{type_ or 'all'}": share for key, share in shares.items()}
        for key, field in zip(SHARES, ("seen", "blind", "swapped"), strict=True):
            correct = sum(getattr(answer, field) == answer.truth for answer in answers)
            metrics[f"evaluation/{key}/all"] = correct / len(answers)
        logger.log_metrics(metrics)
        self._notify_stoppers(metrics, state, logger)

    def _notify_stoppers(self, metrics: Mapping[str, float], state: State, logger: Logger) -> None:
        """Pass the metrics to early stopping. Every rank has the same metrics, so all ranks decide alike.

        Raises:
            RunError: a monitored metric is not among them.
        """
        for stopper in self._stoppers:
            if stopper.monitor not in metrics:
                name, known = type(stopper).__name__, ", ".join(metrics)
                raise RunError(f"{name} monitors an unknown metric {stopper.monitor!r}. Allowed: {known}")
        state.eval_metrics[LABEL] = {name: _Metric(value) for name, value in metrics.items()}
        duration = state.max_duration
        with patch.object(state, "_dataloader_label", LABEL):  # Composer calls them only in its own evaluation loop
            for stopper in self._stoppers:
                stopper.eval_end(state, logger)
        self._stopped = state.max_duration != duration

    def _losses(self, model: ComposerVLM, state: State) -> list[tuple[float, int]]:
        """Return the summed loss and the number of supervised tokens of each of this rank's records."""
        losses: list[tuple[float, int]] = []
        indices = _own_indices(len(self._records))
        for start in range(0, len(indices), self._options.batch):
            records = [self._records[index] for index in indices[start : start + self._options.batch]]
            encode = self._processor.encode
            batch = collate([encode(r["conversation"], r["images"], train=True) for r in records])
            outputs = model(state.device.batch_to_device(batch))
            each = F.cross_entropy(outputs["logits"].float(), outputs["labels"], reduction="none")
            counts = batch["num_labels"]
            losses += [(float(loss.sum()), count) for loss, count in zip(each.split(counts), counts, strict=True)]
        return losses


class _Metric:
    """A value with the interface of a Composer metric."""

    def __init__(self, value: float) -> None:
        self._value = value

    def compute(self) -> float:
        """Return the value."""
        return self._value


class _RankedAssistant(Assistant):
    """Assistant that takes the same number of steps, on inputs of the same length, on every rank."""

    def _padded(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        device = next(self.model.parameters()).device
        longest = torch.tensor(max(len(sample["ids"]) for sample in samples), device=device)
        dist.all_reduce(longest, reduce_operation="MAX")
        return pad(collate(samples), int(longest))

    def _ended(self, done: Tensor) -> bool:
        ended = done.all().int()
        dist.all_reduce(ended, reduce_operation="MIN")
        return bool(ended)


@contextmanager
def _evaluating(model: ComposerVLM) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()


def _own_indices(count: int) -> list[int]:
    """Return this rank's indices. All ranks get the same number, as sharding requires; the last index may repeat."""
    rank, world = dist.get_global_rank(), dist.get_world_size()
    return [min(index, count - 1) for index in range(rank, count + -count % world, world)]


def _in_order(own: list[Any], count: int) -> list[Any]:
    """Gather the items of all ranks in the order of the records, without repetitions."""
    parts = dist.all_gather_object(own)
    return [parts[index % len(parts)][index // len(parts)] for index in range(count)]


def _model(state: State) -> ComposerVLM:
    return cast(ComposerVLM, state.model.module if hasattr(state.model, "module") else state.model)
