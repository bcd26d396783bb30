"""A setting that was given and would change nothing is an error: it names its source, says why it
has no effect, and what would give it one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moeserve import cli
from moeserve.config.cluster import GatewayConfig, PeerConfig
from moeserve.config.commands import COMMANDS
from moeserve.config.effect import require_effect
from moeserve.config.options import BatchConfig, EpOptions, RankModelOptions, ServeConfig
from moeserve.config.sources import options_of, read_settings, to_yaml
from moeserve.doctor import run_doctor
from moeserve.errors import ConfigError
from moeserve.worker.command import main as worker

# Settings of ranks, none of them as by default.
OF_RANKS: dict[str, Any] = {
    "ep_backend": "tcp",
    "dispatcher": "deepep",
    "plan": "plan.json",
    "attention_ranks": "1",
    "doors": "all",
    "homes": "experts",
    "replan": "auto",
    "microbatches": "2",
    "ep_trace": "traces",
    "ep_deadline": "2.5",
    "ep_secret": "sixteen-or-longer",
    "ep_tls": "tls",
}
WITHOUT: list[tuple[dict[str, str], str]] = [
    ({"quantize_attention": "false"}, "--quantization rounds nothing: .* give .*int8 or int4"),
    ({"quantize_attention": "false", "quantization": "none"}, "--quantization rounds nothing"),
    ({"device_memory": "1GiB", "device": "cpu"}, "on the CPU, whose budget is --memory"),
    ({"reflection": "true", "grpc_port": "none"}, "grpc_port is none: .* give a --grpc-port"),
    ({"chat_template": "x", "http_port": "none"}, "http_port is none: .* give an --http-port"),
    ({"tpot_target": "50", "objective": "throughput"}, "for throughput: .* --objective latency"),
    ({"strict": "true", "http_port": "none"}, "http_port is none: .* give an --http-port"),
]


def given(
    flags: dict[str, Any], environ: dict[str, str] | None = None, file: Path | None = None
) -> tuple[ServeConfig, dict[str, Any]]:
    settings = read_settings(flags, environ or {}, file)
    return options_of(settings, ServeConfig), settings


def test_every_setting_of_ranks_is_tried_here() -> None:
    assert OF_RANKS.keys() == EpOptions.model_fields.keys() - {"ep"}


@pytest.mark.parametrize("name", OF_RANKS)
def test_a_setting_of_ranks_needs_ranks(name: str, tmp_path: Path) -> None:
    flag, variable = f"--{name.replace('_', '-')}", f"MOESERVE_{name.upper()}"
    file = tmp_path / "serve.yaml"
    file.write_text(f"{name}: {OF_RANKS[name]}")
    for source, settings in (
        (flag, given({name: OF_RANKS[name]})),
        (variable, given({}, {variable: OF_RANKS[name]})),
        (f"{file}: {name}", given({}, {}, file)),
    ):
        says = rf"^{source}=.*: has no effect, there is only one rank: leave it out, or give .*--ep"
        with pytest.raises(ConfigError, match=says) as caught:
            require_effect(*settings)
        assert "sixteen" not in caught.value.message
        require_effect(*settings, ranks=2)


@pytest.mark.parametrize(("flags", "says"), WITHOUT)
def test_what_another_setting_makes_idle_is_refused(flags: dict[str, str], says: str) -> None:
    (name, value), *others = flags.items()
    with pytest.raises(ConfigError, match=rf"^--{name.replace('_', '-')}='{value}': .*{says}"):
        require_effect(*given(flags))
    require_effect(*given(dict(others)))


def test_a_library_between_ranks_needs_no_backend() -> None:
    with pytest.raises(ConfigError, match=r"--ep-backend='tcp': .*a library moves tokens between"):
        require_effect(*given({"ep_backend": "tcp", "dispatcher": "deepep"}), ranks=2)
    require_effect(*given({"dispatcher": "deepep"}), ranks=2)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_attention_may_stay_in_floats_where_others_are_rounded(quantization: str) -> None:
    require_effect(*given({"quantize_attention": False, "quantization": quantization}))


def test_what_holds_anyway_may_be_said(tmp_path: Path) -> None:
    """So that what was printed can be read back, whatever it does not use."""
    file = tmp_path / "serve.yaml"
    file.write_text(to_yaml(ServeConfig()))
    require_effect(*given({}, {}, file))


def test_all_idle_settings_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"--plan='p': .*; --replan='auto': ") as caught:
        require_effect(*given({"plan": "p", "replan": "auto"}))
    assert caught.value.message.count("has no effect") == 2


@pytest.mark.parametrize("ep", [[], ["--ep", "1"]], ids=["no ep", "ep 1"])
def test_serve_refuses_a_plan_for_one_rank(
    ep: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "--plan", "plan.json", *ep]) == 2
    assert capsys.readouterr().err.startswith("moeserve: --plan='plan.json': has no effect")


def test_serve_takes_a_plan_for_several(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--plan", "plan.json", "--ep", "2", "--print-config"]) == 0
    assert "plan: plan.json" in capsys.readouterr().out


@pytest.mark.parametrize("launched", [{}, {"RANK": "0", "WORLD_SIZE": "1"}], ids=["by hand", "one"])
def test_a_worker_that_is_alone_refuses_settings_of_ranks(
    launched: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} if launched else {}
    for name, value in (launched | there).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MOESERVE_HOMES", "experts")
    assert worker(["--model", "demo"]) == 2
    assert "MOESERVE_HOMES='experts': has no effect" in capsys.readouterr().err


def test_generate_refuses_what_only_a_server_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("http_port: 1234\napi_key: secret-secret")
    monkeypatch.setenv("MOESERVE_GRPC_PORT", "1235")
    assert cli.main(["generate", "--prompt", "x", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert f"{file}: api_key=...: has no effect in moeserve generate" in said
    assert f"{file}: http_port=1234: has no effect in moeserve generate" in said
    assert "secret" not in said
    assert "1235" not in said


def test_variables_of_a_server_are_left_to_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOESERVE_API_KEY", "secret-secret")
    assert cli.main(["generate", "--prompt", "x", "--print-config"]) == 0
    assert "secret" not in capsys.readouterr().out


def test_generate_refuses_what_it_takes_where_that_is_idle(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["generate", "--prompt", "x", "--no-quantize-attention"]) == 2
    assert "--quantize-attention=False: has no effect" in capsys.readouterr().err


def test_evaluate_refuses_attention_in_floats_where_nothing_is_rounded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["evaluate", "--no-quantize-attention"]) == 2
    assert "--no-quantize-attention: has no effect" in capsys.readouterr().err


def test_the_doctor_says_that_serve_would_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESERVE_PLAN", "plan.json")
    report = run_doctor()
    assert report.exit_status == 1
    assert report.problems[0].found.startswith("MOESERVE_PLAN='plan.json': has no effect")


def test_commands_take_whole_groups() -> None:
    assert COMMANDS["moeserve generate"] is RankModelOptions
    assert COMMANDS["moeserve batch"] is BatchConfig
    others = {ServeConfig, PeerConfig, GatewayConfig}
    assert set(COMMANDS.values()) == others | {RankModelOptions, BatchConfig}
