"""Runs a bundle's stages: sessions, carries, devices. The only importer of onnxruntime."""

from offramp_runtime.bundle import Bundle, open_bundle
from offramp_runtime.device import Device, DeviceTensor, available_cores, open_device
from offramp_runtime.execute import StageExecutor, StageOutput
from offramp_runtime.providers import Acceleration
from offramp_runtime.whole import Outcome, run_all_exits, run_gated

__all__ = [
    "Acceleration",
    "Bundle",
    "Device",
    "DeviceTensor",
    "Outcome",
    "StageExecutor",
    "StageOutput",
    "available_cores",
    "open_bundle",
    "open_device",
    "run_all_exits",
    "run_gated",
]
