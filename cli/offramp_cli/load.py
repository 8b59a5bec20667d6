"""Sends the demo's test images over HTTP, open loop, under one policy after another."""

import io
from dataclasses import dataclass
from typing import Self

import httpx
import numpy as np
from offramp_loadtest import Payload, Phase, Scenario, run

from offramp_cli.measure import Asked, Measured


@dataclass(frozen=True, slots=True)
class DigitsLoad:
    """The load of one measurement: labelled images, and when they are due.

    Attributes:
        url: The server.
        scenario: Rate, duration, seed; the routing fields are each measurement's own.
        payloads: The images, as files.
        exit_names: The model's exits, in order.
    """

    url: str
    scenario: Scenario
    payloads: tuple[Payload, ...]
    exit_names: tuple[str, ...]

    @classmethod
    def of_test_images(cls, url: str, model: str, *, num_images: int, rate: float, seed: int) -> Self:
        """Take test images of the digits, in the split of a seed, and learn the model's exits from the server."""
        from offramp_models import load_data

        test = load_data("digits", seed).test
        described = httpx.get(f"{url}/v1/models/{model}", trust_env=False).raise_for_status().json()
        return cls(
            url,
            Scenario(model=model, phases=(Phase(seconds=num_images / rate, rate=rate),), seed=seed),
            tuple(
                Payload(int(label), image=_png(pixels_HW), content_type="image/png")
                for pixels_HW, label in zip(test.pixels_NHW[:num_images], test.labels_N[:num_images], strict=True)
            ),
            tuple(exit_["name"] for exit_ in described["exits"]),
        )

    @property
    def rate(self) -> float:
        """Requests per second, on average."""
        return self.scenario.phases[0].rate or 0.0

    def send(self, asked: Asked) -> Measured:
        """Send the images as one policy and budget ask for."""
        scenario = self.scenario.changed(fields=dict(asked.query))
        summary = run(self.url, scenario, self.payloads).summary
        num_answered = summary.outcomes.get("ok", 0)
        return Measured(
            asked=asked,
            num_answered=num_answered,
            num_failed=summary.arrivals - num_answered,
            accuracy=summary.accuracy or 0.0,
            mean_depth=summary.mean_depth or 0.0,
            p50_ms=summary.latency_ms.get("p50", np.nan),
            p99_ms=summary.latency_ms.get("p99", np.nan),
            forced=summary.forced or 0.0,
            exit_counts_E=tuple(summary.exits.get(name, 0) for name in self.exit_names),
        )

    def idle_ms(self, asked: Asked, num_requests: int = 40) -> float:
        """Give the median latency of requests sent one after another: what the answer costs when nobody waits."""
        path = f"/v1/models/{self.scenario.model}/classify"
        with httpx.Client(base_url=self.url, trust_env=False) as client:
            seconds = [
                client.post(path, params=dict(asked.query), content=payload.image, headers=_PNG).elapsed.total_seconds()
                for payload in self.payloads[:num_requests]
            ]
        return float(np.median(seconds)) * 1e3


_PNG = {"content-type": "image/png"}


def _png(pixels_HW: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels_HW).save(file, "PNG")
    return file.getvalue()
