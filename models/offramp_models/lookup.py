"""How a name becomes what it stands for: networks, exits, training methods and data sets are chosen by name."""

from collections.abc import Mapping
from typing import TypeVar

Thing = TypeVar("Thing")


def look_up(registry: Mapping[str, Thing], what: str, name: str) -> Thing:
    """Give what a registry holds under a name.

    Args:
        registry: What there is.
        what: What its entries are, for the message.
        name: What is asked for.

    Raises:
        ValueError: If there is none of that name; the message lists those there are.
    """
    if name not in registry:
        raise ValueError(f"{what} {name!r} is not one of {', '.join(sorted(registry))}")
    return registry[name]
