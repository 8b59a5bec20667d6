"""A calibrated bundle, asked over HTTP for what is wanted of the answer instead of for a threshold."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from offramp_contract.calibration import Certificate, OperatingPoint
from offramp_contract.errors import BundleError, InvalidValue
from offramp_contract.policy_spec import ConfidenceSpec, EntropySpec, FixedSpec
from offramp_runtime import open_device
from offramp_server.engine import Engine
from offramp_server.engine_settings import EngineSettings
from offramp_server.repository import Repository
from offramp_server.settings import ServerSettings

NPY = {"content-type": "application/x-npy"}
ROW = [0.5, 0.0, 0.0, 0.0]
"""p_max at the three exits (gains 1, 10, 100): 0.35, 0.98, 1."""


def certificate(kind: str, bound: float, delta: float | None = 0.05) -> Certificate:
    method = "ltt" if delta is not None else "crc"
    return Certificate.model_validate(
        {"kind": kind, "method": method, "bound": bound, "delta": delta, "num_samples": 400, "data_digest": "0" * 64}
    )


POINTS = (
    OperatingPoint(
        name="early", policy=ConfidenceSpec(threshold=0.3), compute=0.4, accuracy=0.8, exit_rates=(0.9, 0.05, 0.05),
        certificates=(certificate("accuracy", 0.75),),
    ),
    OperatingPoint(
        name="middle", policy=EntropySpec(threshold=0.5), compute=0.6, accuracy=0.9, exit_rates=(0.3, 0.5, 0.2),
    ),
    OperatingPoint(
        name="sure", policy=ConfidenceSpec(threshold=0.9), compute=0.8, accuracy=0.95, exit_rates=(0.1, 0.4, 0.5),
        certificates=(
            certificate("accuracy", 0.92), certificate("consistency", 0.03), certificate("consistency", 0.02, None),
        ),
    ),
    OperatingPoint(
        name="full", policy=FixedSpec(exit=2), compute=1.0, accuracy=0.96, exit_rates=(0.0, 0.0, 1.0),
        certificates=(
            certificate("accuracy", 0.93), certificate("consistency", 0.0), certificate("consistency", 0.0, None),
        ),
    ),
)  # fmt: skip


@pytest.fixture
def cpu_engine() -> Iterator[Engine]:
    with Engine(open_device("cpu", 1), EngineSettings(warm_up_s=0.1)) as engine:
        yield engine


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle(name="knowing", operating_points=POINTS)


@pytest.fixture(scope="module")
def knowing(serve: Any, bundle: Path) -> Any:
    return serve(bundle)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def ask(server: Any, **fields: Any) -> Any:
    return server.client.post("/v1/classify", json={"inputs": ROW, **fields})


@pytest.mark.parametrize(
    ("fields", "point", "exit_index", "certified"),
    [
        ({"compute": 0.5}, "early", 0, None),
        ({"compute": 0.7}, "middle", 1, None),
        ({"compute": 0.7, "policy": "confidence"}, "early", 0, None),
        ({"compute": 1}, "full", 2, None),
        ({"accuracy": 0.9}, "sure", 1, {"kind": "accuracy", "method": "ltt", "bound": 0.92, "delta": 0.05}),
        ({"risk": {"epsilon": 0.05, "delta": 0.1}}, "sure", 1,
         {"kind": "consistency", "method": "ltt", "bound": 0.03, "delta": 0.05}),
        ({"risk": {"epsilon": 0.02}}, "sure", 1,
         {"kind": "consistency", "method": "crc", "bound": 0.02, "delta": None}),
        ({"risk": {"epsilon": 0.01, "delta": 0.05}}, "full", 2,
         {"kind": "consistency", "method": "ltt", "bound": 0.0, "delta": 0.05}),
        ({"operating_point": "middle"}, "middle", 1, None),
    ],
)  # fmt: skip
def test_the_answer_names_the_point_that_gives_what_was_wanted_and_its_certificate(
    knowing: Any, fields: dict[str, Any], point: str, exit_index: int, certified: dict[str, Any] | None
) -> None:
    if certified is not None:
        certified = {**certified, "num_samples": 400}
    answer = ask(knowing, **fields).json()
    assert answer["policy"]["operating_point"] == point
    assert answer["policy"]["certified"] == certified
    assert answer["predictions"][0]["exit"]["index"] == exit_index


def test_query_parameters_say_the_same(knowing: Any) -> None:
    risk = json.dumps({"epsilon": 0.05, "delta": 0.05})
    for query, point in ({"compute": "0.5"}, "early"), ({"risk": risk}, "sure"), ({"operating_point": "full"}, "full"):
        body = npy(np.array(ROW, dtype=np.float32))
        answer = knowing.client.post("/v1/classify", params=query, content=body, headers=NPY).json()
        assert answer["policy"]["operating_point"] == point


@pytest.mark.parametrize(
    ("fields", "field", "sentence"),
    [
        ({"compute": 0.3}, "compute", "the best reachable is 0.4"),
        ({"accuracy": 0.97}, "accuracy", "the best reachable is 0.93"),
        ({"risk": {"epsilon": 0.001, "delta": 0.05}}, "risk", "takes at least 2,995 samples to certify"),
        ({"risk": {"epsilon": 0.05, "delta": 0.01}}, "risk", "hold at delta 0.05 or above"),
        ({"risk": {"epsilon": 0.05, "kind": "accuracy_loss"}}, "risk", "no operating point calibrated for it"),
        ({"operating_point": "c50"}, "operating_point", "it has 4, such as early, middle, sure"),
        ({"accuracy": 0.9, "compute": 0.5}, "compute", "takes 0.8 on average"),
    ],
)
def test_what_no_point_gives_is_422_with_the_best_that_one_does(
    knowing: Any, fields: dict[str, Any], field: str, sentence: str
) -> None:
    refused = ask(knowing, **fields)
    assert refused.status_code == 422
    problem = refused.json()
    assert problem["field"] == field
    assert sentence in problem["detail"]


def test_the_points_are_listed_cheapest_first_with_what_to_expect_on_this_machine(knowing: Any) -> None:
    listed = knowing.client.get("/v1/models/knowing/operating-points").json()
    assert [point["name"] for point in listed["operating_points"]] == ["early", "middle", "sure", "full"]
    assert listed["temperatures"] == [1.0, 1.0, 1.0]
    first, last = listed["operating_points"][0], listed["operating_points"][-1]
    assert first["policy"] == {"kind": "confidence", "threshold": 0.3}
    assert first["certificates"] == [
        {"kind": "accuracy", "method": "ltt", "bound": 0.75, "delta": 0.05, "num_samples": 400}
    ]
    stages = knowing.client.get("/v1/models/knowing").json()["stages"]
    full_ms = sum(stage["measured_ms"]["1"] for stage in stages)
    assert last["expected_ms"] == pytest.approx(full_ms, rel=0.01)
    assert 0 < first["expected_ms"] < last["expected_ms"]


def test_open_inference_takes_the_same_fields_and_names_the_point_in_its_parameters(knowing: Any) -> None:
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": ROW}

    def infer(**parameters: Any) -> Any:
        return knowing.client.post("/v2/models/knowing/infer", json={"inputs": [tensor], "parameters": parameters})

    assert infer(compute=0.5).json()["parameters"] == {"operating_point": "early"}
    assert infer(accuracy="0.9").json()["parameters"] == {
        "operating_point": "sure", "certified_kind": "accuracy", "certified_method": "ltt", "certified_bound": 0.92,
        "certified_delta": 0.05, "certified_num_samples": 400,
    }  # fmt: skip
    assert infer(risk='{"epsilon": 0.02}').json()["parameters"]["certified_method"] == "crc"
    assert "parameters" not in infer(policy="entropy").json()
    refused = infer(compute=0.3)
    assert refused.status_code == 422
    assert "parameters.compute: " in refused.json()["error"]
    assert "best reachable is 0.4" in refused.json()["error"]


def test_an_unmodified_client_asks_for_a_share_of_compute(knowing: Any) -> None:
    client = triton.InferenceServerClient(knowing.url.removeprefix("http://"))
    tensor = triton.InferInput("x", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.array([ROW], dtype=np.float32))
    for compute, exit_index in (0.5, 0), (1.0, 2):
        answer = client.infer("knowing", [tensor], parameters={"compute": compute})
        assert answer.as_numpy("exit_index").tolist() == [[exit_index]]
        assert "operating_point" in answer.get_response()["parameters"]
    client.close()


def test_the_operators_default_point_serves_those_who_choose_nothing(serve: Any, bundle: Path) -> None:
    server = serve(bundle, default_operating_point="other:full,compute=0.5")
    assert ask(server).json()["policy"]["operating_point"] == "early"
    assert ask(server, latency_ms=500).json()["policy"]["operating_point"] == "early"
    assert ask(server, policy="entropy").json()["policy"]["operating_point"] is None
    body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": ROW}]}
    infer = "/v2/models/knowing/infer"
    assert server.client.post(infer, json=body).json()["parameters"]["operating_point"] == "early"
    assert "parameters" not in server.client.post(infer, json=body | {"parameters": {"policy": "entropy"}}).json()
    described = server.client.get("/v1/models/knowing").json()
    assert described["default_operating_point"] == "early"
    assert described["default_policy"] == {"kind": "confidence", "threshold": 0.3}


def test_a_model_that_cannot_give_the_default_point_is_not_served(
    bundle: Path, toy_bundle: Path, tmp_path: Path, cpu_engine: Engine
) -> None:
    settings = ServerSettings.load(default_operating_point="knowing:sure,toy:compute=0.5")
    (tmp_path / "knowing").symlink_to(bundle)
    (tmp_path / "toy").symlink_to(toy_bundle)
    repository = Repository(cpu_engine, tmp_path, defaults_of=settings.defaults_of)
    repository.load_all()
    assert repository.find("knowing").name == "knowing"
    (entry,) = [entry for entry in repository.index() if entry.name == "toy"]
    assert entry.state == "UNAVAILABLE"
    assert "cannot give the default operating point: compute: this model has no operating point" in entry.reason
    alone = Repository(cpu_engine, toy_bundle, defaults_of=settings.defaults_of)
    with pytest.raises(BundleError, match="default operating point"):
        alone.load_all()


def test_a_default_point_that_cannot_be_read_stops_the_start() -> None:
    with pytest.raises(InvalidValue, match="default_operating_point: compute: must be a number"):
        ServerSettings.load(default_operating_point="compute=fast")
