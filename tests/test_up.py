"""What `moeserve up`, `peer` and `gateway` make of their words, before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve import cli
from moeserve.config.cluster import ClusterOptions, PeerConfig
from moeserve.config.sources import read_settings
from moeserve.errors import ConfigError
from moeserve.worker.cluster_command import gateway_config, peer_config, registry_setting
from moeserve.worker.cluster_trust import joined_registry, place_to_listen, place_to_reach
from moeserve.worker.restarts import RestartLimits, Restarts
from moeserve.worker.up import ClusterPlan, shared_memory


def test_a_plan_names_its_members() -> None:
    plan = ClusterPlan(prefill=2, decode=1, cache=1, ep=2)
    assert list(plan.members()) == [
        ("prefill-0", "prefill"),
        ("prefill-1", "prefill"),
        ("decode-0", "decode"),
        ("cache-0", "cache"),
    ]
    assert plan.ranks == 6


def test_members_of_a_host_share_its_memory_unless_their_size_is_given() -> None:
    plan = ClusterPlan(prefill=2, decode=1, unified=1, cache=3, ep=2)
    assert shared_memory(PeerConfig(), plan) == {"host_share": 0.25}
    assert shared_memory(PeerConfig(host_share=0.5), plan) == {"host_share": 0.125}
    assert shared_memory(PeerConfig(num_blocks=5), plan) == {}
    assert shared_memory(PeerConfig(kv_memory=1 << 30), plan) == {}


@pytest.mark.parametrize(
    "wrong", [{"decode": 0}, {"gateways": 0}, {"prefill": 300}, {"decode": 0, "cache": 2}]
)
def test_a_cluster_that_could_answer_nobody_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        ClusterPlan(**wrong)


def test_an_etcd_of_its_own_or_of_others() -> None:
    assert registry_setting(None) == ("embedded", False)
    assert registry_setting("etcd") == ("embedded", True)
    assert registry_setting("etcd://h:1") == ("etcd://h:1", False)


def test_ports_follow_one_another_as_ranks_do() -> None:
    assert place_to_listen(ClusterOptions(listen="127.0.0.1:7000"), 2) == ("127.0.0.1", 7002)
    assert place_to_listen(ClusterOptions(listen="[::1]:0"), 2) == ("::1", 0)


def test_others_are_told_a_host_that_is_one() -> None:
    assert place_to_reach(ClusterOptions(listen="[::1]:0"), 5) == "[::1]:5"
    everywhere = {"listen": "0.0.0.0:0"}
    assert place_to_reach(ClusterOptions(**everywhere, advertise="n1"), 5) == "n1:5"
    with pytest.raises(ConfigError, match="--advertise"):
        place_to_reach(ClusterOptions(**everywhere), 5)


def test_a_member_is_unified_and_its_ranks_have_one_name() -> None:
    alone = peer_config(read_settings({"join": "h:1"}, {}))
    assert (alone.role, alone.name) == ("unified", None)
    ranks = peer_config(read_settings({"join": "h:1", "role": "decode", "ep": "2"}, {}))
    assert ranks.name is not None and ranks.name.startswith("decode-")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cache_memory": "2GiB"}, "it keeps no KV of others"),
        ({"join": "h:1", "registry": "etcd://h:2"}, "members are found in --registry"),
        ({"role": "reader"}, "role"),
        ({"listen": "nowhere"}, "expected host:port"),
    ],
)
def test_settings_of_a_member_that_change_nothing_are_errors(
    given: dict[str, str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        peer_config(read_settings(given, {}))


def test_a_gateway_takes_no_settings_of_members() -> None:
    with pytest.raises(ConfigError, match="has no effect in moeserve gateway"):
        gateway_config(read_settings({"role": "decode"}, {}))


def test_a_member_of_no_cluster_has_no_registry() -> None:
    config = PeerConfig()
    assert joined_registry(config, trust=None) is None  # type: ignore[arg-type]


@given(st.lists(st.floats(0, 100), max_size=40))
def test_a_part_is_started_anew_so_often_and_no_more(runs_s: list[float]) -> None:
    limits = RestartLimits(first_s=1.0, most_s=6.0, most=3, within_s=50.0)
    restarts, now, began = Restarts(limits), 0.0, list[float]()
    for run_s in runs_s:
        now += run_s
        lately = [end for end in began if end > now - limits.within_s]
        wait_s = restarts.wait_s(-9, now)
        assert (wait_s is None) == (len(lately) >= limits.most)
        if wait_s is None:
            assert "given up, for it has ended 4 times within 50 s" in restarts.why_not(-9)
            continue
        assert wait_s == min(limits.most_s, 2.0 ** len(lately))
        began.append(now)
        now += wait_s


def test_a_part_that_was_asked_to_leave_or_refuses_its_settings_is_not_started_anew() -> None:
    restarts = Restarts()
    assert (restarts.wait_s(0, 1.0), restarts.wait_s(2, 1.0)) == (None, None)
    assert "asked to leave" in restarts.why_not(0)
    assert "settings" in restarts.why_not(2)
    assert restarts.wait_s(1, 1.0) == 1.0


@pytest.mark.parametrize("command", ["peer", "gateway", "up"])
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    assert "--registry" in capsys.readouterr().out


def test_settings_of_a_member_are_printed_and_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["peer", "demo", "--role", "prefill", "--join", "h:1", "--print-config"]
    assert cli.main(words) == 0
    file = tmp_path / "peer.yaml"
    file.write_text(capsys.readouterr().out)
    assert cli.main(["peer", "--config", str(file), "--print-config"]) == 0
    assert capsys.readouterr().out == file.read_text()


def test_a_peer_without_a_cluster_ends_with_what_to_give(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["peer", "--role", "cache", "--cache-memory", "1MiB"]) == 2
    assert "give --join HOST:PORT or --registry" in capsys.readouterr().err
