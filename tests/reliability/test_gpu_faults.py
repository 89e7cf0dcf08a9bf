"""Errors that MLX raises on Metal, injected: a fault of the GPU is worth a restart, memory that is not there is not."""

from __future__ import annotations

import re
import socket

import pytest
from reliability.faulty import train
from train.launching import Workspace

from mlx_empire.errors import GPU_OUT_OF_MEMORY, DoesNotFitError, LostRankError, of_gpu
from mlx_empire.faults import OF_METAL

INTERACTIVE = (
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (OF_METAL["gpu"], LostRankError, "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1"),
        (INTERACTIVE, LostRankError, "let the display sleep, start over ssh"),
        (OF_METAL["gpu-memory"], LostRankError, GPU_OUT_OF_MEMORY),
        (OF_METAL["malloc"], DoesNotFitError, "needs 9 GiB"),
        ("[malloc] Unable to allocate 77 bytes.", DoesNotFitError, "needs 9 GiB"),
    ],
)
def test_what_metal_says_has_a_code_and_a_remedy(text: str, kind: type[Exception], words: str) -> None:
    told = of_gpu(RuntimeError(text), "needs 9 GiB")
    assert type(told) is kind
    assert words in str(told)
    assert text in str(told)
    assert str(told).isprintable()


@pytest.mark.parametrize(
    "error", [RuntimeError("[matmul] shapes"), ValueError(OF_METAL["gpu"]), RuntimeError("")]
)
def test_other_errors_are_not_the_gpu_s(error: Exception) -> None:
    assert of_gpu(error) is None


def test_a_refused_allocation_ends_with_3_and_the_ledger_s_line(workspace: Workspace) -> None:
    ended = train(workspace, "rank=0;step=2;phase=backward;action=malloc", ranks=0)
    assert ended.code == 3
    (said,) = ended.said
    assert "[metal::malloc] Resource limit (499000) exceeded." in said
    assert re.search(r"by the plan this rank needs [0-9.]+ MiB and may use", said)
    assert "(largest: " in said
    assert "Traceback" not in ended.stderr


def test_a_gpu_that_gave_up_ends_with_75_on_the_rank_that_has_it(workspace: Workspace) -> None:
    ended = train(workspace, "rank=1;step=2;phase=forward;action=gpu")
    assert ended.code == 75
    (said,) = [line for line in ended.said if "gave up" in line]
    assert said.startswith(f"rank 1 on {socket.gethostname()}: the GPU gave up: [METAL] Command buffer")
    assert "Traceback" not in ended.stderr
