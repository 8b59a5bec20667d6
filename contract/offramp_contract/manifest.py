"""The manifest: what a bundle holds, in the order it runs, and how a reader checks it.

The exporter writes it and the server reads it; nothing else is needed to serve. It is versioned, a reader refuses what
it does not know by name, every file is checked against its sha256 before use, and no path leaves the folder.

A multi-exit network is a list of stages that end in exits. A *gated* stage is a block's body alone: `Stage.gates` names
the gates that decide over it, and its `merges` say which carry stands for its result when one of them is shut.
"""

import hashlib
import json
from functools import cached_property
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator

from offramp_contract.consistency import first_problem
from offramp_contract.errors import DigestMismatch, ManifestError, UnsupportedFormat
from offramp_contract.files import BundleFiles
from offramp_contract.native import NativeRule, NativeRules, Predicate
from offramp_contract.parts import File, Name, Part, Proof, SharedWeights, Tensor
from offramp_contract.policy_spec import ConfidenceSpec, PolicySpec

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "MAX_MANIFEST_BYTES",
    "Exit",
    "File",
    "Gate",
    "ImagePreprocessing",
    "Manifest",
    "Merge",
    "NativeRule",
    "Predicate",
    "Preprocessing",
    "Proof",
    "Provenance",
    "SharedWeights",
    "Stage",
    "Tensor",
    "TextPreprocessing",
    "read_manifest",
    "read_verified",
]

FORMAT_VERSION: Final = 2
MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 2**20

ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Merge(Part):
    """A value that a gated stage changes: `run` is its output's name, `skip` the input or carry that stands for it."""

    run: Name
    skip: Name


class Stage(Part):
    """The smallest thing the engine runs: one ONNX graph.

    Attributes:
        inputs: Names of the model inputs and carries it reads, in the graph's order (the temperature excepted).
        outputs: Names of the carries it emits, in the graph's order (an exit's logits and decision excepted).
        exit: Index of the exit it ends in, if any.
        scores: Name of the graph output with the scores of the gates that it decides, float32 (B, K), one column for
            each gate that names it, in the gates' order; None if no gate does.
        gates: Indices of the gates that must all be open for it to run, the outermost first; empty for trunk.
        merges: What stands for its outputs where it does not run. An output that only stages behind the same gates read
            has none.
        flops: Floating-point operations for one row (a multiply-add counts two).
        carry_bytes: Bytes that one row keeps alive across the boundary behind this stage.
    """

    name: Name
    graph: File
    inputs: tuple[Name, ...]
    outputs: tuple[Name, ...] = ()
    exit: int | None = Field(default=None, ge=0)
    scores: Name | None = None
    gates: tuple[Annotated[int, Field(ge=0)], ...] = ()
    merges: tuple[Merge, ...] = ()
    flops: int = Field(ge=0)
    carry_bytes: int = Field(ge=0)


class Exit(Part):
    """An output module. Index 0 .. E-1; the last is the final exit.

    Attributes:
        stage: Index of the stage whose graph computes it.
        logits: Name of the graph output with the raw scores, float32 (B, num_classes).
        decision: Name of the graph output with the packed statistics (`offramp_contract.statistics`).
        temperature: Name of the graph's scalar float32 input T.
        halting: Name of the graph output with a learned halting score, float32 (B,), if the network has one.
        native: The network's own rule for leaving here, if it has one; its score is the decision's last column.
    """

    name: Name
    stage: int = Field(ge=0)
    logits: Name
    decision: Name
    temperature: Name
    num_classes: int = Field(ge=2, le=2**24)
    halting: Name | None = None
    native: NativeRule | None = None


class Gate(Part):
    """A per-row binary decision before gated stages: open where `score >= threshold` (survey eq. 8).

    A gate whose score was never computed, because its stage is gated itself and did not run, is shut.

    Attributes:
        stage: Index of the stage whose graph computes its score; None where the score depends on no input.
        priority: The score that depends on no input, in [0, 1]: which blocks run is then the caller's choice, and those
            of highest priority are the ones to keep. None where a stage computes it.
        threshold: Default of the serving-time knob.
    """

    name: Name
    stage: int | None = Field(default=None, ge=0)
    priority: float | None = Field(default=None, ge=0.0, le=1.0)
    threshold: float = Field(default=0.5, ge=0.0, le=1.0)


class ImagePreprocessing(Part):
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


class TextPreprocessing(Part):
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


class Provenance(Part):
    """Where the bundle comes from. For people: nothing is decided by it."""

    source: str
    parameters: int | None = Field(default=None, ge=0)
    opset: int | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    proof: Proof | None = None


class Manifest(Part):
    """All that a server must know about a bundle. Construction checks that its parts fit together.

    Attributes:
        predicates: What the network's own code asks of its tensors on the way to each exit, for people.
        min_batch: The least number of rows that the graphs run with; a smaller batch is padded.
    """

    format_version: Literal[2] = FORMAT_VERSION
    name: ModelName
    task: Literal["classification"] = "classification"
    precision: Literal["fp32", "fp16"] = "fp32"
    inputs: tuple[Tensor, ...] = Field(min_length=1)
    carries: tuple[Tensor, ...] = ()
    stages: tuple[Stage, ...] = Field(min_length=1, max_length=4096)
    shared_weights: SharedWeights | None = None
    exits: tuple[Exit, ...] = Field(min_length=1, max_length=1024)
    predicates: tuple[Predicate, ...] = ()
    gates: tuple[Gate, ...] = Field(default=(), max_length=1024)
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

    @cached_property
    def native(self) -> NativeRules | None:
        """The network's own exit rules, one per non-final exit; None if it has none."""
        rules_N = tuple(exit_.native for exit_ in self.exits[:-1] if exit_.native is not None)
        return NativeRules(rules_N) if rules_N else None

    @property
    def scored_gates(self) -> tuple[tuple[int, ...], ...]:
        """For each stage the gates that it scores, in the order of its scores' columns."""
        return tuple(
            tuple(index for index, gate in enumerate(self.gates) if gate.stage == stage)
            for stage in range(len(self.stages))
        )

    @property
    def has_common_classes(self) -> bool:
        """Whether all exits have as many classes, so that a label of one means the same at another."""
        return len({exit_.num_classes for exit_ in self.exits}) == 1

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
        weights = (self.shared_weights.file,) if self.shared_weights is not None else ()
        return (*(stage.graph for stage in self.stages), *weights, *tokenizer)

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
