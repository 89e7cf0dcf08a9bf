"""Runs lm-eval's own harness on a folder of weights: `lm_eval_worker.py MODEL ROWS OUT TASK...`, by an interpreter that
has lm-eval, transformers and torch. Each task's rows are `ROWS/NAME.jsonl`, in place of the data set that it names;
what OUT gets, as JSON, is by task its `acc` and for each row the log-likelihoods of its choices and whether it is
right.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
THEIRS = {"mmlu": "mmlu_abstract_algebra"}  # ours is for every subject


def main(model: str, rows: str, out: str, *names: str) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = TaskManager()
    asked: list[dict[str, Any]] = []
    for name in names:
        theirs = THEIRS.get(name, name)
        config = dict(load_yaml(manager.task_index[theirs].yaml_path, resolve_func=True))
        files = {split: str(Path(rows) / f"{name}.jsonl") for split in ("train", "validation", "test", "dev")}
        config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        asked.append({key: value for key, value in config.items() if key not in ("include", "tag")})
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "dtype": "float32", "device": "cpu"},
        tasks=asked,
        num_fewshot=0,
        log_samples=True,
        bootstrap_iters=0,
    )
    told = {}
    for name in names:
        theirs = THEIRS.get(name, name)
        samples = sorted(found["samples"][theirs], key=lambda one: one["doc_id"])
        told[name] = {
            "acc": found["results"][theirs]["acc,none"],
            "right": [one["acc"] for one in samples],
            "likely": [[response[0] for response in one["filtered_resps"]] for one in samples],
        }
    Path(out).write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
