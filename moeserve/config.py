"""What can be set, once: flags, environment, YAML file and defaults all come from these fields.

``--max-num-seqs 8``, ``MOESERVE_MAX_NUM_SEQS=8`` and ``max_num_seqs: 8`` say the same; of several
the first in this order wins. A key that is no field, or a value that a field refuses, is a
ConfigError that names where it came from. Knows nothing of models: what depends on the checkpoint
is checked when it is loaded.
"""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from moeserve.errors import ConfigError

ENV_PREFIX = "MOESERVE_"
ENV_ELSEWHERE = re.compile(
    "MOESERVE_(REQUIRE_NATIVE|HOST_ID|LAUNCHER|TESTBED(_HOST)?"
    # Kubernetes sets these for every service, so also for one named "moeserve".
    "|SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_.*)?)"
)
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{unit}iB": 1024 ** (i + 1) for i, unit in enumerate("KMGT")}
_UNITS |= {f"{unit}B": 1000 ** (i + 1) for i, unit in enumerate("KMGT")}
_MOST_BYTES = 1 << 60
SECRETS = ("api_key", "ep_secret")


def parse_bytes(text: object) -> object:
    """``"2GiB"`` -> 2147483648; integers pass."""
    if not isinstance(text, str):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    if not found or found[2].lower() not in units:
        raise ValueError(f"not a size; write bytes or a number with one of {', '.join(_UNITS)[2:]}")
    size = float(found[1]) * units[found[2].lower()]
    if size > _MOST_BYTES:
        raise ValueError("more than any machine has")
    return int(size)


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1)]


class ServeConfig(BaseModel):
    """Everything ``moeserve serve`` can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field("demo", min_length=1, description="checkpoint folder, or 'demo'")
    served_model_name: str | None = Field(
        None, min_length=1, description="name that clients use; default: the folder's name"
    )
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    grpc_port: Port | None = Field(50051, description="0 takes any free port, 'none' closes it")
    http_port: Port | None = Field(8000, description="0 takes any free port, 'none' closes it")
    api_key: SecretStr | None = Field(
        None, min_length=8, description="secret that clients send as 'authorization: Bearer ...'"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="weights in memory; auto keeps the checkpoint's"
    )
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        "auto", description="KV in memory; auto is as the weights"
    )
    quantization: Literal["auto", "none", "int8", "int4"] = Field(
        "auto", description="bits of the matrices; auto as stored, none as floats"
    )
    quantize_attention: bool = Field(
        True, description="attention's matrices too, where --quantization rounds"
    )
    max_model_len: Count | None = Field(
        None, description="tokens of prompt and answer together; default: the checkpoint's"
    )
    block_size: int = Field(16, ge=1, le=1024, description="tokens per KV block")
    num_blocks: Count | None = Field(None, description="KV blocks; default: sized from memory")
    kv_memory: Bytes | None = Field(
        None, ge=1, description="memory for KV, such as 2GiB; instead of --num-blocks"
    )
    max_num_seqs: Count = Field(64, description="sequences in one step")
    max_num_batched_tokens: Count = Field(512, description="tokens in one step")
    max_queue: Count = Field(1024, description="requests that may wait; more are refused")
    prefix_cache: bool = Field(True, description="reuse the KV of equal prompt beginnings")
    chat_template: Path | None = Field(None, description="Jinja file; default: the checkpoint's")
    threads: Count | None = Field(
        None, description="CPU threads of a rank; default: its share of the host's allowed cores"
    )
    ep: Count | None = Field(
        None, description="ranks that share the experts; default: 1, or as many as were launched"
    )
    ep_backend: Literal["auto", "tcp", "torch", "mpi", "shm"] = Field(
        "auto", description="how tokens travel between ranks; auto goes by where they are"
    )
    combine: Literal["exact", "ordered", "fast"] = Field(
        "exact", description="how experts' results are added; exact is the same for any --ep"
    )
    plan: Path | None = Field(
        None, description="which rank holds which expert, from moeserve place; default: in order"
    )
    homes: Literal["load", "experts"] = Field(
        "load", description="a request's rank: the least loaded, or near experts its kind uses"
    )
    replan: Literal["auto", "off"] = Field(
        "off", description="auto: change to a better plan while serving, where that is worth it"
    )
    microbatches: Literal["auto"] | Count = Field(
        "auto", description="parts of a step that overlap; auto chooses per step from measurements"
    )
    ep_trace: Path | None = Field(
        None, description="folder for a timeline of each rank's steps, as Perfetto opens it"
    )
    ep_deadline: float = Field(
        5.0, ge=0.5, le=600, description="seconds after which a silent rank is lost"
    )
    ep_secret: SecretStr | None = Field(
        None, min_length=16, description="what ranks on several hosts prove to know as they connect"
    )
    ep_tls: Path | None = Field(
        None, description="folder of cert.pem, key.pem, ca.pem: control between ranks by mutual TLS"
    )
    record_routing: Path | None = Field(
        None, description="safetensors file for the trace of routing decisions"
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, le=3600, description="seconds that running streams get after SIGTERM"
    )
    reflection: bool | None = Field(
        None, description="gRPC reflection; default: only when listening on loopback"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe messages to log"
    )

    @field_serializer("api_key", "ep_secret", when_used="unless-none")
    def _reveal(self, secret: SecretStr) -> str:
        return secret.get_secret_value()

    @property
    def loopback(self) -> bool:
        return self.host == "localhost" or _is_loopback(self.host)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.grpc_port is None and self.http_port is None:
            raise ValueError("grpc_port and http_port are both none: keep at least one door open")
        if self.grpc_port and self.grpc_port == self.http_port:
            raise ValueError(f"grpc_port and http_port are both {self.grpc_port}: choose two")
        if self.num_blocks is not None and self.kv_memory is not None:
            raise ValueError("num_blocks and kv_memory both size the KV cache: set one")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs="
                f"{self.max_num_seqs}: every running sequence needs a token in a step"
            )
        if not self.loopback and self.api_key is None:
            raise ValueError(
                f"host {self.host!r} can be reached by others: set api_key, or keep 127.0.0.1"
            )
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and the words that name where it came from."""

    value: object
    source: str


