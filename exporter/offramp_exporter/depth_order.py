"""The order of the exits, read off what they depend on: of two exits, the deeper needs all that the other needs."""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from itertools import pairwise
from typing import Final

from offramp_exporter.program import Program

_MANY_MORE: Final = 2
"""Of two exits the first counts as the deeper where it has more than so many times the other's own layers."""


def in_order_of_depth(program: Program) -> Program:
    """Put a program's exits in the order of their depth, if their dependencies say that they stand in another."""
    needs = {name: _upstream(program, scores) for name, scores in program.exits.items()}
    weighed = {i for i, node in enumerate(program.nodes) if any(name in program.initializers for name in node.input)}
    order = order_by_depth(needs, weighed)
    return replace(program, exits={name: program.exits[name] for name in order})


def order_by_depth(needs: Mapping[str, Set[int]], layers: Set[int]) -> list[str]:
    """Order exits by the part of the network that they share with others.

    Args:
        needs: The nodes that each exit needs.
        layers: The nodes that hold weights.

    Returns:
        The names. The order stays as it is where the shared parts do not lie one in the other.
    """
    names = list(needs)
    counts = Counter(node for nodes in needs.values() for node in nodes)
    trunks = {name: {node for node in nodes if counts[node] > 1} for name, nodes in needs.items()}
    own = [len((needs[name] - trunks[name]) & layers) for name in names]
    if _nest(names, trunks):
        return names[::-1] if len(names) == 2 and own[0] > _MANY_MORE * own[1] else names
    # Two exits may share the whole trunk, the final one and the one before; then the final-first order decides.
    final_last = [*names[1:], names[0]] if own[0] >= own[-1] else names
    candidates = (final_last, names[::-1], sorted(names, key=lambda name: len(trunks[name])))
    return next((order for order in candidates if _nest(order, trunks)), names)


def _nest(order: Sequence[str], trunks: Mapping[str, Set[int]]) -> bool:
    return all(trunks[shallow] <= trunks[deep] for shallow, deep in pairwise(order))


def _upstream(program: Program, value: str) -> frozenset[int]:
    found: set[int] = set()
    open_values = [value]
    while open_values:
        i = program.producer.get(open_values.pop())
        if i is not None and i not in found:
            found.add(i)
            open_values.extend(program.nodes[i].input)
    return frozenset(found)
