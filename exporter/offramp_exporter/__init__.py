"""Trained network -> proved bundle. `export` reads top to bottom in `offramp_exporter.pipeline`."""

from offramp_exporter.examples import parse_example
from offramp_exporter.explain import Explanation, explain, explain_onnx
from offramp_exporter.load import load_module, load_weights
from offramp_exporter.pipeline import export, export_onnx
from offramp_exporter.staged import StagedModule

__all__ = [
    "Explanation",
    "StagedModule",
    "explain",
    "explain_onnx",
    "export",
    "export_onnx",
    "load_module",
    "load_weights",
    "parse_example",
]
