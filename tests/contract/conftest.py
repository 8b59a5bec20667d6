"""A manifest as JSON: two stages that end in exits, one between them that does not."""

from typing import Any

import pytest

SHA256 = "0" * 64


@pytest.fixture
def written() -> dict[str, Any]:
    """The smallest manifest that has one of everything but gates."""
    return {
        "format_version": 2,
        "name": "net",
        "task": "classification",
        "precision": "fp32",
        "inputs": [{"name": "x", "dtype": "float32", "shape": [1, 2, 3]}],
        "carries": [
            {"name": "h0", "dtype": "float32", "shape": [5]},
            {"name": "h1", "dtype": "float16", "shape": [7, 2]},
        ],
        "stages": [
            stage(0, inputs=["x"], outputs=["h0"], exit=0, flops=10, carry_bytes=20),
            stage(1, inputs=["h0", "x"], outputs=["h1"], flops=20, carry_bytes=48),
            stage(2, inputs=["h0", "h1"], exit=1, flops=70),
        ],
        "exits": [exit_(0, stage=0), exit_(1, stage=2)],
        "shared_weights": None,
        "predicates": [],
        "gates": [],
        "labels": ["a", "b", "c"],
        "preprocessing": {
            "kind": "image",
            "mode": "L",
            "height": 2,
            "width": 3,
            "resize": None,
            "interpolation": "bilinear",
            "invert": False,
            "mean": [0.5],
            "std": [0.25],
        },
        "default_policy": {"kind": "confidence", "threshold": 0.9},
        "min_batch": 1,
        "max_batch": 64,
        "provenance": {"source": "by hand", "parameters": 3, "opset": 18, "versions": {"onnx": "1"}, "training": {}}
        | {"proof": None},
    }


@pytest.fixture
def gated(written: dict[str, Any]) -> dict[str, Any]:
    """The same with a gate that the first stage scores and a body that it may skip."""
    written["carries"].append({"name": "h0_after_body", "dtype": "float32", "shape": [5]})
    body = stage(3, inputs=["h0"], outputs=["h0_after_body"], flops=5)
    body |= {"gates": [0], "merges": [{"run": "h0_after_body", "skip": "h0"}]}
    written["stages"].insert(1, body)
    written["exits"][1]["stage"] = 3
    written["gates"] = [{"name": "gate_0", "stage": 0, "priority": None, "threshold": 0.5}]
    written["stages"][0]["scores"] = "scores"
    return written


def stage(index: int, **given: Any) -> dict[str, Any]:
    graph = {"path": f"stages/{index:02d}.onnx", "sha256": SHA256}
    rest: dict[str, Any] = {"outputs": [], "exit": None, "flops": 0, "carry_bytes": 0}
    rest |= {"scores": None, "gates": [], "merges": []}
    return {"name": f"stage_{index}", "graph": graph, **rest, **given}


def exit_(index: int, **given: Any) -> dict[str, Any]:
    names = {"logits": "logits", "decision": "decision", "temperature": "T", "halting": None, "native": None}
    return {"name": f"exit_{index}", **names, "num_classes": 3, **given}
