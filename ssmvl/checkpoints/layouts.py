"""Layouts: tables of names between a file and a module, applied strictly, with a readable diff."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssmvl.checkpoints.foreign import open_checkpoint
from ssmvl.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the names of a file and of a module belong together.

    Attributes:
        part: what a file of this layout fills: a language model, or a whole `VisionLanguageModel`.
        rules: patterns of the module's names -> patterns of the file's, the first that matches counts. Each `*` stands
            for the same text on both sides. Several names are joined along the first axis, as the parameters of a
            mixer's scan paths are.
        tied: names in the file whose tensor must equal one of the module's: heads that are the embedding.
        absent: prefixes of the module's names that files of this layout never hold.
        ignored: patterns of names in the file that are no weights, such as tables that a module makes itself.
        expects: attributes of the module by dotted name and the value each must have: what the file's config says and
            shapes do not show.
    """

    part: Literal["language", "model"]
    rules: Mapping[str, Sequence[str]]
    tied: Mapping[str, str] = field(default_factory=dict)
    absent: Sequence[str] = ()
    ignored: Sequence[str] = ()
    expects: Mapping[str, Any] = field(default_factory=dict)

    def table(self, ours: Iterable[str]) -> dict[str, list[str]]:
        """The names in the file for each of these names of the module that a rule covers."""
        rules = [(re.compile(_pattern(left)), right) for left, right in self.rules.items()]
        found = {}
        for name in ours:
            for left, right in rules:
                if match := left.fullmatch(name):
                    found[name] = [_fill(pattern, match.groups()) for pattern in right]
                    break
        return found

    def load(self, module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
        """Copy a file's tensors into a module, cast to its dtypes.

        Raises:
            CheckpointError: names, shapes or expected values differ; nothing was copied. Lists every difference.
        """
        expected, second = _own(module)
        table, problems = self.table(expected), self._unexpected(module)
        tied = {**self.tied, **{self.table([name]).get(name, [name])[0]: own for name, own in second.items()}}
        sources: dict[str, list[str]] = {}
        for name, tensor in expected.items():
            if name in table:
                sources[name] = table[name]
                problems += _differences(name, tensor, table[name], tensors)
            elif not name.startswith(tuple(f"{prefix}." for prefix in self.absent)):
                problems.append(f"missing {name} {tuple(tensor.shape)}")
        used = {name for names in sources.values() for name in names}
        for name in tensors.keys() - used:
            if any(re.fullmatch(_pattern(pattern), name) for pattern in self.ignored):
                continue
            (same,) = sources.get(tied.get(name, ""), [""])[:1]
            if same not in tensors:
                problems.append(f"surplus {name} {tuple(tensors[name].shape)}")
            elif not torch.equal(tensors[name].float(), tensors[same].float()):
                problems.append(f"{name} differs from {same}, but the model has one tensor for both")
        if problems:
            shown = sorted(problems)[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
            raise CheckpointError(f"{source} does not fit the model:\n  " + "\n  ".join(shown))
        with torch.no_grad():
            for name, names in sources.items():
                parts = [tensors[other] for other in names]
                sizes = [len(part) for part in parts] if len(parts) > 1 else []
                for target, part in zip(expected[name].split(sizes) if sizes else [expected[name]], parts, strict=True):
                    target.copy_(part)

    def _unexpected(self, module: nn.Module) -> list[str]:
        problems = []
        for name, value in self.expects.items():
            try:
                own = attrgetter(name)(module)
            except AttributeError:
                own = None
            if own != value:
                problems.append(f"{name} is {own!r}, the checkpoint's config says {value!r}")
        return problems


SAME = Layout(part="model", rules={"*": ["*"]})  # our own


def ssmvl_model(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """The layout of what `save_pretrained` writes: the model's own names."""
    ours = all(any(name.startswith(f"{part}.") for name in names) for part in ("encoders", "connector", "language"))
    return SAME if ours else None


def load_into(module: nn.Module, path: str | Path) -> None:
    """Copy a checkpoint that has the module's own names into it, strictly, cast to the module's dtypes.

    Raises:
        CheckpointError: it cannot be read, or names or shapes differ; nothing was copied. Lists every difference.
    """
    found = open_checkpoint(path)
    copy_into(module, found.tensors, found.source)


def copy_into(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors under the module's own names into it, strictly, cast to the module's dtypes.

    Args:
        module: a name of its that is a second one for a tensor (a tied head) is not needed, but may be there.
        tensors: by name.
        source: where they came from, for messages.

    Raises:
        CheckpointError: names or shapes differ; nothing was copied. Lists every difference.
    """
    SAME.load(module, tensors, source)


def _own(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and saved buffers, each under the first of its names; and its other names, with the first."""
    first: dict[int, str] = {}
    own, second = {}, {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) == name:
            own[name] = tensor
        else:
            second[name] = first[id(tensor)]
    return own, second


def _differences(name: str, tensor: Tensor, names: list[str], tensors: Mapping[str, Tensor]) -> list[str]:
    label = name if names == [name] else f"{name} (there {' + '.join(names)})"
    lacking = [other for other in names if other not in tensors]
    if lacking:
        return [f"missing {label} {tuple(tensor.shape)}"]
    parts = [tensors[other] for other in names]
    if tensor.is_floating_point() and not all(part.is_floating_point() for part in parts):
        return [f"{label} is {', '.join(str(part.dtype) for part in parts)}; quantised weights are not read"]
    shape = list(parts[0].shape)
    if len(parts) > 1 and all(part.ndim and part.shape[1:] == parts[0].shape[1:] for part in parts):
        shape[0] = sum(len(part) for part in parts)
    if shape != list(tensor.shape):
        return [f"{label} is {tuple(shape)}, the model has {tuple(tensor.shape)}"]
    return []


def _pattern(text: str) -> str:
    return "(.+?)".join(re.escape(part) for part in text.split("*"))


def _fill(pattern: str, texts: Sequence[str]) -> str:
    parts = pattern.split("*")
    return parts[0] + "".join(text + part for text, part in zip(texts, parts[1:], strict=True))
