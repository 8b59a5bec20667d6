"""Networks with gates, trained on real digits from the command line: each row runs what its own gates open.

Everything goes through `offramp train`, `offramp export` and `offramp serve`; what is right is what torch says.
"""

import io
import threading
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise

import httpx
import numpy as np
import pytest
import torch
from gated_trainings import GATED
from offramp_models.gates import HARD, Choice
from offramp_runtime import open_bundle, open_device
from offramp_server.app import create_app
from offramp_server.engine import Engine
from offramp_server.metrics import Metrics
from offramp_server.repository import Repository
from offramp_server.serve import DrainingServer, bind, url_of, uvicorn_config
from offramp_server.settings import ServerSettings
from offramp_server.stage_profile import StageProfile
from prometheus_client.parser import text_string_to_metric_families

LEARNT = ("skipnet", "convnet_aig")
"""Gates that look at the image, open for about half of them."""
CHOSEN = ("layerdrop", "stochastic_depth")
"""Gates whose depth is the caller's choice."""
NPY = {"content-type": "application/x-npy"}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def post(client, model, images, **query):
    file = io.BytesIO()
    np.save(file, images)
    return client.post(f"/v1/models/{model}/classify", params=query, content=file.getvalue(), headers=NPY)


def classify(client, model, images, **query):
    """Send images, at most 50 a request; gives their predictions."""
    answers = [post(client, model, part, **query) for part in np.array_split(images, -(-len(images) // 50))]
    assert {answer.status_code for answer in answers} == {200}, answers[0].text
    return [prediction for answer in answers for prediction in answer.json()["predictions"]]


def logits(client, model, images, batch=16, **parameters):
    """Send images, `batch` a request, as tensors; gives their logits."""
    url, parts = f"/v2/models/{model}", []
    name = client.get(url).json()["inputs"][0]["name"]
    for first in range(0, len(images), batch):
        part = images[first : first + batch]
        tensor = {"name": name, "shape": list(part.shape), "datatype": "FP32", "data": part.ravel().tolist()}
        document = {"inputs": [tensor], "parameters": parameters, "outputs": [{"name": "logits"}]}
        answer = client.post(f"{url}/infer", json=document)
        assert answer.status_code == 200, answer.text
        (output,) = answer.json()["outputs"]
        parts.append(np.reshape(output["data"], (len(part), -1)))
    return np.concatenate(parts)


def depths(predictions):
    return np.array([prediction["depth"] for prediction in predictions])


def images_of(trained, num=None):
    return trained.data.inputs(trained.data.test)[:num]


def gates_of_stages(trained):
    return {stage.name: set(stage.gates) for stage in open_bundle(trained.bundle).manifest.stages}


def only(open_gates):
    """Decide as a request does that keeps these gates open."""
    return lambda log_odds_B, gate: Choice(torch.full_like(log_odds_B, float(gate in open_gates)))


# --- what runs, and what it answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", LEARNT)
def test_the_flops_that_are_told_are_those_of_the_blocks_that_eager_gates_open(gated, served_gates, model):
    images, network = images_of(gated[model]), gated[model].network
    decisions_BG = gated[model].passed(images).decisions_BG
    assert 0.2 < decisions_BG.mean() < 0.8, "the gates say nothing"
    predictions = classify(served_gates.client, model, images)
    assert depths(predictions).sum() == pytest.approx(float(network.depth_B(decisions_BG).sum()), rel=0.01)
    gates_of = gates_of_stages(gated[model])
    for prediction, decision_G in zip(predictions, decisions_BG.tolist(), strict=True):
        is_open = {gate for gate, decision in enumerate(decision_G) if decision}
        assert prediction["stages"] == [name for name, gates in gates_of.items() if gates <= is_open]


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("model", LEARNT)
def test_every_sample_is_answered_as_the_eager_network_answers_it(gated, served_gates, model, batch):
    images = images_of(gated[model])
    passed = gated[model].passed(images)
    firsts = passed.decisions_BG[: len(images) // 16 * 16].reshape(-1, 16, passed.decisions_BG.shape[1])
    assert all(len(np.unique(rows_BG, axis=0)) > 1 for rows_BG in firsts.numpy()), "a batch whose rows agree"
    told = logits(served_gates.client, model, images, batch)
    np.testing.assert_allclose(told, passed.logits_EBC[-1].numpy(), **TOLERANCE)


@pytest.mark.parametrize("model", GATED)
def test_whatever_its_gates_it_is_trained_exported_and_served_alike(gated, served_gates, model):
    images, network = images_of(gated[model], 64), gated[model].network
    (expected_BC,) = gated[model].eager(images)
    np.testing.assert_allclose(logits(served_gates.client, model, images), expected_BC, **TOLERANCE)
    decisions_BG = gated[model].passed(images).decisions_BG
    predictions = classify(served_gates.client, model, images)
    np.testing.assert_allclose(depths(predictions), network.depth_B(decisions_BG).numpy(), atol=0.02)
    assert [prediction["gates"]["open"] for prediction in predictions] == decisions_BG.sum(dim=1).tolist()


# --- knobs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", LEARNT)
def test_a_rising_threshold_lowers_the_average_depth_from_full_to_least(gated, served_gates, model):
    images = images_of(gated[model], 200)
    inner = np.quantile(gated[model].passed(images).scores_BG, np.linspace(0.1, 0.9, 9))
    swept = [
        depths(classify(served_gates.client, model, images, gate_threshold=str(tau))).mean()
        for tau in (0.0, *inner.tolist(), 1.0)
    ]
    assert swept[0] == 1.0
    least = depths(classify(served_gates.client, model, images[:1], gates="shut"))[0]
    assert swept[-1] == pytest.approx(least, abs=1e-6)
    assert least < 0.1
    assert all(later < earlier + 0.02 for earlier, later in pairwise(swept)), swept
    assert len({round(depth, 3) for depth in swept}) > 4, "only the ends differ"


@pytest.mark.parametrize("model", GATED)
def test_gates_shut_gives_the_trunk_exactly_and_open_all_of_it(gated, served_gates, model):
    images = images_of(gated[model], 16)
    num_gates = len(open_bundle(gated[model].bundle).manifest.gates)
    trunk = [name for name, gates in gates_of_stages(gated[model]).items() if not gates]
    for gates, is_open in (("shut", ()), ("open", range(num_gates))):
        (expected_BC,) = gated[model].passed(images, only(is_open)).logits_EBC
        told = logits(served_gates.client, model, images, gates=gates)
        np.testing.assert_allclose(told, expected_BC.numpy(), **TOLERANCE)
        predictions = classify(served_gates.client, model, images, gates=gates)
        assert [prediction["gates"]["open"] for prediction in predictions] == [len(is_open)] * 16
        if gates == "open":
            assert (depths(predictions) == 1.0).all()
        else:
            assert [prediction["stages"] for prediction in predictions] == [trunk] * 16


@pytest.mark.parametrize("model", CHOSEN)
def test_a_count_runs_exactly_so_many_layers_those_of_highest_priority(gated, served_gates, model):
    images, manifest = images_of(gated[model], 16), open_bundle(gated[model].bundle).manifest
    by_priority = sorted(range(len(manifest.gates)), key=lambda gate: -manifest.gates[gate].priority)
    deepest = 0.0
    for count in range(len(manifest.gates) + 1):
        kept = set(by_priority[:count])
        predictions = classify(served_gates.client, model, images, gates=count)
        ran = [name for name, gates in gates_of_stages(gated[model]).items() if gates <= kept]
        assert [prediction["stages"] for prediction in predictions] == [ran] * 16
        assert [prediction["gates"]["open"] for prediction in predictions] == [count] * 16
        (expected_BC,) = gated[model].passed(images, only(kept)).logits_EBC
        np.testing.assert_allclose(logits(served_gates.client, model, images, gates=count), expected_BC, **TOLERANCE)
        assert depths(predictions)[0] > deepest
        deepest = depths(predictions)[0]
    assert deepest == 1.0


@pytest.mark.parametrize(
    ("model", "query", "sentence"),
    [
        ("skipnet", {"gates": 2}, "gates: a count is for networks whose depth is the caller's choice"),
        ("layerdrop", {"gates": 5}, "gates: a count must be 0 to 4, the gates of this model"),
        ("skipnet", {"gate_threshold": 1.5}, "gate_threshold: one number from 0 to 1, or 4 of them"),
        ("skipnet", {"gate_threshold": 0.5, "gates": "open"}, "gates: 'open' leaves nothing for gate_threshold"),
    ],
)
def test_what_gates_cannot_do_is_refused_in_words(gated, served_gates, model, query, sentence):
    answer = post(served_gates.client, model, images_of(gated[model], 1), **query)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(sentence)


def test_a_network_without_gates_refuses_a_threshold_for_them(served, trained):
    answer = post(served.client, "digits", images_of(trained, 1), gate_threshold=0.5)
    assert answer.status_code == 422
    assert answer.json()["detail"] == "gate_threshold: this model has no gates"


# --- metrics ---------------------------------------------------------------------------------------------------------


def metrics(client, model):
    """Read a model's numbers: of its gates' decisions, of depths told, and of rows answered by reason."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.labels.get("model") == model]
    read = Counter()
    for sample in samples:
        if sample.name == "offramp_gate_decisions_total":
            read["gate", sample.labels["gate"], sample.labels["decision"]] += sample.value
        elif sample.name in ("offramp_depth_ratio_sum", "offramp_depth_ratio_count"):
            read[sample.name] += sample.value
        elif sample.name == "offramp_samples_total":
            read["reason", sample.labels["reason"]] += sample.value
    return read


def test_decisions_and_depths_that_are_counted_add_up_to_the_answers(gated, served_gates):
    model, images = "skipnet", images_of(gated["skipnet"])
    before, expected = metrics(served_gates.client, model), Counter()
    predictions = []
    for query in ({}, {"gate_threshold": "0.4,0.5,0.6,0.7"}, {"gates": "shut"}):
        predictions += classify(served_gates.client, model, images, explain="true", **query)
    for prediction in predictions:
        for gate in prediction["gates"]["decisions"]:
            expected["gate", gate["name"], gate["decision"]] += 1
    counted = metrics(served_gates.client, model) - before
    assert {key: value for key, value in counted.items() if key[0] == "gate"} == dict(expected)
    assert counted["offramp_depth_ratio_count"] == counted["reason", "final"] == len(predictions)
    assert counted["offramp_depth_ratio_sum"] == pytest.approx(depths(predictions).sum(), rel=1e-5)


# --- deadlines -------------------------------------------------------------------------------------------------------


@contextmanager
def served_here(bundle, hours_a_body):
    """Serve a bundle in this process with a profile that says how long each body takes."""
    settings = ServerSettings.load(port=0, threads=1, warm_up_s=0.1)
    counting = Metrics()
    engine = Engine(open_device("cpu", 1), settings.engine_settings(), counting)
    served = engine.add_model(open_bundle(bundle))
    for index, stage in enumerate(served.manifest.stages):
        if stage.gates:
            served.profile.stages[index] = StageProfile(served.max_batch)
            served.profile.stages[index].calibrate(1, [hours_a_body * 3600.0])
    app = create_app(settings, Repository(engine, None), engine, counting)
    listener = bind(settings)
    server = DrainingServer(uvicorn_config(app, settings), engine, settings.drain_timeout_s)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
    thread.start()
    try:
        with httpx.Client(base_url=url_of(listener), timeout=60, trust_env=False) as client:
            yield client
    finally:
        server.stop("end of the test")
        thread.join()
        engine.close()


def test_a_budget_that_cannot_pay_for_the_bodies_gets_the_trunks_answer_and_says_so(gated):
    """A body is said to take an hour; half a minute is more than the trunk needs on any machine."""
    skipnet = gated["skipnet"]
    images = images_of(skipnet, 16)
    trunk = [name for name, gates in gates_of_stages(skipnet).items() if not gates]
    with served_here(skipnet.bundle, hours_a_body=1.0) as client:
        query = {"latency_ms": 30_000, "gates": "open", "explain": "true"}
        hurried = classify(client, "skipnet", images, **query)
        (expected_BC,) = skipnet.passed(images, only(())).logits_EBC
        told = logits(client, "skipnet", images, latency_ms=30_000, gates="open")
        own = classify(client, "skipnet", images, latency_ms=30_000, explain="true")
        counted = metrics(client, "skipnet")
    for prediction in hurried:
        assert prediction["stages"] == trunk
        assert (prediction["exit"]["reason"], prediction["exit"]["forced"]) == ("deadline", True)
        assert {gate["decision"] for gate in prediction["gates"]["decisions"]} == {"forced"}
    np.testing.assert_allclose(told, expected_BC.numpy(), **TOLERANCE)
    assert counted["reason", "deadline"] == 16 + 16 + sum(prediction["exit"]["forced"] for prediction in own)
    eager_BG = skipnet.passed(images, HARD).decisions_BG
    for prediction, decision_G in zip(own, eager_BG.tolist(), strict=True):
        decided = [gate["decision"] for gate in prediction["gates"]["decisions"]]
        assert decided[0] == ("forced" if decision_G[0] else "shut")
        assert prediction["exit"]["forced"] is ("forced" in decided)
