"""`make test-gpu`, on a Mac also `make test-metal`: what the GPU computes beside what the CPU computes, as a table.

A step of every family, tuning and master weight, every optimizer, host views beside running kernels, and a run that is
killed and resumed; exit code 1 where something differs by more than is allowed. Without a GPU it says so and ends
with 0. `--device cpu` lets the CPU play the GPU, which shows that the harness runs and no more; mixtures stay in
float32 then.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mlx.core as mx
from gpu.checks import Row, optimizer_cases, optimizer_row, step_cases, step_row, views_row
from support.faults import Lab
from support.tiny_models import MIXTURES

RESUMED = 2e-3  # kernels that add in any order may differ from one run to the next


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where a row is not as it should be."""
    parser = argparse.ArgumentParser(description="The GPU beside the CPU.")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="what plays the GPU")
    parser.add_argument("--only", default="", metavar="REGEX", help="the rows whose names match")
    options = parser.parse_args(arguments)
    if options.device == "gpu" and not mx.is_available(mx.gpu):
        print("skipped: no GPU")
        return 0
    device = mx.Device(mx.gpu if options.device == "gpu" else mx.cpu)
    name = mx.device_info(device).get("device_name", "this device")
    print(f"{name} ({options.device}) beside the CPU, MLX {mx.__version__}")
    bad = 0
    for row in rows(device, re.compile(options.only)):
        print(line(row), flush=True)
        bad += not row.good
    print(f"{bad} rows differ by more than is allowed" if bad else "all rows are as they should be")
    return int(bad > 0)


def line(row: Row) -> str:
    """A row as it is printed."""
    verdict = "ok" if row.good else "NO"
    return f"{verdict}  {row.what:<48} {row.dtype:<9} {row.found:8.1e} of {row.allowed:7.1e}  {row.where}"


def rows(device: mx.Device, wanted: re.Pattern[str]) -> Iterator[Row]:
    """All rows of the table whose names match, one after the other."""
    plays = device.type == mx.DeviceType.cpu
    for name, case in step_cases().items():
        if wanted.search(name):
            stays = plays and case.family in MIXTURES
            yield step_row(name, replace(case, dtype="float32") if stays else case, device)
    for name, case in optimizer_cases().items():
        if wanted.search(name):
            yield optimizer_row(name, case, device)
    for name, row in (("host views", views_row), ("kill and resume", resumed_row)):
        if wanted.search(name):
            yield row(device)


def resumed_row(device: mx.Device) -> Row:
    """A run on the device, killed in its seventh step and started again, beside one that nothing happened to."""
    os.environ["MLX_EMPIRE_DEVICE"] = "gpu" if device.type == mx.DeviceType.gpu else "cpu"
    what = "kill and resume"
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        lab = Lab.at(Path(folder))
        ends = [lab.train("whole", ranks=1)]
        ends.append(lab.train("broken", ranks=1, fault="rank=0;step=7;phase=backward;action=kill"))
        ends.append(lab.train("broken", ranks=1))
        codes = [end.code for end in ends]
        if codes[0] or codes[1] == 0 or codes[2] or ends[2].resumed is None:
            return Row(what, "bfloat16", float("nan"), 0.0, f"exit codes {codes}; {ends[-1].stderr[-200:]!r}")
        whole, broken = lab.result("whole").curve, lab.result("broken").curve
    differences = [abs(broken[step][0] - loss) / abs(loss) for step, (loss, _) in whole.items()]
    return Row(what, "bfloat16", max(differences), RESUMED, f"losses of {len(whole)} steps")


if __name__ == "__main__":
    sys.exit(main())
