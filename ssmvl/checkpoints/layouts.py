"""Layouts: tables of names between a file and a module, applied strictly, with a readable diff."""

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
Fitted = dict[str, list[Tensor]]  # by name of the module's tensor, the file's that are joined along the first axis


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the names of a file and of a module belong together.

    Attributes:
        part: what a file of this layout fills: a language model, an encoder, or a whole `VisionLanguageModel`.
        rules: patterns of the module's names -> patterns of the file's, the first that matches counts. Each `*` stands
            for the same text on both sides. Several names, of one shape, are joined along the first axis, as the
            parameters of a mixer's scan paths are.
        tied: names in the file whose tensor must equal one of the module's: heads that are the embedding.
        equal: names in the file whose tensors must be equal, because its config ties them.
        absent: prefixes of the module's names that files of this layout may lack; those keep their initial values.
        ignored: patterns of names in the file that are no weights, such as tables that a module makes itself.
        expects: attributes of the module by dotted name and the value each must equal: what the file's config says, or
            the release fixed, and shapes do not show.
        adapt: renames, resamples or filters a file's tensors for the built module, which may be on `meta`; the other
            attributes apply to what it returns. None if the tensors are used as they are.
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
        """Refuse a part that no model has."""
        if self.part not in PARTS:
            raise ContractError(f"part must be one of {', '.join(map(repr, PARTS))}, is {self.part!r}")

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

    def sources(self, module: nn.Module) -> dict[str, list[str]]:
        """The names in the file that fill each parameter and saved buffer of a module, each under its first name."""
        return self.table(_own(module)[0])

    def fit(self, module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> Fitted:
        """Compare a file with a module, which may be on `meta`.

        Returns:
            The file's tensors for each of the module's, by its name.

        Raises:
            CheckpointError: names, shapes or expected values differ. Lists every difference.
        """
        if self.adapt is not None:
            tensors = _adapted(self.adapt, tensors, module, source)
        expected, second = _own(module)
        table, problems = self.table(expected), self._unexpected(module)
        may_lack = tuple(f"{prefix}." for prefix in self.absent)
        fitted: Fitted = {}
        for name, tensor in expected.items():
            names = table.get(name, [])
            if name.startswith(may_lack) and not all(other in tensors for other in names or [""]):
                continue
            if not names:
                problems.append(f"missing {name} {tuple(tensor.shape)}")
            elif wrong := _differences(name, tensor, names, tensors):
                problems += wrong
            else:
                fitted[name] = [tensors[other] for other in names]
        for one, other in self.equal.items():
            if one in tensors and other in tensors and not _equal(tensors[one], tensors[other]):
                problems.append(f"{one} differs from {other}, but the config.json beside it ties them")
        tied = {**self.tied, **{self.table([name]).get(name, [name])[0]: own for name, own in second.items()}}
        for name in tensors.keys() - {name for names in table.values() for name in names}:
            if any(re.fullmatch(_pattern(pattern), name) for pattern in self.ignored):
                continue
            (same,) = table.get(tied.get(name, ""), [""])[:1]
            if same not in tensors:
                problems.append(f"surplus {name} {tuple(tensors[name].shape)}")
            elif not _equal(tensors[name], tensors[same]):
                problems.append(f"{name} differs from {same}, but the model has one tensor for both")
        if problems:
            shown = [short(problem) for problem in sorted(problems)[:20]] + (
                [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
            )
            raise CheckpointError(f"{source} does not fit the model:\n  " + "\n  ".join(shown))
        return fitted

    def check(self, module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
        """`fit`, for its errors."""
        self.fit(module, tensors, source)

    def load(self, module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
        """Copy a file's tensors into a module, cast to its dtypes.

        Raises:
            CheckpointError: names, shapes or expected values differ; nothing was copied. Lists every difference.
        """
        copy_fitted(module, self.fit(module, tensors, source))

    def _unexpected(self, module: nn.Module) -> list[str]:
        own = {}
        for name in self.expects:
            with suppress(AttributeError):
                own[name] = attrgetter(name)(module)
        return differing(own, self.expects)


def need(config: Mapping[str, Any], keys: Iterable[str], kind: str) -> None:
    """Demand what a layout reads from the `config.json` beside a file, where shapes alone leave it open.

    Args:
        config: as the layout is given it.
        keys: that must be there.
        kind: of the file, for the message.

    Raises:
        CheckpointError: a key is missing, or there is no `config.json`; `open_weights` adds the name of the file.
    """
    missing = [key for key in keys if key not in config]
    if missing:
        what = f"lacks {', '.join(missing)}" if config else "is missing or empty"
        raise CheckpointError(
            f"the config.json beside it {what}, and the tensors of {kind} do not show everything; "
            "take it from where the weights came from"
        )


def copy_fitted(module: nn.Module, fitted: Fitted) -> None:
    """Copy the tensors that `Layout.fit` found for a module into it, or into its equal, cast to its dtypes."""
    own, _ = _own(module)
    with torch.no_grad():
        for name, parts in fitted.items():
            for target, part in zip(own[name].chunk(len(parts)) if len(parts) > 1 else [own[name]], parts, strict=True):
                target.copy_(part)


NATIVE_LAYOUT = Layout(part="model", rules={"*": ["*"]})  # our own


def ssmvl_model(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """The layout of what `save_pretrained` writes: the model's own names."""
    parts = {name.partition(".")[0] for name in names}  # a part may have no tensor, but the language model has
    ours = {"encoders", "fusion", "connector", "language"}
    return NATIVE_LAYOUT if "language" in parts and (parts <= ours or {"encoders", "connector"} <= parts) else None


def copy_into(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors under the module's own names into it, strictly, cast to the module's dtypes.

    Args:
        module: a name of its that is a second one for a tensor (a tied head) is not needed, but may be there.
        tensors: by name.
        source: where they came from, for messages.

    Raises:
        CheckpointError: names or shapes differ; nothing was copied. Lists every difference.
    """
    NATIVE_LAYOUT.load(module, tensors, source)


def _adapted(
    adapt: Callable[[dict[str, Tensor], Any], dict[str, Tensor]],
    tensors: Mapping[str, Tensor],
    module: nn.Module,
    source: str,
) -> dict[str, Tensor]:
    try:
        adapted = adapt(dict(tensors), module)
        if not isinstance(adapted, Mapping) or not all(isinstance(one, Tensor) for one in adapted.values()):
            raise ContractError(f"adapt must give tensors by name, gave {short(repr(adapted))}")
        return dict(adapted)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    except (Exception, SystemExit) as error:  # foreign code, which a file that does not fit may break anywhere
        raise CheckpointError(f"{source}: does not fit the model ({foreign(error)})") from error


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


def _equal(one: Tensor, other: Tensor) -> bool:
    """Without a copy where both have one dtype, as they nearly always do."""
    if one.dtype == other.dtype or one.is_complex() or other.is_complex():
        return one.dtype == other.dtype and torch.equal(one, other)
    return torch.equal(one.float(), other.float())


def _differences(name: str, tensor: Tensor, names: list[str], tensors: Mapping[str, Tensor]) -> list[str]:
    label = name if names == [name] else f"{name} (there {' + '.join(names)})"
    lacking = [other for other in names if other not in tensors]
    if lacking:
        return [f"missing {label} {tuple(tensor.shape)}"]
    parts = [tensors[other] for other in names]
    if tensor.is_floating_point() and not all(part.is_floating_point() for part in parts):
        return [f"{label} is {', '.join(str(part.dtype) for part in parts)}; quantised weights are not read"]
    if not tensor.is_floating_point() and any(part.dtype != tensor.dtype for part in parts):
        return [f"{label} is {', '.join(str(part.dtype) for part in parts)}, the model has {tensor.dtype}"]
    shape = list(parts[0].shape)
    if any(part.shape != parts[0].shape for part in parts):
        return [f"{label} are {', '.join(str(tuple(part.shape)) for part in parts)}; they must have one shape"]
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
