"""YAML text -> plain data, with the scalars of YAML 1.2. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml import YAMLError
from yaml.constructor import ConstructorError

# Core schema of YAML 1.2. YAML 1.1 reads `yes` as true, `010` as 8, `1:30` as 90 and `1e-4` as text.
SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": (r"-?[1-9][0-9]*|0", "-0123456789"),
    "float": (
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}


DEPTH = 100


class _Loader(yaml.SafeLoader):
    """Loader that resolves the scalars in `SCALARS` only."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1 and key != "<<":
                raise ConstructorError("in a mapping", node.start_mark, f"found duplicate key {key}", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def parse(text: str) -> Any:
    """Parse one YAML document; an empty document gives `{}`.

    Only `true` and `false` are booleans, only decimal digits without leading zeros are integers, and `1e-4` is a float.
    Everything else, such as `yes`, `010` and `1:30`, is text; binding converts it where a boolean or a number is
    expected. Interpolations are kept as text.

    Raises:
        YAMLError: the text is not valid YAML, or a mapping has a duplicate key.
    """
    try:
        data = yaml.load(text, Loader=_Loader)  # a SafeLoader
        _require_depth(data, DEPTH)
    except RecursionError as error:
        raise YAMLError(f"the document is nested more than {DEPTH} levels deep, or is cyclic") from error
    return {} if data is None and not text.strip() else data


def _require_depth(node: Any, left: int) -> None:
    if not left:
        raise RecursionError
    for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _require_depth(item, left - 1)
