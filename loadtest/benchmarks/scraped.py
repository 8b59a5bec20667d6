"""A server's `/metrics` at one moment."""

from collections.abc import Mapping
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Scraped:
    """What a server counts.

    Attributes:
        samples: Name, labels and value of every series.
    """

    samples: tuple[tuple[str, Mapping[str, str], float], ...]

    @classmethod
    def of(cls, url: str) -> "Scraped":
        """Ask a server.

        Raises:
            httpx.HTTPError: If it does not answer.
        """
        text = httpx.get(f"{url}/metrics", trust_env=False, timeout=TIMEOUT_S).raise_for_status().text
        families = text_string_to_metric_families(text)
        return cls(tuple((one.name, one.labels, one.value) for family in families for one in family.samples))

    def total(self, name: str) -> float:
        """Add up all series of a name."""
        return sum(value for found, _, value in self.samples if found == name)

    def by(self, label: str, name: str) -> dict[str, float]:
        """Add up the series of a name, by one of their labels."""
        sums: dict[str, float] = {}
        for found, labels, value in self.samples:
            if found == name:
                sums[labels[label]] = sums.get(labels[label], 0.0) + value
        return sums


def grown(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Give by how much each number has grown."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}
