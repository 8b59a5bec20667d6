"""Runs a bundle's stages: sessions, carries, devices. The only importer of onnxruntime."""

from offramp_runtime.bundle import Bundle, open_bundle
from offramp_runtime.device import Device, DeviceTensor, open_device
from offramp_runtime.execute import StageExecutor, StageOutput, run_all_exits

__all__ = [
    "Bundle",
    "Device",
    "DeviceTensor",
    "StageExecutor",
    "StageOutput",
    "open_bundle",
    "open_device",
    "run_all_exits",
]
