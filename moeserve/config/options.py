"""Every setting, declared once in the group of those who use it; defaults and bounds are here, and
in ``steps``.

    group           used by                                       taken by
    ModelOptions    every rank, as it loads                       serve, worker, generate, batch
    LoadOptions     every rank, as it reads weights               serve, worker, generate, batch
    CacheOptions    every rank, as it makes its KV cache          serve, worker, generate, batch
    OffloadOptions  every rank: a budget that weights may exceed  serve, worker, generate, batch
    StepOptions     every rank: bounds of a step                  serve, worker, generate, batch
    ProcessOptions  every rank: its process                       serve, worker, generate, batch
    RequestOptions  every rank: how requests are taken in         serve, worker, batch
    EpOptions       every rank of several                         serve, worker
    LogOptions      every rank                                    serve, worker
    AnswerOptions   whoever answers: fields and what is parsed    serve, worker, batch
    DoorOptions     ranks with doors: what clients connect to     serve, worker

What clusters have beside these is in ``cluster``, and who takes what in ``commands``.

A class that is several groups has their settings flat, and can be passed wherever one of the groups
is expected: a ``ServeConfig`` is a ``LoadOptions``. Options are frozen; a value out of bounds is a
``pydantic.ValidationError``, which ``sources`` turns into a ConfigError that names the source.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from moeserve.config.group import Options
from moeserve.config.kinds import Bytes, Count, Port, Secret
from moeserve.config.steps import StepOptions

Dtype = Literal["auto", "float32", "bfloat16"]
KvDtype = Literal["auto", "float32", "bfloat16", "int8"]
Quantization = Literal["auto", "none", "int8", "int4"]
Device = Literal["auto", "cpu", "cuda", "npu"]


class ModelOptions(Options):
    """Which model is served."""

    model: str = Field(
        default="demo",
        min_length=1,
        description="checkpoint folder, GGUF file, 'demo', or org/name on the hub",
    )
    served_model_name: str | None = Field(
        default=None, min_length=1, description="name that clients use; default: the folder's name"
    )
    max_model_len: Count | None = Field(
        default=None, description="tokens of prompt and answer together; default: the checkpoint's"
    )


class LoadOptions(Options):
    """How weights and KV are held, and how experts' results are added."""

    dtype: Dtype = Field(
        default="auto", description="weights in memory; auto keeps the checkpoint's"
    )
    kv_dtype: KvDtype = Field(default="auto", description="KV in memory; auto is as the weights")
    quantization: Quantization = Field(
        default="auto", description="bits of the matrices; auto as stored, none as floats"
    )
    quantize_attention: bool = Field(
        default=True, description="attention's matrices too, where --quantization rounds"
    )
    combine: Literal["exact", "ordered", "fast"] = Field(
        default="exact",
        description="how experts' results are added; exact is the same for any --ep",
    )

    @property
    def rounds(self) -> bool:
        """Whether matrices are rounded to other bits than they are stored in."""
        return self.quantization in ("int8", "int4")


class CacheOptions(Options):
    """The KV cache of a rank."""

    block_size: int = Field(default=16, ge=1, le=1024, description="tokens per KV block")
    num_blocks: Count | None = Field(
        default=None, description="KV blocks; default: sized from memory"
    )
    kv_memory: Bytes | None = Field(
        default=None, ge=1, description="memory for KV, such as 2GiB; instead of --num-blocks"
    )
    swap_memory: Bytes = Field(
        default=0,
        ge=0,
        description="host memory beside KV, such as 4GiB, where the KV of preempted requests waits "
        "rather than being computed again, whichever takes less time; 0: always computed again",
    )
    host_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="of this host's free memory, what KV is sized from where neither is given: "
        "less than 1 where other servers start beside this one",
    )

    @model_validator(mode="after")
    def _sized_once(self) -> Self:
        if self.num_blocks is not None and self.kv_memory is not None:
            raise ValueError("num_blocks and kv_memory both size the KV cache: set one")
        return self


class OffloadOptions(Options):
    """A model that is larger than memory."""

    memory: Bytes | None = Field(
        default=None,
        ge=1,
        description="memory that a process may take, such as 8GiB: experts that do not fit are "
        "read from disk as steps need them, or beside a CUDA device from there and from host "
        "memory; the model is one that `quantize --packed` wrote",
    )
    weights_prediction: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="read experts before their layer chooses them; auto while that is mostly right",
    )
    weights_window: int | None = Field(
        default=None,
        ge=2,
        description="layers whose attention stays in memory, the others are read too; default: all",
    )
    check_weights: bool = Field(
        default=False,
        description="compare the digest of experts whenever they are read, not only at first",
    )


