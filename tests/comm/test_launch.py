"""Whatever starts the ranks, they know who they are, or are told which variable is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.comm.launch.environment import ALONE, SLURM_PORTS, Launch, expand_hosts, read_launch
from moeserve.errors import ConfigError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
THIRD = Launch(3, 4, 1, 2, None, None, "")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            TORCHRUN,
            replace(
                THIRD, host="10.0.0.1", port=29500, launcher="torch", agent_store=True, attempt="2"
            ),
        ),
        (DEEPSPEED, replace(THIRD, host="10.0.0.1", port=29500, launcher="torch")),
        (OPEN_MPI, replace(THIRD, launcher="openmpi")),
        (HYDRA, replace(THIRD, launcher="mpich")),
        (
            SRUN,
            replace(
                THIRD,
                host="gpu07",
                port=SLURM_PORTS[4711 * 31 % len(SLURM_PORTS)],
                launcher="slurm",
            ),
        ),
    ],
    ids=["torchrun", "deepspeed", "openmpi", "mpich", "slurm"],
)
def test_each_launcher_tells_rank_world_host_and_address(
    environ: dict[str, str], expected: Launch
) -> None:
    assert read_launch(environ) == expected
    assert read_launch(environ | {"PATH": "/bin", "HOME": "/root"}) == expected


@pytest.mark.parametrize("environ", [OPEN_MPI, HYDRA, SRUN], ids=["openmpi", "mpich", "slurm"])
def test_an_address_that_is_given_wins(environ: dict[str, str]) -> None:
    launch = read_launch(environ | {"MASTER_ADDR": "fe80::1", "MASTER_PORT": "1234"})
    assert (launch.host, launch.port) == ("fe80::1", 1234)


def test_no_launcher_is_one_rank() -> None:
    assert read_launch({}) == ALONE
    assert read_launch({"SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "a"}) == ALONE, "no srun"
    assert ALONE.one_host


def test_the_innermost_launcher_wins() -> None:
    assert read_launch(SRUN | OPEN_MPI).launcher == "openmpi"
    assert read_launch(SRUN | OPEN_MPI | TORCHRUN).launcher == "torch"
    proxies = SRUN | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    assert read_launch(proxies | HYDRA).launcher == "mpich"
    assert read_launch(SRUN | HYDRA).launcher == "slurm", "srun that speaks PMI"


def test_all_on_one_host_is_known_from_the_local_size() -> None:
    assert read_launch(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}).one_host
    assert not read_launch(OPEN_MPI).one_host
    one = SRUN | {"SLURM_JOB_NODELIST": "a", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}
    assert read_launch(one).one_host
    del one["SLURM_STEP_TASKS_PER_NODE"]
    assert read_launch(one).one_host
    assert read_launch(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1,3"}).local_world == 3


def test_without_local_sizes_only_loopback_is_one_host() -> None:
    bare = {k: TORCHRUN[k] for k in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert read_launch(bare) == Launch(3, 4, 0, None, "10.0.0.1", 29500, "torch")
    assert not read_launch(bare).one_host
    assert read_launch(bare | {"MASTER_ADDR": "localhost"}).one_host


def test_a_missing_variable_is_named(subtests: pytest.Subtests) -> None:
    for environ, without, says in [
        (TORCHRUN, "WORLD_SIZE", "WORLD_SIZE is not set"),
        (TORCHRUN, "RANK", "RANK is not set"),
        (TORCHRUN, "MASTER_ADDR", "MASTER_ADDR is not set"),
        (TORCHRUN, "MASTER_PORT", "MASTER_PORT is not set"),
        (OPEN_MPI, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE is not set"),
        (HYDRA, "PMI_SIZE", "PMI_SIZE is not set"),
        (SRUN, "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST is not set"),
        (SRUN, "SLURM_NTASKS", "SLURM_NTASKS is not set"),
    ]:
        with subtests.test(without), pytest.raises(ConfigError, match=says):
            read_launch({k: v for k, v in environ.items() if k != without})


def test_a_contradiction_names_its_variables(subtests: pytest.Subtests) -> None:
    for environ, wrong, says in [
        (TORCHRUN, {"RANK": "4"}, "RANK=4: must be less than WORLD_SIZE=4"),
        (TORCHRUN, {"RANK": "three"}, "RANK='three': expected a whole number"),
        (TORCHRUN, {"RANK": "-1"}, "RANK='-1'"),
        (TORCHRUN, {"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        (TORCHRUN, {"LOCAL_RANK": "2"}, "LOCAL_WORLD_SIZE=2: must be more than LOCAL_RANK=2"),
        (TORCHRUN, {"RANK": "0"}, "LOCAL_RANK=1: cannot be beyond RANK=0"),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE=5: .* at most WORLD_SIZE=4"),
        (TORCHRUN, {"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        (OPEN_MPI, {"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK=3"),
        (SRUN, {"SLURM_NODEID": "2"}, "SLURM_NODEID=2: .*'gpu.07-08.' has 2"),
        (SRUN, {"SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, "SLURM_STEP_TASKS_PER_NODE='2.x3.'"),
        (SRUN, {"SLURM_JOB_NODELIST": "gpu[07-08"}, "SLURM_JOB_NODELIST=.* do not close"),
        (SRUN, {"SLURM_JOB_NODELIST": "gpu[8-7]"}, "no list of numbers"),
        (SRUN, {"SLURM_JOB_NODELIST": ""}, "names no host"),
    ]:
        with subtests.test(f"{wrong}"), pytest.raises(ConfigError, match=says):
            read_launch(environ | wrong)


def test_node_lists_unfold_in_order(subtests: pytest.Subtests) -> None:
    for text, hosts in [
        ("a", ["a"]),
        ("a,b-1.x", ["a", "b-1.x"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[008-010,12]", ["n008", "n009", "n010", "n12"]),
        ("r[1-2]n[01-02],x", ["r1n01", "r1n02", "r2n01", "r2n02", "x"]),
        ("a[1,3]-ib", ["a1-ib", "a3-ib"]),
    ]:
        with subtests.test(text):
            assert expand_hosts(text, "X") == hosts


@given(st.lists(st.integers(0, 999), min_size=1, unique=True))
def test_any_set_of_numbers_comes_back(numbers: list[int]) -> None:
    folded = ",".join(f"{n:03}" for n in numbers)
    assert expand_hosts(f"n[{folded}]", "X") == [f"n{n:03}" for n in numbers]