def add_options(parser: argparse.ArgumentParser, only: Iterable[str] | None = None) -> None:
    """Adds one option per field (or per field in ``only``), ``--config`` and ``--print-config``."""
    group = parser.add_argument_group("settings (also as MOESERVE_<NAME>, or in --config)")
    chosen = set(ServeConfig.model_fields) if only is None else set(only)
    for name, field in ServeConfig.model_fields.items():
        if name in chosen:
            _add_option(group, name, field)
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML file of settings")
    parser.add_argument(
        "--print-config", action="store_true", help="print the settings as YAML, and end"
    )


def _add_option(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    text = f"{field.description}" + ("" if field.default is None else f" [{field.default}]")
    flag = flag_of(name)
    if _allows(field, bool):
        group.add_argument(
            flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text
        )
        return
    choices = _choices(field.annotation)
    metavar = "{" + ",".join(choices) + "}" if choices else name.rsplit("_", 1)[-1].upper()
    group.add_argument(flag, dest=name, default=None, metavar=metavar, help=text.replace("%", "%%"))


def load_config(
    flags: Mapping[str, object], environ: Mapping[str, str], file: Path | None = None
) -> ServeConfig:
    """Flags over environment over file over defaults. A flag that is None was not given."""
    settings = _from_file(file) if file is not None else {}
    settings |= _from_environ(environ)
    settings |= {
        name: Setting(value, flag_of(name))
        for name, value in flags.items()
        if value is not None and name in ServeConfig.model_fields
    }
    try:
        return ServeConfig.model_validate({name: _value(name, s) for name, s in settings.items()})
    except ValidationError as refused:
        raise ConfigError(_explain(refused, settings)) from refused


def config_from_args(args: argparse.Namespace, environ: Mapping[str, str]) -> ServeConfig:
    """What a parser made by ``add_options`` read, completed from environment and file."""
    return load_config(vars(args), environ, args.config)


def to_yaml(config: ServeConfig) -> str:
    """Loads back to the same config; secrets that are set stand there in clear."""
    held = [name for name in SECRETS if getattr(config, name) is not None]
    lines = f"# holds {' and '.join(held)}: keep private\n" if held else ""
    return lines + yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def to_environ(config: ServeConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` for another process that is to have this config, whatever was set in there."""
    others = {
        key: value
        for key, value in environ.items()
        if not key.startswith(ENV_PREFIX) or ENV_ELSEWHERE.fullmatch(key)
    }
    settings = config.model_dump(mode="json")
    return others | {
        ENV_PREFIX + name.upper(): "none" if value is None else str(value)
        for name, value in settings.items()
    }


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _from_environ(environ: Mapping[str, str]) -> dict[str, Setting]:
    found = {}
    for key, value in environ.items():
        if not key.startswith(ENV_PREFIX) or ENV_ELSEWHERE.fullmatch(key):
            continue
        name = key.removeprefix(ENV_PREFIX).lower()
        _require_known(name, key, ENV_PREFIX, str.upper)
        found[name] = Setting(value, key)
    return found


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not the last one's."""


def _mapping_once(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{node.start_mark.name}: {key} is given twice; keep one")
    return loader.construct_mapping(node)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_once)


def _from_file(file: Path) -> dict[str, Setting]:
    try:
        with file.open(encoding="utf-8") as text:
            read = yaml.load(text, _StrictLoader)
    except OSError as error:
        raise ConfigError(f"--config {file}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file}: is not YAML: {error}") from error
    if read is None:
        return {}
    if not isinstance(read, dict):
        raise ConfigError(
            f"--config {file}: expected 'name: value' lines, not {type(read).__name__}"
        )
    found = {}
    for key, value in read.items():
        name = str(key).replace("-", "_")
        _require_known(name, f"{file}: {key}", f"{file}: ", str)
        if name in found:
            raise ConfigError(f"{file}: {name} is given twice; keep one")
        found[name] = Setting(value, f"{file}: {key}")
    return found


def _require_known(name: str, shown: str, prefix: str, spell: Any) -> None:
    if name in ServeConfig.model_fields:
        return
    close = difflib.get_close_matches(name, ServeConfig.model_fields, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{spell(close[0])}?" if close else "see --help for the settings"
    raise ConfigError(f"{shown}: unknown setting; {hint}")


def _value(name: str, setting: Setting) -> object:
    """Text may say ``none``; a YAML boolean is no number."""
    field = ServeConfig.model_fields[name]
    value = setting.value
    if isinstance(value, str) and value.lower() in ("none", "null") and _allows(field, NoneType):
        return None
    if isinstance(value, bool) and not _allows(field, bool):
        raise ConfigError(f"{setting.source}={value}: expected {field.description}, not a boolean")
    return value


def _allows(field: FieldInfo, kind: type) -> bool:
    return field.annotation is kind or kind in get_args(field.annotation)


def _choices(annotation: Any) -> list[str]:
    """The words a field takes; N where it takes a number instead."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    words = [word for kind in get_args(annotation) for word in _choices(kind)]
    return [*words, "N"] if words else []


def _explain(refused: ValidationError, settings: Mapping[str, Setting]) -> str:
    lines = []
    for error in refused.errors(include_url=False, include_context=False):
        reason = error["msg"].removeprefix("Value error, ")
        name = str(error["loc"][0]) if error["loc"] else ""
        if name not in settings:
            lines.append(reason)
            continue
        shown = "..." if name in SECRETS else repr(settings[name].value)
        lines.append(f"{settings[name].source}={shown}: {reason}")
    return "; ".join(dict.fromkeys(lines))