class ProcessOptions(Options):
    """The process of a rank, and what it writes beside its answers."""

    device: Device = Field(
        default="cpu",
        description="what a rank computes on; auto takes an accelerator that can be used, else the "
        "CPU; the default until kernels of accelerators have run on hardware",
    )
    device_memory: Bytes | None = Field(
        default=None,
        ge=1,
        description="memory of the device, such as 40GiB, that weights, workspace, graphs and KV "
        "may take together; default: all that is free",
    )
    attention_device: Literal["device", "cpu"] = Field(
        default="device",
        description="where attention runs and KV lies: on the device of the rank, or on the host's "
        "CPU, beside experts on a CUDA device",
    )
    threads: Count | None = Field(
        default=None,
        description="CPU threads of a rank; default: its share of the host's allowed cores",
    )
    split: Literal["off", "semi"] = Field(
        default="off",
        description="semi: prompts are computed by a second process of this host, over the same "
        "weights and KV, so that they delay no token of others; one rank, on the CPU, of a model "
        "that `quantize --packed` wrote",
    )
    record_routing: Path | None = Field(
        default=None, description="safetensors file for the trace of routing decisions"
    )
    count_experts: bool = Field(
        default=False,
        description="count how often each expert is chosen, for the dashboard; steps cost more",
    )


class RequestOptions(Options):
    """How requests are taken in."""

    max_queue: Count = Field(default=1024, description="requests that may wait; more are refused")
    prefix_cache: bool = Field(default=True, description="reuse the KV of equal prompt beginnings")
    chat_template: Path | None = Field(
        default=None, description="Jinja file; default: the checkpoint's"
    )


class EpOptions(Options):
    """Ranks that share the experts (expert parallelism)."""

    ep: Count | None = Field(
        default=None,
        description="ranks that share the experts; default: 1, or as many as were launched",
    )
    ep_backend: Literal["auto", "tcp", "torch", "mpi", "shm", "nccl", "hccl", "mapped"] = Field(
        default="auto", description="how tokens travel between ranks; auto goes by where they are"
    )
    dispatcher: Literal["auto", "deepep", "deepep_low_latency", "moe_distribute"] = Field(
        default="auto",
        description="a library that moves and adds tokens between cards by itself, instead of "
        "--ep-backend; all but deepep need --combine fast",
    )
    plan: Path | None = Field(
        default=None,
        description="which rank holds which expert, from moeserve place; default: in order",
    )
    attention_ranks: Count | None = Field(
        default=None,
        description="ranks that have requests, their KV and attention: the first so many; the "
        "others run experts only; default: all",
    )
    doors: Literal["first", "all"] = Field(
        default="first",
        description="ranks that clients may connect to: rank 0, or each at a port of its own",
    )
    homes: Literal["load", "experts"] = Field(
        default="load",
        description="a request's rank: the least loaded, or near experts its kind uses",
    )
    replan: Literal["auto", "off"] = Field(
        default="off",
        description="auto: change to a better plan while serving, where that is worth it",
    )
    microbatches: Literal["auto"] | Count = Field(
        default="auto",
        description="parts of a step that overlap; auto chooses per step from measurements",
    )
    ep_trace: Path | None = Field(
        default=None, description="folder for a timeline of each rank's steps, as Perfetto opens it"
    )
    ep_deadline: float = Field(
        default=5.0, ge=0.5, le=600, description="seconds after which a silent rank is lost"
    )
    ep_secret: Secret = Field(
        default=None,
        min_length=16,
        description="what ranks on several hosts prove to know as they connect",
    )
    ep_tls: Path | None = Field(
        default=None,
        description="folder of cert.pem, key.pem, ca.pem: gRPC between ranks by mutual TLS",
    )


