"""A short benchmark by guidellm, on prompts that it reads from a file: ``URL MODEL``."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

REQUESTS = 6
TOKENS = 8


def main(url: str, model: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prompts, report = Path(folder, "prompts.jsonl"), Path(folder, "report.json")
        asked = [
            {"prompt": f"Once upon a time there was number {i}", "output_tokens_count": TOKENS}
            for i in range(2 * REQUESTS)
        ]
        prompts.write_text("\n".join(map(json.dumps, asked)))
        backend = f"kind=openai_http,target={url},model={model},request_format=/v1/completions"
        command = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"]
        command += ["--backend", backend, "--profile", "kind=concurrent,streams=2"]
        command += ["--constraint", f"kind=max_requests,count={REQUESTS}"]
        command += ["--data", f"kind=json_file,path={prompts}"]
        command += ["--output", f"kind=json,path={report}"]
        subprocess.run(command, check=True, timeout=240, stdout=sys.stderr)
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    answered = benchmark["requests"]["successful"]
    found = {
        "successful": len(answered),
        "errored": len(benchmark["requests"]["errored"]),
        "output_tokens": [request["output_tokens"] for request in answered],
        "timed": all(request["time_to_first_token_ms"] > 0 for request in answered),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
