"""Gears over HTTP: what a request is told of them, and which requests they leave alone."""

import math
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from offramp_contract.calibration import Certificate, OperatingPoint
from offramp_contract.errors import InvalidValue
from offramp_contract.policy_spec import ConfidenceSpec, FixedSpec
from offramp_runtime import open_bundle, open_device
from offramp_server.engine import Engine
from offramp_server.engine_settings import EngineSettings
from offramp_server.fields import NoLimits, read_routing
from offramp_server.messages import RequestOptions
from offramp_server.row_costs import RowCost
from offramp_server.settings import ServerSettings
from offramp_server.submission import Waiter

ROW = [0.5, 0.0, 0.0, 0.0]
"""p_max at the three exits: 0.35, 0.98, 1."""
GEARS = (None, "sure", "early")


def certified(kind: str, bound: float) -> Certificate:
    return Certificate.model_validate(
        {"kind": kind, "method": "ltt", "bound": bound, "delta": 0.05, "num_samples": 400, "data_digest": "0" * 64}
    )


POINTS = (
    OperatingPoint(
        name="hasty", policy=ConfidenceSpec(threshold=0.1), compute=0.35, accuracy=0.7, exit_rates=(1.0, 0.0, 0.0),
        certificates=(certified("accuracy", 0.65),),
    ),
    OperatingPoint(
        name="early", policy=ConfidenceSpec(threshold=0.3), compute=0.4, accuracy=0.85, exit_rates=(0.9, 0.05, 0.05),
        certificates=(certified("accuracy", 0.82), certified("consistency", 0.1)),
    ),
    OperatingPoint(
        name="sure", policy=ConfidenceSpec(threshold=0.95), compute=0.8, accuracy=0.95, exit_rates=(0.1, 0.4, 0.5),
        certificates=(certified("accuracy", 0.92), certified("consistency", 0.03)),
    ),
    OperatingPoint(
        name="full", policy=FixedSpec(exit=2), compute=1.0, accuracy=0.96, exit_rates=(0.0, 0.0, 1.0),
        certificates=(certified("accuracy", 0.93), certified("consistency", 0.0)),
    ),
)  # fmt: skip


class Held:
    """A gear that stays where a test puts it."""

    def __init__(self) -> None:
        self.gear = 0

    def at(self, now: float) -> int:
        return self.gear

    def observe(self, wait_s: float, budget_s: float, load: float, now: float) -> int:
        return self.gear


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle(name="geared", operating_points=POINTS)


@pytest.fixture(scope="module")
def geared(serve: Any, bundle: Path) -> Any:
    """A server whose model may go down to an accuracy of 0.8."""
    return serve(bundle, gear_floor_accuracy=0.8)


@pytest.fixture
def held(geared: Any) -> Iterator[Held]:
    served, held = geared.engine.models[0], Held()
    own, served.gears = served.gears, held
    yield held
    served.gears = own


def ask(server: Any, **fields: Any) -> Any:
    answer = server.client.post("/v1/classify", json={"inputs": ROW, **fields})
    assert answer.status_code == 200, answer.text
    return answer


def free_options(served: Any) -> RequestOptions:
    """Route as a request that chooses nothing."""
    return read_routing({}, served.manifest, served.calibration, NoLimits()).options


@pytest.mark.parametrize(("gear", "exit_index", "bound"), [(0, 1, None), (1, 1, 0.92), (2, 0, 0.82)])
def test_an_answer_says_its_gear_and_what_that_gear_is_certified_for(
    geared: Any, held: Held, gear: int, exit_index: int, bound: float | None
) -> None:
    held.gear = gear
    answer = ask(geared)
    policy = answer.json()["policy"]
    assert (policy["gear"], policy["operating_point"]) == (gear, GEARS[gear])
    assert (policy["certified"] or {}).get("bound") == bound
    assert answer.json()["predictions"][0]["exit"]["index"] == exit_index
    assert answer.headers["x-gear"] == str(gear)


def test_a_stream_ends_in_an_answer_that_says_its_gear(geared: Any, held: Held) -> None:
    held.gear = 2
    with geared.client.stream(
        "POST", "/v1/classify", json={"inputs": ROW}, headers={"accept": "text/event-stream"}
    ) as events:
        text = events.read().decode()
    assert '"operating_point":"early"' in text
    assert '"gear":2' in text


@pytest.mark.parametrize(
    "fields",
    [
        {"policy": "entropy"},
        {"threshold": 0.95},
        {"operating_point": "full"},
        {"compute": 0.9},
        {"accuracy": 0.9},
        {"risk": {"epsilon": 0.05, "delta": 0.05}},
    ],
)
def test_a_request_that_chooses_for_itself_is_never_touched(geared: Any, held: Held, fields: dict[str, Any]) -> None:
    held.gear = 0
    before = ask(geared, **fields)
    held.gear = 2
    after = ask(geared, **fields)
    assert after.json()["policy"] == before.json()["policy"]
    assert after.json()["predictions"] == before.json()["predictions"]
    assert after.json()["policy"]["gear"] is None
    assert "x-gear" not in after.headers


def test_what_a_request_leaves_open_beside_other_wishes_is_the_gears_to_choose(geared: Any, held: Held) -> None:
    held.gear = 2
    answer = ask(geared, latency_ms=5000, top_k=1, explain=True, min_exit=1).json()
    assert answer["policy"]["operating_point"] == "early"
    assert answer["predictions"][0]["exit"]["index"] == 1


