"""The manifest: what a bundle holds, in the order it runs, and how a reader checks it.

The exporter writes it and the server reads it; nothing else is needed to serve. It is versioned, a reader refuses what
it does not know by name, every file is checked against its sha256 before use, and no path leaves the folder.

A multi-exit network is a list of stages that end in exits. A *gated* stage is a block's body alone: `Stage.gate` names
the gate that decides over it, and its `merges` say which carry stands for its result when the gate is shut.
"""

import hashlib
import json
import math
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from offramp_contract.consistency import first_problem
from offramp_contract.errors import DigestMismatch, ManifestError, UnsupportedFormat
from offramp_contract.files import BundleFiles
from offramp_contract.policy_spec import ConfidenceSpec, PolicySpec

FORMAT_VERSION: Final = 1
MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 2**20
DTYPES = {"float32": 4, "float16": 2, "float64": 8, "int64": 8, "int32": 4, "uint8": 1, "int8": 1, "bool": 1}

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Name = Annotated[str, Field(min_length=1, max_length=512)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Tensor(_Part):
    """A value that enters the network or crosses a stage boundary; `shape` is one row's, behind the batch axis 0."""

    name: Name
    dtype: Literal["float32", "float16", "float64", "int64", "int32", "uint8", "int8", "bool"]
    shape: tuple[Annotated[int, Field(ge=0)], ...]

    @property
    def row_bytes(self) -> int:
        """Bytes that one row takes."""
        return DTYPES[self.dtype] * math.prod(self.shape)


class File(_Part):
    """A file of the bundle, relative to its folder."""

    path: Name
    sha256: Sha256

    @model_validator(mode="after")
    def _stays_inside(self) -> Self:
        parts = PurePosixPath(self.path).parts
        if not parts or self.path.startswith("/") or "\\" in self.path or ".." in parts or "\0" in self.path:
            raise ValueError(f"file path {self.path!r} leaves the bundle's folder")
        return self


class Merge(_Part):
    """A value that a gated stage changes: `run` is its output's name, `skip` the carry that stands for it."""

    run: Name
    skip: Name


class Stage(_Part):
    """The smallest thing the engine runs: one ONNX graph.

    Attributes:
        inputs: Names of the model inputs and carries it reads, in the graph's order (the temperature excepted).
        outputs: Names of the carries it emits, in the graph's order (an exit's logits and decision excepted).
        exit: Index of the exit it ends in, if any.
        gate: Index of the gate that decides whether it runs, if any.
        merges: What stands for its outputs when its gate is shut.
        flops: Floating-point operations for one row (a multiply-add counts two).
        carry_bytes: Bytes that one row keeps alive across the boundary behind this stage.
    """

    name: Name
    graph: File
    inputs: tuple[Name, ...]
    outputs: tuple[Name, ...] = ()
    exit: int | None = Field(default=None, ge=0)
    gate: int | None = Field(default=None, ge=0)
    merges: tuple[Merge, ...] = ()
    flops: int = Field(ge=0)
    carry_bytes: int = Field(ge=0)


class Exit(_Part):
    """An output module. Index 0 .. E-1; the last is the final exit.

    Attributes:
        stage: Index of the stage whose graph computes it.
        logits: Name of the graph output with the raw scores, float32 (B, num_classes).
        decision: Name of the graph output with the packed statistics (`offramp_contract.statistics`).
        temperature: Name of the graph's scalar float32 input T.
        halting: Name of the graph output with a learned halting score, float32 (B,), if the network has one.
    """

    name: Name
    stage: int = Field(ge=0)
    logits: Name
    decision: Name
    temperature: Name
    num_classes: int = Field(ge=2, le=2**24)
    halting: Name | None = None


class Gate(_Part):
    """A per-row binary decision before a gated stage.

    Attributes:
        stage: Index of the stage whose graph computes its score.
        score: Name of that graph's output, float32 (B,), in [0, 1].
        threshold: Default of the serving-time knob; the gate opens where score >= threshold (survey eq. 8).
    """

    name: Name
    stage: int = Field(ge=0)
    score: Name
    threshold: float = Field(default=0.5, ge=0.0, le=1.0)


class ImagePreprocessing(_Part):
    """How an image becomes the model's one input, float32 (channels, height, width).

    The image is converted to `mode`, its shorter side scaled to `resize` (None: both sides straight to the model's
    size), the centre cropped, values divided by 255 and normalised with `mean` and `std` per channel.
    `invert` is for dark-on-light pictures of a network trained on light-on-dark ones.
    """

    kind: Literal["image"] = "image"
    mode: Literal["L", "RGB"]
    height: int = Field(ge=1, le=8192)
    width: int = Field(ge=1, le=8192)
    resize: int | None = Field(default=None, ge=1, le=8192)
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    invert: bool = False
    mean: tuple[Finite, ...]
    std: tuple[Finite, ...]

    @model_validator(mode="after")
    def _one_number_a_channel(self) -> Self:
        num_channels = len(self.mode)
        if len(self.mean) != num_channels or len(self.std) != num_channels or not all(s > 0 for s in self.std):
            raise ValueError(f"mean and std need {num_channels} numbers, std above 0, for mode {self.mode}")
        return self


class TextPreprocessing(_Part):
    """How a text becomes token ids and, where the model reads one, an attention mask.

    Attributes:
        tokenizer: A `tokenizer.json` of the `tokenizers` library.
        ids: Name of the model input that takes the ids.
        mask: Name of the model input that takes 1 for tokens and 0 for padding.
        length: Every text is padded or cut to this many tokens.
    """

    kind: Literal["text"] = "text"
    tokenizer: File
    ids: Name
    mask: Name | None = None
    length: int = Field(ge=1, le=65536)
    pad_id: int = Field(default=0, ge=0)


Preprocessing = Annotated[ImagePreprocessing | TextPreprocessing, Field(discriminator="kind")]


class Provenance(_Part):
    """Where the bundle comes from. For people: nothing is decided by it."""

    source: str
    parameters: int | None = Field(default=None, ge=0)
    opset: int | None = None
    versions: dict[str, str] = {}
    training: dict[str, Any] = {}


class Manifest(_Part):
    """All that a server must know about a bundle. Construction checks that its parts fit together.

    Attributes:
        min_batch: The least number of rows that the graphs run with; a smaller batch is padded.
    """

    format_version: Literal[1] = FORMAT_VERSION
    name: ModelName
    task: Literal["classification"] = "classification"
    precision: Literal["fp32", "fp16"] = "fp32"
    inputs: tuple[Tensor, ...] = Field(min_length=1)
    carries: tuple[Tensor, ...] = ()
    stages: tuple[Stage, ...] = Field(min_length=1, max_length=4096)
    exits: tuple[Exit, ...] = Field(min_length=1, max_length=1024)
    gates: tuple[Gate, ...] = ()
    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    default_policy: PolicySpec = ConfidenceSpec()
    min_batch: int = Field(default=1, ge=1)
    max_batch: int | None = Field(default=None, ge=1)
    provenance: Provenance

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Model inputs and carries by name."""
        return {tensor.name: tensor for tensor in (*self.inputs, *self.carries)}

    @property
    def full_flops(self) -> int:
        """Floating-point operations of one row that runs every stage."""
        return sum(stage.flops for stage in self.stages)

    @property
    def exit_depths(self) -> tuple[float, ...]:
        """Share of the full path's FLOPs that a row has run when it stands at each exit."""
        total, depths, done = max(self.full_flops, 1), [], 0
        for stage in self.stages:
            done += stage.flops
            if stage.exit is not None:
                depths.append(done / total)
        return tuple(depths)

    @property
    def files(self) -> tuple[File, ...]:
        """Every file of the bundle beside the manifest and the calibration."""
        tokenizer = (self.preprocessing.tokenizer,) if isinstance(self.preprocessing, TextPreprocessing) else ()
        return (*(stage.graph for stage in self.stages), *tokenizer)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        problem = first_problem(self)
        if problem is not None:
            raise ValueError(problem)
        return self

    def to_bytes(self) -> bytes:
        """Give the canonical JSON text; its sha256 is the model digest."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True).encode()

    @property
    def model_digest(self) -> str:
        """Sha256 over the manifest, and so, through the files' digests in it, over every graph."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, text: bytes) -> Self:
        """Read a manifest.

        Raises:
            UnsupportedFormat: If it was written in a format this version does not know.
            ManifestError: With the first thing that is wrong.
        """
        try:
            written = json.loads(text)
        except (ValueError, RecursionError):
            raise ManifestError(f"{MANIFEST_FILE} is not JSON") from None
        if not isinstance(written, dict):
            raise ManifestError(f"{MANIFEST_FILE} is not a JSON object")
        if (version := written.get("format_version")) != FORMAT_VERSION:
            raise UnsupportedFormat(f"bundle format {version!r} is not known here; this Offramp reads {FORMAT_VERSION}")
        try:
            return cls.model_validate(written)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ", ".join(filter(None, (MANIFEST_FILE, ".".join(map(str, problem["loc"])))))
            raise ManifestError(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from None


def read_verified(files: BundleFiles, file: File) -> bytes:
    """Read a file of a bundle and check it.

    Raises:
        ManifestError: If it is missing or leads out of the folder.
        DigestMismatch: If its content is not the one the manifest names.
    """
    content = files.read(file.path)
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise DigestMismatch(f"file {file.path!r} does not have the sha256 that the manifest names")
    return content


def read_manifest(files: BundleFiles) -> Manifest:
    """Read a bundle's manifest, checked for format and consistency; the files it names are checked when read.

    Raises:
        ManifestError: If there is no valid manifest.
        UnsupportedFormat: If it was written in a format this version does not know.
    """
    if not files.has(MANIFEST_FILE):
        raise ManifestError(f"{files.name!r} holds no {MANIFEST_FILE}; a bundle is what `offramp export` wrote")
    return Manifest.from_bytes(files.read(MANIFEST_FILE, MAX_MANIFEST_BYTES))
