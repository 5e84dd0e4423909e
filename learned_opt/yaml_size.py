"""Refuses YAML whose aliases expand to too many values, before anything is built from it."""

from __future__ import annotations

import math

import yaml

MOST = 100_000  # values in a file; the largest of configs/ has hundreds


def check_size(text: str) -> None:
    """Raises yaml.YAMLError if `text` has too many values once its aliases are expanded.

    A few lines of aliases of aliases can stand for billions of values ("billion laughs"). Loading
    them is cheap, because the values are shared, but every copy and message writes them all out.
    """
    try:
        count = _count(yaml.compose(text, yaml.SafeLoader), {})
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply; no setting needs that") from None
    if count > MOST:
        values = "infinitely many values" if math.isinf(count) else f"{count:.3g} values"
        raise yaml.YAMLError(
            f"it has {values} once its aliases (*) are followed, and at most {MOST} are allowed"
        )


def _count(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Returns the number of values in `node` with aliases expanded.

    It is infinite if `node` contains itself.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # for an alias of the node within itself
        inner = node.value
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_count(part, known) for part in inner)
    return known[id(node)]
