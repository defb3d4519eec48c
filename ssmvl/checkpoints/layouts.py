"""Layouts: tables that map names in a file to names in a module, applied strictly, with a readable diff."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssmvl.checkpoints.modules import differing
from ssmvl.errors import CheckpointError, ContractError, foreign, short

PARTS = ("language", "encoder", "model")
Fitted = dict[str, list[Tensor]]  # name in the module -> tensors of the file, to be joined along the first axis


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Mapping between the tensor names of a file and of a module.

    Attributes:
        part: part of the model that such a file fills: a language model, an encoder, or a `VisionLanguageModel`.
        rules: patterns of the module's names -> patterns of the file's names; the first match applies. Each `*` matches
            the same text on both sides. Several names on the right must have equal shapes and are joined along the
            first axis, like the parameters of a mixer's scan paths.
        tied: names in the file -> names in the module; the tensors must be equal, as for a head tied to the embedding.
        equal: pairs of names in the file whose tensors must be equal because its config ties them.
        absent: prefixes of the module's names that may be missing from the file; those keep their initial values.
        ignored: patterns of names in the file that are not weights, such as tables that a module computes itself.
        expects: attributes of the module, by dotted name, and their required values. They come from the file's config,
            or are fixed in the release, and cannot be inferred from shapes.
        adapt: (tensors, module) -> tensors; renames, resamples or filters the file's tensors for a module, which may be
            on `meta`. All other attributes apply to its result. None to use the tensors unchanged.
    """

    part: Literal["language", "encoder", "model"]
    rules: Mapping[str, Sequence[str]]
    tied: Mapping[str, str] = field(default_factory=dict)
    equal: Mapping[str, str] = field(default_factory=dict)
    absent: Sequence[str] = ()
    ignored: Sequence[str] = ()
    expects: Mapping[str, Any] = field(default_factory=dict)
    adapt: Callable[[dict[str, Tensor], Any], dict[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        """Reject an unknown part."""
        if self.part not in PARTS:
            raise ContractError(f"part must be one of {', '.join(map(repr, PARTS))}, received {self.part!r}")

    def table(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Map names of the module to names in the file. Names that match no rule are omitted."""
        rules = [(re.compile(_pattern(left)), right) for left, right in self.rules.items()]
        table = {}
        for name in names:
            for left, right in rules:
                if match := left.fullmatch(name):
                    table[name] = [_fill(pattern, match.groups()) for pattern in right]
                    break
        return table

    def sources(self, module: nn.Module) -> dict[str, list[str]]:
        """Map each parameter and persistent buffer of a module, under its first name, to names in the file."""
        return self.table(_own(module)[0])

    def fit(self, module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> Fitted:
        """Compare a file with a module, which may be on `meta`.

        Returns:
            For each tensor of the module, by name, the file's tensors that fill it.

        Raises:
            CheckpointError: names, shapes or expected values differ. Lists every difference.
        """
        if self.adapt is not None:
            tensors = _adapt(self.adapt, tensors, module, source)
        expected, aliases = _own(module)
        table, problems = self.table(expected), self._unexpected(module)
        optional = tuple(f"{prefix}." for prefix in self.absent)
        fitted: Fitted = {}
        for name, tensor in expected.items():
            names = table.get(name, [])
            if name.startswith(optional) and not all(other in tensors for other in names or [""]):
                continue
            if not names:
                problems.append(f"missing {name} {tuple(tensor.shape)}")
            elif differences := _differences(name, tensor, names, tensors):
                problems += differences
            else:
                fitted[name] = [tensors[other] for other in names]
        for one, other in self.equal.items():
            if one in tensors and other in tensors and not _equal(tensors[one], tensors[other]):
                problems.append(f"{one} differs from {other}, but config.json ties them")
        tied = {**self.tied, **{self.table([alias]).get(alias, [alias])[0]: own for alias, own in aliases.items()}}
        for name in tensors.keys() - {name for names in table.values() for name in names}:
            if any(re.fullmatch(_pattern(pattern), name) for pattern in self.ignored):
                continue
            (original,) = table.get(tied.get(name, ""), [""])[:1]
            if original not in tensors:
                problems.append(f"unexpected {name} {tuple(tensors[name].shape)}")
            elif not _equal(tensors[name], tensors[original]):
                problems.append(f"{name} differs from {original}, but the model has one tensor for both")
        if problems:
            shown = [short(problem) for problem in sorted(problems)[:20]] + (
                [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
            )
            raise CheckpointError(f"{source} does not fit the model:\n  " + "\n  ".join(shown))
        return fitted

    def check(self, module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
        """Check that a file fits a module. Raises the errors of `fit`."""
        self.fit(module, tensors, source)

    def load(self, module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
        """Copy a file's tensors into a module, cast to its dtypes.

        Raises:
            CheckpointError: names, shapes or expected values differ; nothing is copied. Lists every difference.
        """
        copy_fitted(module, self.fit(module, tensors, source))

    def _unexpected(self, module: nn.Module) -> list[str]:
        own = {}
        for name in self.expects:
            with suppress(AttributeError):
                own[name] = attrgetter(name)(module)
        return differing(own, self.expects)


def need(config: Mapping[str, Any], keys: Iterable[str], kind: str) -> None:
    """Require keys of a file's `config.json` that a layout cannot infer from shapes.

    Args:
        config: the config passed to the layout.
        keys: required keys.
        kind: kind of file, for the message.

    Raises:
        CheckpointError: a key is missing, or there is no `config.json`. `open_weights` adds the name of the file.
    """
    missing = [key for key in keys if key not in config]
    if missing:
        problem = f"lacks {', '.join(missing)}" if config else "is missing or empty"
        raise CheckpointError(
            f"its config.json {problem}, but the tensors of {kind} alone do not determine the model; "
            "copy config.json from the source of the weights"
        )


def copy_fitted(module: nn.Module, fitted: Fitted) -> None:
    """Copy the result of `Layout.fit` into that module or one with the same tensors, cast to its dtypes."""
    own, _ = _own(module)
    with torch.no_grad():
        for name, parts in fitted.items():
            for target, part in zip(own[name].chunk(len(parts)) if len(parts) > 1 else [own[name]], parts, strict=True):
                target.copy_(part)


NATIVE_LAYOUT = Layout(part="model", rules={"*": ["*"]})  # the model's own names


def ssmvl_model(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """Layout of the files that `save_pretrained` writes: the model's own names."""
    parts = {name.partition(".")[0] for name in names}  # only the language model always has tensors
    model_parts = {"encoders", "fusion", "connector", "language"}
    is_model = "language" in parts and (parts <= model_parts or {"encoders", "connector"} <= parts)
    return NATIVE_LAYOUT if is_model else None


def copy_into(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors with the module's own names into it, strictly, cast to the module's dtypes.

    Args:
        module: target. The second name of a tied tensor (such as a head's) is optional in `tensors`.
        tensors: by name.
        source: origin of the tensors, for messages.

    Raises:
        CheckpointError: names or shapes differ; nothing is copied. Lists every difference.
    """
    NATIVE_LAYOUT.load(module, tensors, source)


def _adapt(
    adapt: Callable[[dict[str, Tensor], Any], dict[str, Tensor]],
    tensors: Mapping[str, Tensor],
    module: nn.Module,
    source: str,
) -> dict[str, Tensor]:
    try:
        adapted = adapt(dict(tensors), module)
        if not isinstance(adapted, Mapping) or not all(isinstance(value, Tensor) for value in adapted.values()):
            raise ContractError(f"adapt must return a mapping of tensors, returned {short(repr(adapted))}")
        return dict(adapted)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    except (Exception, SystemExit) as error:  # third-party code may raise anything on a file that does not fit
        raise CheckpointError(f"{source}: does not fit the model ({foreign(error)})") from error


def _own(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return parameters and persistent buffers by their first name, and a mapping of other names to first names."""
    first: dict[int, str] = {}
    own, aliases = {}, {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) == name:
            own[name] = tensor
        else:
            aliases[name] = first[id(tensor)]
    return own, aliases


def _equal(one: Tensor, other: Tensor) -> bool:
    """Compare values. In the usual case of equal dtypes nothing is copied."""
    if one.dtype == other.dtype or one.is_complex() or other.is_complex():
        return one.dtype == other.dtype and torch.equal(one, other)
    return torch.equal(one.float(), other.float())


def _differences(name: str, tensor: Tensor, names: list[str], tensors: Mapping[str, Tensor]) -> list[str]:
    label = name if names == [name] else f"{name} (in the file: {' + '.join(names)})"
    if any(other not in tensors for other in names):
        return [f"missing {label} {tuple(tensor.shape)}"]
    parts = [tensors[other] for other in names]
    if tensor.is_floating_point() and not all(part.is_floating_point() for part in parts):
        return [f"{label} is {', '.join(str(part.dtype) for part in parts)}; quantized weights are not supported"]
    if not tensor.is_floating_point() and any(part.dtype != tensor.dtype for part in parts):
        return [f"{label} is {', '.join(str(part.dtype) for part in parts)}, the model has {tensor.dtype}"]
    shape = list(parts[0].shape)
    if any(part.shape != parts[0].shape for part in parts):
        return [f"{label} have shapes {', '.join(str(tuple(part.shape)) for part in parts)}; all must be equal"]
    if len(parts) > 1 and shape:
        shape[0] *= len(parts)
    if shape != list(tensor.shape):
        return [f"{label} is {tuple(shape)}, the model has {tuple(tensor.shape)}"]
    return []


def _pattern(text: str) -> str:
    return "(.+?)".join(re.escape(part) for part in text.split("*"))


def _fill(pattern: str, texts: Sequence[str]) -> str:
    parts = pattern.split("*")
    return parts[0] + "".join(text + part for text, part in zip(texts, parts[1:], strict=True))