def test_clients_of_v2_find_the_gear_among_the_parameters(geared: Any, held: Held) -> None:
    held.gear = 2
    tensor = triton.InferInput("x", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.array([ROW], dtype=np.float32))
    with triton.InferenceServerClient(geared.url.removeprefix("http://")) as client:
        free = client.infer("geared", [tensor]).get_response()
        own = client.infer("geared", [tensor], parameters={"policy": "entropy"}).get_response()
    assert free["parameters"]["gear"] == 2
    assert free["parameters"]["operating_point"] == "early"
    assert free["parameters"]["certified_bound"] == 0.82
    assert "parameters" not in own


def test_a_model_lists_its_gears_from_what_requests_get_to_the_cheapest_above_the_floor(
    geared: Any, held: Held
) -> None:
    held.gear = 1
    described = geared.client.get("/v1/models/geared").json()
    assert described["gear"] == 1
    gears = described["gears"]
    assert [(gear["gear"], gear["operating_point"]) for gear in gears] == list(enumerate(GEARS))
    assert [gear["compute"] for gear in gears] == [None, 0.8, 0.4]
    assert [gear["accuracy"] for gear in gears] == [None, 0.95, 0.85]
    assert [[one["bound"] for one in gear["certificates"]] for gear in gears] == [[], [0.92], [0.82]]
    assert all(gear["expected_ms"] > 0 for gear in gears)


def test_metrics_show_the_gear_and_count_requests_by_it(geared: Any, held: Held) -> None:
    def scraped() -> dict[str, float]:
        text = geared.client.get("/metrics").text
        found = re.findall(r'^offramp_gear(?:_requests_total)?\{(?:.*gear="(\d)")?.*\} (\S+)$', text, re.MULTILINE)
        return {gear or "now": float(value) for gear, value in found}

    before = scraped()
    held.gear = 2
    ask(geared)
    ask(geared, policy="entropy")
    held.gear = 1
    ask(geared)
    after = scraped()
    assert before.keys() == after.keys() == {"0", "1", "2", "now"}
    assert {gear: after[gear] - before[gear] for gear in "012"} == {"0": 0, "1": 1, "2": 1}
    assert after["now"] == 1


def test_gear_0_is_the_operators_default_point(serve: Any, bundle: Path) -> None:
    folder = bundle.parent / "repository"
    folder.mkdir()
    (folder / "geared").symlink_to(bundle)
    server = serve(folder=folder, gear_floor_risk=0.2, default_operating_point="sure")
    gears = server.client.get("/v1/models/geared").json()["gears"]
    assert [gear["operating_point"] for gear in gears] == ["sure", "early"]
    assert ask(server).json()["policy"]["gear"] == 0


@pytest.mark.parametrize("settings", [{}, {"gears": False, "gear_floor_accuracy": 0.8}])
def test_without_a_floor_or_with_gears_off_there_are_none(serve: Any, bundle: Path, settings: dict[str, Any]) -> None:
    server = serve(bundle, **settings)
    described = server.client.get("/v1/models/geared").json()
    assert (described["gear"], described["gears"]) == (None, [])
    assert ask(server).json()["policy"]["gear"] is None


def test_gears_that_are_asked_for_without_a_floor_stop_the_start() -> None:
    with pytest.raises(InvalidValue, match="gears need a floor: set gear_floor_accuracy or gear_floor_risk"):
        ServerSettings.load(gears=True)
    assert ServerSettings.load(gears=True, gear_floor_risk=0.1).engine_settings().gear_floor_risk == 0.1


def test_a_real_backlog_shifts_up_and_who_comes_next_is_served_by_a_cheaper_point(bundle: Path) -> None:
    """Rows wait behind a stage that the test holds; without deadlines, the longest wait allowed is what presses."""
    settings = EngineSettings(warm_up_s=0.1, gear_floor_accuracy=0.8, default_latency_ms=None, max_wait_ms=1e-3)
    with Engine(open_device("cpu", 1), settings) as engine:
        served = engine.add_model(open_bundle(bundle))
        own = served.costs.of
        served.costs.of = lambda gear: own(gear)._replace(taken_s=0.0)  # type: ignore[method-assign]  # refuses nobody
        go_on, run = threading.Event(), served.executor.run

        def held_run(*args: Any) -> Any:
            go_on.wait(30)
            return run(*args)

        served.executor.run = held_run  # type: ignore[method-assign]
        waiters = [Waiter() for _ in range(64)]
        inputs = {"x": np.array([ROW], dtype=np.float32)}
        for waiter in waiters:
            engine.submit(served, inputs, free_options(served), waiter)
        assert engine.gear_of(served) == 2
        go_on.set()
        results = [waiter.result.result(30) for waiter in waiters]
    gears = [result.gear for result in results]
    assert gears == sorted(gears, key=lambda gear: gear or 0)
    assert (gears[0], gears[-1]) == (0, 2)
    exits = {result.gear: result.rows[0].answer.exit_index for result in results}  # type: ignore[union-attr]
    assert (exits[0], exits[2]) == (1, 0)


def test_429_says_in_whole_seconds_when_to_come_back(serve: Any, bundle: Path) -> None:
    server = serve(bundle, max_wait_ms=1.0)
    served = server.engine.models[0]
    served.costs.of = lambda gear: RowCost(2.4, 2.4, 0.0)
    waiting, _ = server.engine._admission.admit(served, 1, free_options(served), math.inf, now=0.0)
    refused = server.client.post("/v1/classify", json={"inputs": ROW})
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "3"
    assert refused.json()["retry_after_s"] == pytest.approx(2.399)
    server.engine._admission.release(waiting, 1)
    assert server.client.post("/v1/classify", json={"inputs": ROW}).status_code == 200
