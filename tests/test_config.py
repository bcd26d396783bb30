"""Flags, environment, file and defaults say the same things, in this order of precedence."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from moeserve.config.cluster import (
    CacheMemberOptions,
    ClusterOptions,
    EverySetting,
    GatewayConfig,
    GatewayOptions,
    MemberOptions,
    PeerConfig,
)
from moeserve.config.commands import GROUPS
from moeserve.config.kinds import parse_bytes
from moeserve.config.options import (
    BatchConfig,
    Dtype,
    KvDtype,
    ModelOptions,
    RankOptions,
    ServeConfig,
)
from moeserve.config.reference import reference
from moeserve.config.sources import (
    add_options,
    flag_of,
    load_config,
    options_of,
    read_settings,
    settings_from_args,
    to_environ,
    to_yaml,
)
from moeserve.errors import ConfigError
from moeserve.kernels.wire import Combine
from moeserve.models.weights import torch_dtype
from moeserve.pools.routing.named import DEFAULT_POLICY, POLICIES

# One valid value for each field, none of them the default.
OTHER: dict[str, Any] = {
    "model": "some/folder",
    "served_model_name": "name",
    "host": "::1",
    "grpc_port": 1234,
    "http_port": 0,
    "api_key": "secret-secret",
    "api_key_file": "keys",
    "tls_cert": "cert.pem",
    "tls_key": "key.pem",
    "tls_client_ca": "ca.pem",
    "allowed_hosts": "api.example",
    "allowed_origins": "https://chat.example",
    "max_connections": 100,
    "idle_timeout_s": 20.0,
    "dtype": "bfloat16",
    "kv_dtype": "int8",
    "quantization": "int8",
    "quantize_attention": False,
    "max_model_len": 99,
    "block_size": 8,
    "num_blocks": 77,
    "kv_memory": 2**31,
    "swap_memory": 2**30,
    "host_share": 0.25,
    "objective": "throughput",
    "prefill_mode": "layer",
    "split": "semi",
    "speculation": "ngram",
    "draft_model": "small/folder",
    "ttft_target": 900.0,
    "tpot_target": 45.5,
    "fairness": "off",
    "memory": 2**33,
    "weights_prediction": "on",
    "weights_window": 4,
    "check_weights": True,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 128,
    "max_queue": 5,
    "prefix_cache": False,
    "chat_template": "chat.jinja",
    "device": "auto",
    "device_memory": 2**34,
    "attention_device": "cpu",
    "threads": 2,
    "ep": 4,
    "ep_backend": "shm",
    "dispatcher": "deepep",
    "combine": "ordered",
    "plan": "plan.json",
    "attention_ranks": 2,
    "doors": "all",
    "homes": "experts",
    "microbatches": 2,
    "replan": "auto",
    "ep_trace": "traces",
    "ep_deadline": 2.5,
    "ep_secret": "sixteen-or-longer",
    "ep_tls": "tls",
    "record_routing": "trace.safetensors",
    "tool_parser": "glm",
    "reasoning_parser": "think",
    "drain_timeout_s": 1.5,
    "otlp_endpoint": "http://127.0.0.1:4317",
    "count_experts": True,
    "slo_ttft": 0.7,
    "slo_tpot": 0.03,
    "reflection": True,
    "strict": True,
    "log_level": "debug",
    "log_format": "json",
    "request_log": False,
}
each_field = pytest.mark.parametrize("name", ServeConfig.model_fields)
Writer = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    def as_yaml(text: str = "", **settings: Any) -> Path:
        path = tmp_path / "serve.yaml"
        path.write_text(text or yaml.safe_dump(settings))
        return path

    return as_yaml


def by_flags(*words: str, environ: dict[str, str] | None = None) -> ServeConfig:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser)
    return options_of(settings_from_args(parser.parse_args(words), environ or {}), ServeConfig)


def flag_words(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [flag_of(name) if value else "--no-" + flag_of(name)[2:]]
    return [flag_of(name), str(value)]


def plain(config: ServeConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def test_every_field_is_tried_here() -> None:
    assert OTHER.keys() == ServeConfig.model_fields.keys()


# Defaults of others that follow from one.
FOLLOWING = {"objective": {"max_num_seqs": 1024, "max_num_batched_tokens": 4096}}


@each_field
def test_a_flag_a_variable_and_a_line_say_the_same(name: str, write: Writer) -> None:
    value = OTHER[name]
    expected = plain(ServeConfig()) | {name: value} | FOLLOWING.get(name, {})
    assert plain(by_flags(*flag_words(name, value))) == expected
    assert plain(load_config({}, {f"MOESERVE_{name.upper()}": str(value)})) == expected
    assert plain(load_config({}, {}, write(**{name: value}))) == expected


@each_field
def test_every_field_explains_itself(name: str) -> None:
    assert ServeConfig.model_fields[name].description


def test_flags_win_over_environment_over_file_over_defaults(write: Writer) -> None:
    file = write(max_queue=2, block_size=4, threads=6)
    environ = {"MOESERVE_MAX_QUEUE": "3", "MOESERVE_BLOCK_SIZE": "5"}
    config = load_config({"max_queue": "4"}, environ, file)
    assert (config.max_queue, config.block_size, config.threads) == (4, 5, 6)
    assert config.max_num_seqs == ServeConfig().max_num_seqs


@pytest.mark.parametrize("name", sorted(OTHER.keys() - {"num_blocks"}))
def test_what_is_printed_loads_back_to_the_same(name: str, write: Writer) -> None:
    config = ServeConfig.model_validate({name: OTHER[name]})
    assert load_config({}, {}, write(to_yaml(config))) == config


def test_all_settings_at_once_load_back_to_the_same(write: Writer) -> None:
    config = ServeConfig.model_validate({k: v for k, v in OTHER.items() if k != "num_blocks"})
    assert load_config({}, {}, write(to_yaml(config))) == config
    assert "keep private" in to_yaml(config)
    assert "secret-secret" not in repr(config)


@pytest.mark.parametrize("name", sorted(OTHER.keys() - {"num_blocks"}))
def test_another_process_can_be_given_the_same(name: str) -> None:
    config = ServeConfig.model_validate({name: OTHER[name]})
    environ = {"MOESERVE_BLOCK_SIZE": "99", "PATH": "/bin", "MOESERVE_REQUIRE_NATIVE": "1"}
    given = to_environ(config, environ)
    assert load_config({}, given) == config
    assert given.items() >= {"PATH": "/bin", "MOESERVE_REQUIRE_NATIVE": "1"}.items()


@pytest.mark.parametrize(
    ("give", "says"),
    [
        ({"flags": {"max_queue": "0"}}, "--max-queue='0': .*greater than or equal to 1"),
        ({"environ": {"MOESERVE_HTTP_PORT": "65536"}}, "MOESERVE_HTTP_PORT='65536': "),
        ({"file": {"dtype": "int3"}}, "serve.yaml: dtype='int3': .*'float32' or 'bfloat16'"),
        ({"file": {"threads": True}}, "serve.yaml: threads=True: .*not a boolean"),
        ({"file": {"drain_timeout_s": float("nan")}}, "drain_timeout_s=nan"),
        ({"file": {"max_que": 3}}, "max_que: unknown setting; did you mean .*max_queue"),
        ({"environ": {"MOESERVE_GRPC_PRT": "1"}}, "did you mean MOESERVE_GRPC_PORT"),
        ({"environ": {"MOESERVE_XYZZY": "1"}}, "MOESERVE_XYZZY: unknown setting; see --help"),
        ({"flags": {"kv_memory": "2 lbs"}}, "--kv-memory='2 lbs': not a size"),
        ({"flags": {"kv_memory": "9" * 400}}, "--kv-memory='999.*more than any machine has"),
        ({"flags": {"num_blocks": 1, "kv_memory": 1}}, "set one"),
        ({"flags": {"grpc_port": "none", "http_port": "none"}}, "at least one door"),
        ({"flags": {"grpc_port": "99", "http_port": "99"}}, "both 99"),
        ({"flags": {"model": ""}}, "--model=''"),
        ({"flags": {"max_num_batched_tokens": 7, "max_num_seqs": 8}}, "is less than"),
    ],
)
def test_wrong_settings_name_source_key_and_remedy(
    give: dict[str, Any], says: str, write: Writer
) -> None:
    file = write(**give["file"]) if "file" in give else None
    with pytest.raises(ConfigError, match=says):
        load_config(give.get("flags", {}), give.get("environ", {}), file)


def test_a_wrong_key_is_not_shown() -> None:
    with pytest.raises(ConfigError, match=r"--api-key=\.\.\.") as caught:
        load_config({"api_key": "hunter2"}, {})
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: [", "is not YAML"),
        ("- model", "expected 'name: value' lines"),
        ("model: a\nmodel: b", "model is given twice"),
        ("max-queue: 3\nmax_queue: 4", "max_queue is given twice"),
        ("model: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_files_that_are_no_settings(text: str, says: str, write: Writer) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config({}, {}, write(text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot be read: No such file"):
        load_config({}, {}, tmp_path / "nowhere.yaml")


def test_an_empty_file_sets_nothing(write: Writer) -> None:
    assert load_config({}, {}, write("# nothing\n")) == ServeConfig()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org"])
def test_other_hosts_need_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match=r"set api_key_file .*keep 127"):
        load_config({"host": host}, {})
    assert load_config({"host": host, "api_key": "long enough"}, {}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert load_config({"host": host}, {}).loopback


def test_variables_of_others_are_left_alone() -> None:
    environ = {
        "MOESERVE_REQUIRE_NATIVE": "1",
        "MOESERVE_SERVICE_HOST": "10.0.0.1",
        "MOESERVE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "PATH": "/bin",
    }
    assert load_config({}, environ) == ServeConfig()


def test_none_takes_a_setting_back(write: Writer) -> None:
    file = write(max_model_len=9, http_port=3)
    config = load_config({"max_model_len": "none", "http_port": "none"}, {}, file)
    assert (config.max_model_len, config.http_port) == (None, None)


@pytest.mark.parametrize(
    ("text", "size"),
    [("7", 7), ("2GiB", 2**31), ("1.5 kib", 1536), ("3MB", 3_000_000), ("1TiB", 2**40), ("8b", 8)],
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@given(st.integers(1, 2**50))
def test_plain_bytes_are_themselves(size: int) -> None:
    assert parse_bytes(size) == parse_bytes(str(size)) == size


def test_help_names_every_flag() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    text = parser.format_help()
    assert all(flag_of(name) in text for name in ServeConfig.model_fields)


def test_a_verb_may_take_only_some_settings() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, ModelOptions)
    config = options_of(settings_from_args(parser.parse_args(["--model", "m"]), {}), ModelOptions)
    assert config.model == "m"
    assert "--http-port" not in parser.format_help()


def test_every_setting_is_in_one_group() -> None:
    names = [name for group in GROUPS for name in group.model_fields]
    assert sorted(names) == sorted(EverySetting.model_fields)
    assert all(issubclass(EverySetting, group) for group in GROUPS)
    of_clusters = set(OF_CLUSTERS)
    assert set(names) - of_clusters == set(ServeConfig.model_fields)


def test_another_process_may_be_given_only_what_it_uses() -> None:
    config = ServeConfig(api_key=SecretStr("secret-secret"), http_port=1, threads=3, plan=Path("p"))
    environ = {"MOESERVE_API_KEY": "secret-secret", "MOESERVE_MAX_QUEUE": "7", "PATH": "/bin"}
    given = to_environ(config, environ, RankOptions)
    ours = {name for name in given if name.startswith("MOESERVE_")}
    assert ours == {f"MOESERVE_{name.upper()}" for name in RankOptions.model_fields}
    assert "secret-secret" not in given.values()
    got = load_config({}, given)
    assert (got.threads, got.plan, got.http_port) == (3, Path("p"), ServeConfig().http_port)


def test_the_words_of_settings_are_those_of_the_code() -> None:
    assert set(get_args(ServeConfig.model_fields["combine"].annotation)) == set(Combine)
    assert torch_dtype("auto") is None
    for name in {*get_args(Dtype), *get_args(KvDtype)} - {"auto"}:
        assert str(torch_dtype(name)) == f"torch.{name}"
    routing = GatewayConfig.model_fields["routing"]
    assert set(get_args(routing.annotation)) == POLICIES.keys()
    assert routing.default == DEFAULT_POLICY


def test_the_reference_is_as_generated() -> None:
    written = Path(__file__).parents[1] / "docs" / "settings.md"
    assert written.read_text() == reference(), "make docs writes it anew"


def test_the_reference_has_every_setting_by_its_three_names() -> None:
    for name in EverySetting.model_fields:
        assert f"| `{flag_of(name)}` | `MOESERVE_{name.upper()}` | `{name}` |" in reference()


OF_CLUSTERS: dict[str, Any] = {
    "listen": "[::1]:7100",
    "advertise": "10.0.0.3",
    "join": "10.0.0.1:7000, 10.0.0.2:7000",
    "registry": "etcd://127.0.0.1:2379",
    "cluster_secret": "sixteen-or-longer",
    "cluster_tls": "tls",
    "role": "decode",
    "name": "d0",
    "kv_transport": "mooncake",
    "weights": "pool",
    "weights_folder": "weights",
    "cache_memory": 1 << 20,
    "cache_disk": 1 << 21,
    "cache_folder": "pages",
    "cache_share": 0.5,
    "routing": "freeness",
    "moves_per_s": 0.5,
}
OF_GATEWAYS = ClusterOptions.model_fields.keys() | GatewayOptions.model_fields.keys()


@pytest.mark.parametrize("name", OF_CLUSTERS)
def test_settings_of_members_are_said_in_the_same_ways(name: str, write: Writer) -> None:
    value = OF_CLUSTERS[name]
    kind = GatewayConfig if name in OF_GATEWAYS else PeerConfig
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, kind)
    words = parser.parse_args(flag_words(name, value))
    by_flag = options_of(settings_from_args(words, {}), kind)
    words = parser.parse_args(["--config", str(write(**{name: value}))])
    assert options_of(settings_from_args(words, {}), kind) == by_flag
    environ = to_environ(by_flag, {})
    assert options_of(settings_from_args(parser.parse_args([]), environ), kind) == by_flag


def test_every_setting_of_clusters_is_tried_here() -> None:
    groups = (ClusterOptions, MemberOptions, CacheMemberOptions, GatewayOptions)
    assert OF_CLUSTERS.keys() == {name for group in groups for name in group.model_fields}


def test_a_member_has_no_doors_unless_it_is_given_some() -> None:
    assert (PeerConfig().http_port, PeerConfig().grpc_port) == (None, None)
    with pytest.raises(ValueError, match="api_key_file"):
        PeerConfig(http_port=0, host="0.0.0.0")
    assert PeerConfig(http_port=0).http_port == 0


def test_a_gateway_has_the_doors_of_a_server() -> None:
    config = GatewayConfig(http_port=1, max_queue=3)
    doors = config.doors_config
    assert (doors.http_port, doors.grpc_port, doors.max_queue) == (1, 50051, 3)
    assert GatewayConfig(join=" a:1, b:2,").gateways == ("a:1", "b:2")


@pytest.mark.parametrize("wrong", ["7100", "host:", ":7", "host:70000", "host:port"])
def test_an_address_to_listen_at_has_a_host_and_a_port(wrong: str) -> None:
    with pytest.raises(ValueError, match="expected host:port"):
        GatewayConfig(listen=wrong)


@pytest.mark.parametrize(
    ("flags", "seqs", "tokens"),
    [
        ({}, 1024, 4096),
        ({"max_num_seqs": "7"}, 7, 4096),
        ({"max_num_batched_tokens": "100"}, 100, 100),
        ({"max_num_batched_tokens": "100", "max_num_seqs": "8"}, 8, 100),
    ],
)
def test_bounds_of_a_step_that_are_not_given_are_those_of_the_objective(
    flags: dict[str, object], seqs: int, tokens: int
) -> None:
    config = load_config({**flags, "objective": "throughput"}, {})
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (seqs, tokens)
    batch = options_of(read_settings(flags, {}), BatchConfig)
    assert (batch.max_num_seqs, batch.max_num_batched_tokens) == (seqs, tokens)
    assert batch.objective == "throughput"
    again = ServeConfig.model_validate(config.model_dump())
    assert again == config, "what a process hands on is what it has"


def test_more_sequences_than_tokens_are_refused_whatever_the_objective() -> None:
    with pytest.raises(ConfigError, match="is less than"):
        load_config(
            {"objective": "throughput", "max_num_batched_tokens": "7", "max_num_seqs": 8}, {}
        )
    with pytest.raises(ConfigError, match="--max-num-batched-tokens='many'"):
        load_config({"objective": "throughput", "max_num_batched_tokens": "many"}, {})
