"""Worker in llama.cpp's venv: ggml's MUL_MAT_ID experts, as llama.cpp composes them.

Arguments: kind (q8_0; q4_0, whose weights go to ggml's repacked layout) and threads.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

from answer import Channel
from repeat import repeat

F32, I32 = 0, 26
TYPES = {"q8_0": 8, "q4_0": 2}
REPACK = "_Z35ggml_backend_cpu_repack_buffer_typev"
MOST_TENSORS = 256


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


def load_ggml() -> tuple[Any, Any]:
    """libggml-base and libggml-cpu, every pointer a ``void *``."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
    p, i, n, z = c_void_p, c_int, c_int64, c_size_t
    for library, name, result, arguments in (
        (base, "ggml_init", p, [InitParams]),
        (base, "ggml_new_tensor_2d", p, [p, i, n, n]),
        (base, "ggml_new_tensor_3d", p, [p, i, n, n, n]),
        (base, "ggml_mul_mat_id", p, [p, p, p, p]),
        (base, "ggml_swiglu_split", p, [p, p, p]),
        (base, "ggml_mul", p, [p, p, p]),
        (base, "ggml_add", p, [p, p, p]),
        (base, "ggml_view_2d", p, [p, p, n, n, z, z]),
        (base, "ggml_row_size", z, [i, n]),
        (base, "ggml_quantize_chunk", z, [i, POINTER(c_float), p, n, n, n, p]),
        (base, "ggml_new_graph_custom", p, [p, z, c_bool]),
        (base, "ggml_build_forward_expand", None, [p, p]),
        (base, "ggml_backend_alloc_ctx_tensors_from_buft", p, [p, p]),
        (base, "ggml_backend_alloc_ctx_tensors", p, [p, p]),
        (base, "ggml_backend_buffer_free", None, [p]),
        (base, "ggml_free", None, [p]),
        (base, "ggml_backend_tensor_set", None, [p, p, z, z]),
        (base, "ggml_backend_graph_compute", i, [p, p]),
        (base, "ggml_backend_cpu_buffer_type", p, []),
        (cpu, "ggml_backend_cpu_init", p, []),
        (cpu, "ggml_backend_cpu_set_n_threads", None, [p, i]),
        (cpu, REPACK, p, []),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return base, cpu


class GgmlExperts:
    """Experts of one kind in ggml's memory; ``prepare`` makes them, ``run`` times them."""

    def __init__(self, kind: int, threads: int) -> None:
        self.kind = kind
        self.base, self.cpu = load_ggml()
        self.backend = self.cpu.ggml_backend_cpu_init()
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, threads)
        self.held: dict[str, Any] = {}

    def new_context(self) -> Any:
        return self.base.ggml_init(InitParams(MOST_TENSORS * 512 + (1 << 20), None, True))

    def fill(self, tensor: Any, values: Any) -> None:
        self.base.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)

    def prepare(self, experts: int, hidden: int, inner: int, per_token: int) -> dict[str, Any]:
        import numpy as np

        base, cpu, held, kind = self.base, self.cpu, self.held, self.kind
        context = self.new_context()
        shapes = {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
        for name, (into, out) in shapes.items():
            held[name] = base.ggml_new_tensor_3d(context, kind, into, out, experts)
        repacked = kind == TYPES["q4_0"]
        place = getattr(cpu, REPACK)() if repacked else base.ggml_backend_cpu_buffer_type()
        held["weights"] = base.ggml_backend_alloc_ctx_tensors_from_buft(context, place)
        for name, (into, out) in shapes.items():
            one = np.random.default_rng(0).standard_normal((out, into), np.float32)
            codes = np.empty(out * base.ggml_row_size(kind, into), np.uint8)
            values = one.ctypes.data_as(POINTER(c_float))
            base.ggml_quantize_chunk(kind, values, codes.ctypes.data, 0, out, into, None)
            # A repacked tensor must be set whole.
            self.fill(held[name], np.tile(codes, experts))
        held["sizes"] = hidden, inner
        return {"repacked": repacked}

    def build(self, context: Any, tokens: int, chosen: int) -> tuple[Any, dict[str, Any]]:
        """The graph of one call, and its inputs."""
        base, held = self.base, self.held
        hidden, _ = held["sizes"]
        x = base.ggml_new_tensor_3d(context, F32, hidden, 1, tokens)
        ids = base.ggml_new_tensor_2d(context, I32, chosen, tokens)
        share = base.ggml_new_tensor_3d(context, F32, 1, chosen, tokens)
        gate = base.ggml_mul_mat_id(context, held["gate"], x, ids)
        up = base.ggml_mul_mat_id(context, held["up"], x, ids)
        inner = base.ggml_swiglu_split(context, gate, up)
        down = base.ggml_mul_mat_id(context, held["down"], inner, ids)
        each = base.ggml_mul(context, down, share)
        row = 4 * hidden
        total = base.ggml_view_2d(context, each, hidden, tokens, row * chosen, 0)
        for c in range(1, chosen):
            part = base.ggml_view_2d(context, each, hidden, tokens, row * chosen, row * c)
            total = base.ggml_add(context, total, part)
        graph = base.ggml_new_graph_custom(context, MOST_TENSORS, False)
        base.ggml_build_forward_expand(graph, total)
        return graph, {"x": x, "ids": ids, "share": share}

    def run(self, ids: list[list[int]], seconds: float, hidden: int) -> dict[str, Any]:
        import numpy as np

        base, backend = self.base, self.backend
        context = self.new_context()
        tokens, chosen = len(ids), len(ids[0])
        graph, inputs = self.build(context, tokens, chosen)
        buffer = base.ggml_backend_alloc_ctx_tensors(context, backend)
        x_TH = np.random.default_rng(1).standard_normal((tokens, hidden), np.float32)
        self.fill(inputs["x"], x_TH)
        self.fill(inputs["ids"], np.array(ids, np.int32))
        self.fill(inputs["share"], np.full((tokens, chosen), 1 / chosen, np.float32))
        took = repeat(lambda: base.ggml_backend_graph_compute(backend, graph), seconds)
        base.ggml_backend_buffer_free(buffer)
        base.ggml_free(context)
        return {"seconds": took}


def main() -> None:
    kind, threads = TYPES[sys.argv[1]], int(sys.argv[2])
    channel = Channel()
    experts = GgmlExperts(kind, threads)
    channel.ready()
    channel.serve({"prepare": experts.prepare, "run": experts.run})


if __name__ == "__main__":
    main()
