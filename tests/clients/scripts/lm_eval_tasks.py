"""Evaluates tasks of a folder on ``local-completions``: URL, model, folder, and the tasks.

Prints the metrics of each task, and what was answered to each of its documents.
"""

import json
import sys

import lm_eval
from lm_eval.tasks import TaskManager

url, model, folder, *tasks = sys.argv[1:]
results = lm_eval.simple_evaluate(
    model="local-completions",
    model_args={
        "model": model,
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "remote",
        "max_length": 1024,
        "num_concurrent": 2,
        "batch_size": 2,
    },
    tasks=tasks,
    task_manager=TaskManager(include_path=folder, include_defaults=False),
    bootstrap_iters=0,
    log_samples=True,
)
assert results is not None
answers = {
    task: [sample["filtered_resps"] for sample in samples]
    for task, samples in results["samples"].items()
}
print(json.dumps({"metrics": results["results"], "answers": answers}, default=float))
