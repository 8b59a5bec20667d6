"""An unmodified `tritonclient[http]` against a real server, in each form that the client has."""

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

ROWS = np.array([[0, 9, 0, 0], [0.01, 0, 0, 0]], dtype=np.float32)
NAMES = ["logits", "probabilities", "class_id", "exit_index", "exit_reason", "depth"]
EXPECTED = {
    "logits": [[0, 9, 0, 0], [1, 0, 0, 0]],
    "class_id": [[1], [0]],
    "exit_index": [[0], [2]],
    "exit_reason": [[b"confident"], [b"final"]],
}


def address(url: str) -> str:
    return url.removeprefix("http://")


@pytest.fixture
def client(toy: Any) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address(toy.url), concurrency=4) as client:
        yield client


def input_of(rows: np.ndarray, *, is_binary: bool = True, name: str = "x", datatype: str = "FP32") -> triton.InferInput:
    tensor = triton.InferInput(name, list(rows.shape), datatype)
    return tensor.set_data_from_numpy(rows, binary_data=is_binary)


def outputs_of(names: list[str], *, is_binary: bool) -> list[triton.InferRequestedOutput]:
    return [triton.InferRequestedOutput(name, binary_data=is_binary) for name in names]


def check(result: Any, names: list[str]) -> None:
    for name in set(names) & set(EXPECTED):
        array = result.as_numpy(name)
        # JSON gives text where binary data gives bytes.
        decoded = [[value.encode() if isinstance(value, str) else value for value in row] for row in array.tolist()]
        assert decoded == EXPECTED[name]
    if "probabilities" in names:
        assert result.as_numpy("probabilities").sum(axis=1) == pytest.approx([1.0, 1.0])
    if "depth" in names:
        assert result.as_numpy("depth")[:, 0] == pytest.approx([1 / 3, 1.0])


def test_without_outputs_it_gets_the_default_ones_as_binary_data(client: Any) -> None:
    result = client.infer("toy", [input_of(ROWS)])
    assert [output["name"] for output in result.get_response()["outputs"]] == [
        name for name in NAMES if name != "probabilities"
    ]
    check(result, [name for name in NAMES if name != "probabilities"])


@pytest.mark.parametrize("is_input_binary", [True, False])
@pytest.mark.parametrize("is_output_binary", [True, False])
def test_it_infers_with_json_and_with_binary_data(client: Any, is_input_binary: bool, is_output_binary: bool) -> None:
    outputs = outputs_of(NAMES, is_binary=is_output_binary)
    result = client.infer("toy", [input_of(ROWS, is_binary=is_input_binary)], outputs=outputs, request_id="abc")
    check(result, NAMES)
    assert result.get_response()["id"] == "abc"


def test_it_infers_with_a_version_named(client: Any) -> None:
    version = client.get_model_metadata("toy")["versions"][0]
    check(client.infer("toy", [input_of(ROWS)], model_version=version), NAMES[:1])
    with pytest.raises(InferenceServerException, match="is served in version"):
        client.infer("toy", [input_of(ROWS)], model_version="7")


def test_it_infers_asynchronously(client: Any) -> None:
    asked = [client.async_infer("toy", [input_of(ROWS)], request_id=str(number)) for number in range(8)]
    for number, answer in enumerate(asked):
        result = answer.get_result()
        check(result, ["logits", "exit_reason"])
        assert result.get_response()["id"] == str(number)


@pytest.mark.parametrize("request_algorithm", ["gzip", "deflate", None])
@pytest.mark.parametrize("response_algorithm", ["gzip", "deflate", None])
def test_it_infers_compressed(client: Any, request_algorithm: str | None, response_algorithm: str | None) -> None:
    rows = np.tile(ROWS, (8, 1))
    result = client.infer(
        "toy",
        [input_of(rows)],
        outputs=outputs_of(NAMES, is_binary=True),
        request_compression_algorithm=request_algorithm,
        response_compression_algorithm=response_algorithm,
    )
    assert result.as_numpy("logits").tolist() == EXPECTED["logits"] * 8
    assert result.as_numpy("exit_reason").tolist() == EXPECTED["exit_reason"] * 8


@pytest.mark.parametrize("is_binary", [True, False])
def test_it_classifies(client: Any, is_binary: bool) -> None:
    output = triton.InferRequestedOutput("probabilities", binary_data=is_binary, class_count=2)
    classes = client.infer("toy", [input_of(ROWS)], outputs=[output]).as_numpy("probabilities")
    assert classes.shape == (2, 2)
    first = classes[0, 0].decode() if is_binary else classes[0, 0]
    score, index, label = first.split(":")
    assert (index, label) == ("1", "east")
    assert float(score) == pytest.approx(np.exp(9) / (np.exp(9) + 3), abs=1e-6)


def test_it_routes_by_parameters(client: Any) -> None:
    parameters = {"policy": "confidence", "threshold": "0.2", "latency_ms": 5000}
    result = client.infer("toy", [input_of(ROWS)], parameters=parameters)
    assert result.as_numpy("exit_index").tolist() == [[0], [0]]


def test_its_timeout_is_a_deadline(client: Any) -> None:
    result = client.infer("toy", [input_of(ROWS[1:])], timeout=1)
    assert result.as_numpy("exit_reason").tolist() == [[b"deadline"]]
    with pytest.raises(InferenceServerException, match="deadline") as caught:
        client.infer("toy", [input_of(ROWS[1:])], timeout=1, parameters={"on_miss": "reject"})
    assert caught.value.status() == "504"


def test_its_priority_and_sequence_flags_do_not_disturb(client: Any) -> None:
    check(client.infer("toy", [input_of(ROWS)], priority=2, sequence_start=True), ["logits"])


