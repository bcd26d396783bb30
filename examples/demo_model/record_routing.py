"""Record which experts the demo model's tokens choose, by domain, from a real server.

``python examples/demo_model/record_routing.py --model DIR --data DIR --out FILE.safetensors``
starts ``moeserve serve --record-routing``, sends held-out text of every domain over gRPC with its
domain as the label, and stops the server, which then writes the trace. The trace holds expert
numbers and lengths, no text.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
from data import MIXTURE

from moeserve.pb import inference_pb2 as pb
from moeserve.pb.inference_pb2_grpc import InferenceStub
from moeserve.process.child import Process, StartOptions, start

PROMPTS_PER_DOMAIN, PROMPT_TOKENS, ANSWER_TOKENS = 8, 128, 64
READY_S, DEADLINE_S, STOP_S = 120.0, 300.0, 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, required=True, help="folder written by data.py")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    command = [sys.executable, "-m", "moeserve.cli", "serve", "--model", args.model]
    command += ["--grpc-port", "0", "--http-port", "none", "--record-routing", str(args.out)]
    popen = start(command, StartOptions(own_session=False), stdout=subprocess.PIPE)
    with Process("the server", popen) as server:
        # "ready: model=NAME grpc=ADDRESS"; the process ends, and so does the line, if it fails.
        words = server.read_line(READY_S).split()[1:]
        ready = dict(word.split("=", 1) for word in words)
        with grpc.insecure_channel(ready["grpc"]) as channel, ThreadPoolExecutor(16) as pool:
            stub = InferenceStub(channel)
            asked = [
                pool.submit(stub.GenerateUnary, request, timeout=DEADLINE_S)
                for request in requests(args.data)
            ]
            made = sum(len(a.result().outputs[0].token_ids) for a in asked)
        server.send_signal(signal.SIGTERM)
        if not server.wait(STOP_S) or server.status:
            raise SystemExit("the server did not stop cleanly: its output says why")
    print(f"{args.out}: {len(asked)} sequences, {made} tokens generated")


def requests(data: Path) -> list[pb.GenerateRequest]:
    """Held-out beginnings of every domain; greedy, and on through end-of-text."""
    found = []
    for domain in MIXTURE:
        ids = np.load(data / f"{domain}.held.npy")
        for i in range(PROMPTS_PER_DOMAIN):
            start = i * (len(ids) - PROMPT_TOKENS) // PROMPTS_PER_DOMAIN
            prompt = ids[start : start + PROMPT_TOKENS].tolist()
            found.append(
                pb.GenerateRequest(
                    token_ids=pb.TokenIds(ids=prompt),
                    domain=domain,
                    sampling=pb.SamplingParams(
                        max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True
                    ),
                )
            )
    return found


if __name__ == "__main__":
    main()