class LogOptions(Options):
    """What is logged, and traced."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe messages to log"
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="lines for people, or one JSON object a line"
    )
    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s/]+/?$",
        description="OpenTelemetry collector that gets spans of requests over gRPC, such as "
        "http://127.0.0.1:4317",
    )


class AnswerOptions(Options):
    """How requests are taken, and their answers read."""

    tool_parser: Literal[
        "auto", "none", "hermes", "qwen3_coder", "deepseek", "glm", "kimi", "harmony"
    ] = Field(
        default="auto", description="how the model writes tool calls; auto goes by its template"
    )
    reasoning_parser: Literal["auto", "none", "think", "harmony"] = Field(
        default="auto", description="how the model marks reasoning; auto goes by its template"
    )
    strict: bool = Field(
        default=False,
        description="refuse fields of HTTP bodies that are ignored, instead of a warning header",
    )


class DoorOptions(Options):
    """What clients connect to."""

    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on")
    grpc_port: Port | None = Field(
        default=50051, description="0 takes any free port, 'none' closes it"
    )
    http_port: Port | None = Field(
        default=8000, description="0 takes any free port, 'none' closes it"
    )
    api_key_file: Path | None = Field(
        default=None,
        description="file of NAME:KEY lines, read again when it changes; each name is a tenant",
    )
    api_key: Secret = Field(
        default=None,
        min_length=8,
        description="one key for all: 'authorization: Bearer ...'; better not on a command line, "
        "which others on the host can read: take the file, or the variable",
    )
    tls_cert: Path | None = Field(
        default=None, description="certificate chain in PEM: both doors speak TLS"
    )
    tls_key: Path | None = Field(default=None, description="key of --tls-cert, in PEM")
    tls_client_ca: Path | None = Field(
        default=None, description="authorities in PEM: clients need a certificate of one of them"
    )
    allowed_hosts: str | None = Field(
        default=None,
        min_length=1,
        description="names, by commas, that clients may ask for beside the address; '*' is any; "
        "default: any, but on loopback only its own",
    )
    allowed_origins: str | None = Field(
        default=None,
        min_length=1,
        description="pages, by commas, such as https://chat.example, that may call and read "
        "(CORS); '*' is any",
    )
    max_connections: Count | None = Field(
        default=None, description="at a door; default: from the descriptors that there may be"
    )
    idle_timeout_s: float = Field(
        default=75.0, ge=1, le=86400, description="seconds that an HTTP connection may rest"
    )
    request_log: bool = Field(
        default=True, description="a line in the log for each request of a client"
    )
    reflection: bool | None = Field(
        default=None, description="gRPC reflection; default: only when listening on loopback"
    )
    slo_ttft: float = Field(
        default=1.0,
        gt=0,
        le=3600,
        description="seconds to a first token that the dashboard calls in time",
    )
    slo_tpot: float = Field(
        default=0.1,
        gt=0,
        le=3600,
        description="seconds between tokens, on average, that the dashboard calls in time",
    )
    drain_timeout_s: float = Field(
        default=30.0, ge=0, le=3600, description="seconds that running streams get after SIGTERM"
    )

    @property
    def loopback(self) -> bool:
        return self.host == "localhost" or _is_loopback(self.host)

    @model_validator(mode="after")
    def _open_to_whom_it_should_be(self) -> Self:
        if self.grpc_port is None and self.http_port is None:
            raise ValueError("grpc_port and http_port are both none: keep at least one door open")
        return self._guarded()

    def _guarded(self) -> Self:
        """ValueError where doors cannot be both, or are open to strangers."""
        if self.grpc_port and self.grpc_port == self.http_port:
            raise ValueError(f"grpc_port and http_port are both {self.grpc_port}: choose two")
        if not (self.loopback or self.api_key or self.api_key_file or self.tls_client_ca):
            raise ValueError(
                f"host {self.host!r} can be reached by others: set api_key_file (or api_key, or "
                "tls_client_ca), or keep 127.0.0.1"
            )
        return self


# Fields of the last base come first, in help and in what is printed.
class RankModelOptions(
    ProcessOptions, StepOptions, OffloadOptions, CacheOptions, LoadOptions, ModelOptions
):
    """What a rank loads its share of the model with, and a process that is all there is."""


class EngineOptions(RequestOptions, RankModelOptions):
    """What the engine of a rank, or of a process by itself, is built with."""


class RankOptions(LogOptions, EpOptions, EngineOptions):
    """Everything that a rank without doors uses."""


class BatchConfig(AnswerOptions, EngineOptions):
    """A process that answers a file of requests, and ends."""

    objective: Literal["latency", "throughput"] = Field(
        default="throughput", description=StepOptions.described("objective")
    )
    max_queue: Count = Field(
        default=4096, description="requests of the file that are with the engine at a time"
    )


class ServeConfig(DoorOptions, AnswerOptions, RankOptions):
    """Every setting there is."""


# The defaults of ``LoadOptions``: weights and KV as the checkpoint holds them.
AS_STORED = LoadOptions()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
