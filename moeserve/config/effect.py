"""A setting that was given and would change nothing is an error, which says what it needs.

Looked at are settings whose value is not the default: to be told what holds anyway is no mistake,
and what ``--print-config`` printed can be read back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moeserve.config.cluster import EMBEDDED
from moeserve.config.group import Options
from moeserve.config.options import DoorOptions, EpOptions, OffloadOptions
from moeserve.config.sources import Setting, shown
from moeserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Rule:
    """``settings`` are without effect where ``idle`` holds of the options and the ranks: ``why``
    says so, ``needs`` what would give them one."""

    settings: frozenset[str]
    idle: Callable[[Any, int], bool]
    why: str
    needs: str


def _without_http(options: Options) -> bool:
    """Whether there are doors, and none for HTTP's bodies."""
    return isinstance(options, DoorOptions) and options.http_port is None


RULES = (
    Rule(
        frozenset(EpOptions.model_fields) - {"ep"},
        lambda options, ranks: ranks == 1,
        "there is only one rank",
        "several ranks, by `--ep 2` or more, or by a launcher",
    ),
    Rule(
        frozenset({"attention_ranks"}),
        lambda options, ranks: hasattr(options, "role"),
        "every rank of a cluster's member has requests",
        "it to `moeserve serve`",
    ),
    Rule(
        frozenset({"ep_backend"}),
        lambda options, ranks: options.dispatcher != "auto",
        "a library moves tokens between ranks",
        "`--dispatcher auto`",
    ),
    Rule(
        frozenset({"split"}),
        lambda options, ranks: ranks > 1 or hasattr(options, "role"),
        "two processes share the steps of one rank that stands alone",
        "it to `moeserve serve` without `--ep`",
    ),
    Rule(
        frozenset({"device_memory"}),
        lambda options, ranks: options.device == "cpu",
        "ranks compute on the CPU, whose budget is --memory",
        "another `--device`",
    ),
    Rule(
        frozenset({"quantize_attention"}),
        lambda options, ranks: not options.rounds,
        "--quantization rounds nothing",
        "`--quantization int8` or `int4`",
    ),
    Rule(
        frozenset({"reflection"}),
        lambda options, ranks: options.grpc_port is None,
        "grpc_port is none",
        "a `--grpc-port`",
    ),
    Rule(
        frozenset({"allowed_hosts", "allowed_origins", "idle_timeout_s"}),
        lambda options, ranks: options.http_port is None,
        "browsers speak HTTP, and http_port is none",
        "an `--http-port`",
    ),
    Rule(
        frozenset({"ttft_target", "tpot_target"}),
        lambda options, ranks: options.objective == "throughput",
        "steps are made for throughput",
        "`--objective latency`",
    ),
    Rule(
        frozenset({"slo_ttft", "slo_tpot"}),
        lambda options, ranks: options.http_port is None,
        "the dashboard comes over HTTP, and http_port is none",
        "an `--http-port`",
    ),
    Rule(
        frozenset({"chat_template"}),
        lambda options, ranks: _without_http(options),
        "chats come over HTTP, and http_port is none",
        "an `--http-port`",
    ),
    Rule(
        frozenset({"strict"}),
        lambda options, ranks: _without_http(options),
        "gRPC is always strict, and http_port is none",
        "an `--http-port`",
    ),
    Rule(
        frozenset({"cache_memory", "cache_disk", "cache_folder", "cache_share"}),
        lambda options, ranks: options.role != "cache",
        "it keeps no KV of others",
        "`--role cache`",
    ),
    Rule(
        frozenset({"weights", "weights_folder", "kv_transport"}),
        lambda options, ranks: options.role == "cache",
        "it serves no model",
        "another `--role`",
    ),
    Rule(
        frozenset({"weights_folder"}),
        lambda options, ranks: options.weights == "disk",
        "weights come from this host's disk",
        "`--weights auto` or `pool`",
    ),
    Rule(
        frozenset({"host_share"}),
        lambda options, ranks: options.num_blocks is not None or options.kv_memory is not None,
        "the size of the KV cache is given",
        "neither `--num-blocks` nor `--kv-memory`",
    ),
    Rule(
        frozenset(OffloadOptions.model_fields) - {"memory"},
        lambda options, ranks: options.memory is None and options.device == "cpu",
        "all weights are in memory",
        "a budget by `--memory`",
    ),
    Rule(
        frozenset({"host_share"}),
        lambda options, ranks: options.memory is not None,
        "KV is sized within --memory",
        "no `--memory`",
    ),
    Rule(
        frozenset({"join"}),
        lambda options, ranks: options.registry != EMBEDDED,
        "members are found in --registry",
        "no `--registry`",
    ),
)


def require_effect(options: Options, settings: Mapping[str, Setting], ranks: int = 1) -> None:
    """ConfigError for settings that change nothing in a run of so many ranks."""
    fields = type(options).model_fields
    idle = [
        f"{shown(name, settings[name])}: has no effect, {rule.why}: leave it out, or give "
        f"{rule.needs.replace('`', '')}"
        for rule in RULES
        for name in fields
        if name in settings
        and name in rule.settings
        and getattr(options, name) != fields[name].default
        and rule.idle(options, ranks)
    ]
    if idle:
        raise ConfigError("; ".join(idle))