@pytest.mark.parametrize(
    ("model", "tensor", "sentence", "status"),
    [
        ("none", input_of(ROWS), "no model 'none' is served", "404"),
        ("toy", input_of(ROWS, name="y"), "reads x; got 'y'", "422"),
        ("toy", input_of(ROWS[:, :3]), r"must be \[rows, 4\]", "422"),
        ("toy", input_of(ROWS.astype(np.float64), datatype="FP64"), "datatype: must be FP32", "422"),
        ("toy", input_of(np.tile(ROWS, (10, 1))), "20 rows are over", "413"),
        ("toy", input_of(ROWS * np.nan), "finite", "422"),
    ],
)
def test_it_raises_what_the_server_refuses(client: Any, model: str, tensor: Any, sentence: str, status: str) -> None:
    with pytest.raises(InferenceServerException, match=sentence) as caught:
        client.infer(model, [tensor])
    assert caught.value.status() == status


def test_it_asks_about_the_server_and_the_model(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("toy")
    assert not client.is_model_ready("none")
    assert not client.is_model_ready("toy", "7")
    assert client.get_server_metadata()["name"] == "offramp"
    metadata = client.get_model_metadata("toy")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert [output["name"] for output in metadata["outputs"]] == NAMES
    configuration = client.get_model_config("toy", metadata["versions"][0])
    assert configuration["max_batch_size"] == 16
    assert configuration["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}]
    assert {output["name"]: output["data_type"] for output in configuration["output"]}["exit_reason"] == "TYPE_STRING"


def test_it_reads_the_statistics(client: Any) -> None:
    before = client.get_inference_statistics("toy")["model_stats"][0]
    client.infer("toy", [input_of(ROWS)])
    after = client.get_inference_statistics()["model_stats"][0]
    assert after["inference_count"] - before["inference_count"] == 2
    assert after["inference_stats"]["success"]["count"] - before["inference_stats"]["success"]["count"] == 1


def test_the_statistics_number_the_version_and_that_number_names_it(client: Any) -> None:
    """Triton's own tools read versions as decimal integers, and book compute in three parts of equal counts."""
    client.infer("toy", [input_of(ROWS)])
    statistics = client.get_inference_statistics("toy")["model_stats"][0]
    version = client.get_model_metadata("toy")["versions"][0]
    assert int(statistics["version"]) == int(version, 16) < 2**63
    assert client.is_model_ready("toy", statistics["version"])
    check(client.infer("toy", [input_of(ROWS)], model_version=statistics["version"]), ["logits"])
    parts = [statistics["inference_stats"][f"compute_{part}"]["count"] for part in ("input", "infer", "output")]
    assert len(set(parts)) == 1


@pytest.fixture
def repository(serve: Callable[..., Any], make_bundle: Callable[..., Path], tmp_path: Path) -> Iterator[Any]:
    shutil.copytree(make_bundle(), tmp_path / "first")
    server = serve(folder=tmp_path, repository_control=True, repository_poll_s=0)
    with triton.InferenceServerClient(address(server.url)) as client:
        yield client, tmp_path


def test_it_loads_and_unloads_models(repository: Any, make_bundle: Callable[..., Path]) -> None:
    client, folder = repository
    shutil.copytree(make_bundle(gains=(5.0, 50.0)), folder / "second")
    client.load_model("second")
    assert [(line["name"], line["state"]) for line in client.get_model_repository_index()] == [
        ("first", "READY"),
        ("second", "READY"),
    ]
    assert client.infer("second", [input_of(ROWS[:1])]).as_numpy("logits").tolist() == [[0, 45, 0, 0]]
    client.unload_model("first", unload_dependents=True)
    assert not client.is_model_ready("first")
    assert client.is_server_ready()
    client.unload_model("second")
    assert not client.is_server_ready()
    client.load_model("first")
    assert client.is_model_ready("first")


def test_it_is_told_why_a_model_cannot_be_loaded(repository: Any) -> None:
    client, folder = repository
    with pytest.raises(InferenceServerException, match="holds no model 'absent'"):
        client.load_model("absent")
    (folder / "broken").mkdir()
    with pytest.raises(InferenceServerException, match="holds no manifest"):
        client.load_model("broken")
    with pytest.raises(InferenceServerException, match="configured by their bundles"):
        client.load_model("first", config="{}")
    lines = {line["name"]: line for line in client.get_model_repository_index()}
    assert lines["first"]["state"] == "READY"
    assert lines["broken"]["state"] == "UNAVAILABLE"
    assert "manifest.json" in lines["broken"]["reason"]


def test_its_asyncio_form_works_as_well(toy: Any) -> None:
    async def ask() -> None:
        async with triton_aio.InferenceServerClient(address(toy.url)) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("toy")
            assert (await client.get_model_metadata("toy"))["name"] == "toy"
            assert (await client.get_model_config("toy"))["max_batch_size"] == 16
            assert (await client.get_inference_statistics("toy"))["model_stats"]
            assert await client.get_model_repository_index()
            rows = np.tile(ROWS, (8, 1))  # long enough to be compressed, which aiohttp asks for unasked
            results = await asyncio.gather(*(client.infer("toy", [input_of(rows)]) for _ in range(8)))
            for result in results:
                assert result.as_numpy("logits").tolist() == EXPECTED["logits"] * 8
            json = await client.infer(
                "toy", [input_of(ROWS, is_binary=False)], outputs=outputs_of(NAMES, is_binary=False)
            )
            check(json, NAMES)
            with pytest.raises(InferenceServerException, match="no model 'none' is served"):
                await client.infer("none", [input_of(ROWS)])

    asyncio.run(ask())
