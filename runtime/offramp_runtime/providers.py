"""The execution providers of ONNX Runtime that Offramp knows, and how each is asked to work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from offramp_contract.errors import DeviceUnavailable

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"


@dataclass(frozen=True, slots=True)
class Acceleration:
    """What the operator decides about a GPU.

    Attributes:
        cuda_graphs: Whether stages are captured as CUDA graphs at the profiled batch sizes, where the warm-up measures
            that this pays. A captured stage holds its weights in device memory twice.
        tensorrt_cache: Folder in which TensorRT keeps the engines it builds, which takes minutes; None builds them
            again at every start.
        tensorrt_half: Whether TensorRT may compute in float16. No parity was proved for that: export with
            `--precision fp16` instead where answers have to be vouched for.
    """

    cuda_graphs: bool = True
    tensorrt_cache: Path | None = None
    tensorrt_half: bool = False


@dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider on one device.

    Attributes:
        name: ONNX Runtime's name for it.
        kind: Where its tensors lie: `cuda` or `cpu`.
        index: Which device of that kind.
        device: As the user writes it.
        options: Its own.
        behind: What runs the nodes that it does not take, first choice first.
        captures: Whether graphs are captured at fixed batch sizes, where that pays.
        capturing: The options that make a session one that captures.
        needs: What must be installed for it, for messages.
    """

    name: str
    kind: str
    index: int
    device: str
    options: Mapping[str, str] = field(default_factory=dict)
    behind: Sequence["Provider"] = ()
    captures: bool = False
    capturing: Mapping[str, str] = field(default_factory=dict)
    needs: str = "CUDA and cuDNN"

    @property
    def names(self) -> list[str]:
        """This provider's name and those behind it."""
        return [self.name, *(other.name for other in self.behind)]

    @property
    def all_options(self) -> list[dict[str, str]]:
        """The options of each of `names`."""
        return [dict(self.options), *(dict(other.options) for other in self.behind)]

    def to_capture(self) -> "Provider":
        """Give the same provider, asked to capture what it runs."""
        return replace(self, options={**self.options, **self.capturing})


def on_cpu(*, captures: bool = False) -> Provider:
    """Describe the CPU as an accelerator is described: the same path runs there, and is tested there."""
    return Provider(CPU, "cpu", 0, "cpu:0", captures=captures, needs="nothing")


def cuda(index: int, acceleration: Acceleration) -> Provider:
    """Describe a CUDA device."""
    return Provider(
        CUDA,
        "cuda",
        index,
        f"cuda:{index}",
        {"device_id": str(index)},
        captures=acceleration.cuda_graphs,
        capturing={"enable_cuda_graph": "1"},
    )


def tensorrt(index: int, acceleration: Acceleration) -> Provider:
    """Describe TensorRT on a CUDA device, which runs what TensorRT does not take.

    Raises:
        DeviceUnavailable: If the cache's folder cannot be made.
    """
    options = {"device_id": str(index), "trt_fp16_enable": str(int(acceleration.tensorrt_half))}
    folder = acceleration.tensorrt_cache
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DeviceUnavailable(f"tensorrt_cache: {str(folder)!r} is no folder and cannot be made one") from error
        options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}
        options |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(folder)}
    plain = Acceleration(cuda_graphs=False)
    behind = (cuda(index, plain),)
    name = f"tensorrt:{index}"
    return Provider(TENSORRT, "cuda", index, name, options, behind, needs="CUDA, cuDNN and TensorRT")
