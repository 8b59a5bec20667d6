"""Every knob of the server, its default, and what turning it either way costs.

One source of truth: each field is a flag of `offramp serve`, an environment variable `OFFRAMP_<FIELD>` and a key of the
TOML file given as `config`, in this order of precedence.
"""

import logging
import os
from pathlib import Path
from typing import Any, Literal, Self

from offramp_contract.errors import InvalidValue
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource
from pydantic_settings.exceptions import SettingsError

from offramp_server.choice import Fields, parse_defaults
from offramp_server.engine_settings import EngineSettings

logger = logging.getLogger("offramp.server")

MIB = 2**20


class ServerSettings(BaseSettings):
    """The server's settings, validated and immutable."""

    model_config = SettingsConfigDict(env_prefix="OFFRAMP_", extra="forbid", frozen=True, env_ignore_empty=True)

    config: Path | None = Field(None, description="A TOML file with any of these settings; flags and environment win.")

    host: str = Field(
        "127.0.0.1",
        description="Address to listen on. The default is reachable from this machine alone; 0.0.0.0 is reachable "
        "from the network, where an api_key or a proxy that asks for one should stand in front.",
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one and logs which.")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|(cuda|tensorrt)(:\d{1,4})?)$",
        description="Where stages run: auto (CUDA if usable, else the CPU), cpu, cuda:0, tensorrt:0. A device that "
        "cannot be used stops the start, except with auto.",
    )
    cuda_graphs: bool = Field(
        True,
        description="Capture stages as CUDA graphs at the profiled batch sizes where warm-up measures that this is "
        "faster. A captured stage holds its weights in GPU memory twice; off saves that.",
    )
    tensorrt_cache: Path | None = Field(
        None,
        description="Folder in which TensorRT keeps the engines it builds, writable by nobody else: what lies there is "
        "run. Unset builds them at every start, which takes minutes.",
    )
    tensorrt_fp16: bool = Field(
        False,
        description="Let TensorRT compute in float16 where it sees fit: faster, and proved by nobody; a bundle "
        "exported with --precision fp16 was.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Threads for stages to run on: of all together, or of each if --runners is given. More than the "
        "cores at hand make every stage slower; fewer leave cores for the HTTP side. Unset: the cores, with --runners "
        "shared out among them.",
    )
    runners: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Stages that run side by side at most, a part of the cores each. Unset: on a CPU a stage gets "
        "every thread while few rows wait, and while many do as many run side by side as were measured to do most.",
    )
    inline_ms: float = Field(
        2.0,
        ge=0,
        le=100,
        description="A row that comes alone to an idle CPU runs on the thread that has read it if all stages of its "
        "model take at most so long: nobody is woken for it. Other connections wait meanwhile. 0 never does it.",
    )

    max_batch: int = Field(
        32,
        ge=1,
        le=4096,
        description="Most rows that run a stage together. Higher raises throughput where a stage's time grows slower "
        "than its batch (GPUs), and takes longer to profile at start; lower keeps the wait behind a full batch short.",
    )
    max_inflight_samples: int = Field(
        4096,
        ge=1,
        description="Most admitted, unanswered rows. Lower refuses sooner (429) and bounds memory; higher lets bursts "
        "wait instead.",
    )
    max_wait_ms: float = Field(
        2000.0,
        gt=0,
        allow_inf_nan=False,
        description="Longest predicted wait for the device at which requests are still admitted. Lower refuses sooner "
        "under load (429) instead of answering late.",
    )
    margin_ms: float = Field(
        2.5,
        ge=0,
        allow_inf_nan=False,
        description="Time kept free between a dispatch's predicted end and a deadline, for handing the answer to the "
        "client. Higher keeps more latency budgets and cuts depth sooner.",
    )
    fair_share_ms: float = Field(
        50.0,
        gt=0,
        allow_inf_nan=False,
        description="Device time by which one model may run ahead of another with work waiting. Lower is fairer from "
        "moment to moment; higher keeps more deadlines of the busier model.",
    )
    warm_up_s: float = Field(
        3.0,
        gt=0,
        allow_inf_nan=False,
        description="Time spent on profiling each model when it is loaded. Longer predicts stage times better from the "
        "first request on; shorter is ready sooner.",
    )
    default_latency_ms: float | None = Field(
        2000.0,
        gt=0,
        allow_inf_nan=False,
        description="Budget of requests that name none. Lower keeps the server responsive under load at the price of "
        "forced exits; unset lets such requests run to their policy's exit however long they wait.",
    )
    max_latency_ms: float = Field(
        600_000.0,
        gt=0,
        allow_inf_nan=False,
        description="Largest budget a request may name; above it the answer is 422. Lower bounds how long work may "
        "queue.",
    )
    depth_floor: int = Field(
        0,
        ge=0,
        description="No request leaves voluntarily before this exit. Higher guards quality against careless "
        "thresholds; 0 leaves it to the requests.",
    )
    depth_cap: int | None = Field(
        None,
        ge=0,
        description="No request runs beyond this exit. Lower bounds the compute of every row; unset allows full depth.",
    )

    max_rows: int = Field(
        256,
        ge=1,
        description="Most rows in one request; above it the answer is 413. Higher lets one client send large batches, "
        "which others then wait behind.",
    )
    max_body_bytes: int = Field(
        32 * MIB,
        ge=1024,
        description="Largest body as sent, counted while it arrives; above it the answer is 413 and the rest is not "
        "kept. Memory per open request is bounded by a few times this.",
    )
    max_decoded_bytes: int = Field(
        64 * MIB,
        ge=1024,
        description="Largest body after Content-Encoding is undone; above it the answer is 413. Guards against a small "
        "gzip that expands a thousandfold.",
    )
    max_image_pixels: int = Field(
        2**25,
        ge=1,
        description="Most pixels of one image, read from its header before decoding; above it the answer is 413. "
        "Memory while decoding is about 4 bytes per pixel and decode thread.",
    )
    decode_threads: int = Field(
        2,
        ge=1,
        le=64,
        description="Threads that decode images, tokenise texts and parse large bodies. More decode in parallel but "
        "take cores from the stages.",
    )

    http_workers: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes that parse, check and write HTTP in front of the engine. 1 does it in the engine's own "
        "process, which costs least; more pay where HTTP, not the device, is the limit and cores are free for them.",
    )
    http_worker_memory_bytes: int = Field(
        256 * MIB,
        ge=MIB,
        le=64 * 1024 * MIB,
        description="With several http_workers, memory that each shares with the engine for the inputs of requests in "
        "flight; taken as it is used. When it is full requests wait, and one whose inputs are larger gets 413.",
    )
    max_connections: int = Field(
        1024,
        ge=1,
        description="Most open connections, shared out evenly among http_workers; requests on further ones get 503. "
        "Lower bounds memory and file handles.",
    )
    max_header_bytes: int = Field(
        32768, ge=1024, description="Largest request line and headers together; above it the answer is 431."
    )
    header_timeout_s: float = Field(
        10.0,
        gt=0,
        le=3600,
        description="A connection that has not sent complete headers within this time gets 408 and is closed. Lower "
        "frees slots held by slow or idle peers sooner; too low cuts off clients on poor links.",
    )
    body_timeout_s: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="A body that has not arrived whole within this time gets 408. Lower bounds how long a slow upload "
        "holds memory; max_body_bytes over the slowest client's bandwidth is the least that suits everyone.",
    )
    keep_alive_timeout_s: int = Field(
        75,
        ge=0,
        le=3600,
        description="Seconds an idle connection stays open. Keep it above the load balancer's own, so that the "
        "balancer closes first; lower frees connections sooner and costs clients new handshakes.",
    )

    api_key: SecretStr | None = Field(
        None,
        min_length=8,
        description="If set, every request needs it as `Authorization: Bearer` or `x-api-key`, except health, metrics "
        "and docs. Unset lets in everyone who reaches the port.",
    )
    repository_control: bool = Field(
        False,
        description="Allow /v2/repository/models/{m}/load and unload. On, whoever may call the server may also change "
        "what it serves; off answers 403.",
    )
    repository_poll_s: float = Field(
        5.0,
        ge=0,
        le=86_400,
        description="How often the repository is looked through for new, changed and removed bundles, which are then "
        "loaded, swapped in and unloaded while the server runs; 0 never looks. Lower notices sooner.",
    )
    default_model: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="Model that answers requests naming none. Unset: the only one served; with several such requests "
        "are refused.",
    )
    default_operating_point: str | None = Field(
        None,
        max_length=4096,
        description="What serves requests that choose neither policy nor budget: the name of a calibrated operating "
        "point, compute=SHARE or accuracy=SHARE; MODEL:… for one model, several with commas between. A model whose "
        "calibration cannot give it is not served. Unset: each bundle's default policy.",
    )
    rebatch: bool = Field(
        True,
        description="Run survivors of different batches together. Off, a batch stays one to its end: for comparison.",
    )
    hold: bool = Field(
        True,
        description="Hold a part-full batch for rows that are on their way to it, where the measured profile says that "
        "it pays. Off, the fullest batch goes as it is: for comparison.",
    )
    batch_timeout_ms: float | None = Field(
        None,
        gt=0,
        le=60_000,
        description="Start a batch that is not full only when its oldest row has waited for so long. Unset starts it "
        "as soon as the device is free; a timeout adds its wait to quiet hours, and is for comparison.",
    )
    forced_exits: bool = Field(
        True,
        description="Let a row that is short of time leave with the answer it has, and go past gated stages. Off, it "
        "runs on to where its policy lets it leave, however late: for comparison.",
    )
    gears: bool = Field(
        True,
        description="Under a backlog, move requests that leave the choice to the server along certified operating "
        "points down to the floor, and say so in the answer. Needs a floor; off, a backlog only costs time and depth.",
    )
    gear_floor_accuracy: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Least accuracy that every gear is certified for. Lower gives more room under load; unset, with no "
        "gear_floor_risk either, there are no gears.",
    )
    gear_floor_risk: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Greatest share of answers that may differ from full depth's in any gear, certified likewise. "
        "Higher gives more room under load; beside gear_floor_accuracy both hold.",
    )
    drain_timeout_s: float = Field(
        30.0,
        ge=0,
        le=3600,
        description="After SIGTERM, how long admitted requests may take before they are answered with an error. "
        "Keep it below the orchestrator's kill delay.",
    )
    access_log: bool = Field(
        False, description="Log a line per request. Costs some microseconds each; /metrics counts them without it."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe message that is logged. debug adds one line per refused request."
    )

    @field_validator("port", mode="before")
    @classmethod
    def _is_no_service_link(cls, value: object) -> object:
        if isinstance(value, str) and value.startswith("tcp://"):
            raise ValueError(
                "this is Kubernetes' own OFFRAMP_PORT for a service named offramp; set enableServiceLinks: false"
            )
        return value

    @field_validator("default_operating_point")
    @classmethod
    def _can_be_read(cls, value: str | None) -> str | None:
        if value is not None:
            parse_defaults(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.depth_cap is not None and self.depth_cap < self.depth_floor:
            raise ValueError("depth_cap must not be below depth_floor")
        if self.default_latency_ms is not None and self.default_latency_ms > self.max_latency_ms:
            raise ValueError("default_latency_ms must not be above max_latency_ms")
        has_floor = self.gear_floor_accuracy is not None or self.gear_floor_risk is not None
        if self.gears and "gears" in self.model_fields_set and not has_floor:
            raise ValueError("gears need a floor: set gear_floor_accuracy or gear_floor_risk")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read flags first, then the environment, then the TOML file."""
        path = init_settings().get("config") or env_settings().get("config")
        if path is None:
            return init_settings, env_settings
        if not Path(path).is_file():
            raise SettingsError(f"config: there is no file {str(path)!r}")
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=path)

    @classmethod
    def load(cls, **given: Any) -> Self:
        """Read the settings; arguments that are None count as not given.

        Raises:
            InvalidValue: With a sentence that names the setting and says what is wrong.
        """
        known = {f"OFFRAMP_{name.upper()}" for name in cls.model_fields}
        for name in sorted(os.environ):
            if name.startswith("OFFRAMP_") and name not in known:
                logger.warning("environment variable %s is no setting of the server; it is ignored", name)
        try:
            return cls(**{name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            name = ".".join(map(str, problem["loc"])) or "settings"
            message = problem["msg"].removeprefix("Value error, ")
            raise InvalidValue(f"{name}: {message[0].lower()}{message[1:]}", field=name) from None
        except (SettingsError, ValueError, OSError) as error:
            raise InvalidValue(f"settings: {error}", field="config") from None

    def defaults_of(self, model: str) -> Fields:
        """Give the fields that stand in where a request to a model chooses neither policy nor budget."""
        if self.default_operating_point is None:
            return {}
        defaults = parse_defaults(self.default_operating_point)
        return defaults.get(model, defaults.get(None, {}))

    def threads_behind_a_stage(self, cores: int) -> int:
        """Give what `threads` says, or a runner's share of the cores."""
        return self.threads or max(1, cores // (self.runners or 1))

    def engine_settings(self) -> EngineSettings:
        """Give the engine's share of the settings."""
        return EngineSettings(
            max_batch=self.max_batch,
            max_inflight_samples=self.max_inflight_samples,
            max_wait_ms=self.max_wait_ms,
            default_latency_ms=self.default_latency_ms,
            margin_ms=self.margin_ms,
            warm_up_s=self.warm_up_s,
            fair_share_ms=self.fair_share_ms,
            runners=self.runners,
            inline_ms=self.inline_ms,
            rebatch=self.rebatch,
            hold=self.hold,
            batch_timeout_ms=self.batch_timeout_ms,
            forced_exits=self.forced_exits,
            gears=self.gears,
            gear_floor_accuracy=self.gear_floor_accuracy,
            gear_floor_risk=self.gear_floor_risk,
        )
