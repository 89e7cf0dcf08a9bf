"""The GPU's rehearsal can say no: the CPU plays the GPU, with a wrong value planted in each kind of row.

It was not run on a GPU by the project; see docs/limits.md.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from gpu import checks, rehearsal
from support.tiny_models import FAMILIES, OTHER_FAMILIES

CPU = mx.Device(mx.cpu)


@pytest.fixture
def a_gpu_that_errs(monkeypatch):
    """The first time that something is asked is the GPU's: what it gives is then spoiled."""

    def plant(name, spoil):
        original, asked = getattr(checks, name), []

        def answered(*arguments):
            asked.append(arguments)
            found = original(*arguments)
            return spoil(found) if len(asked) == 1 else found

        monkeypatch.setattr(checks, name, answered)

    return plant


def one_tensor_off(step):
    """Its gradient of one small tensor 2 % too long."""
    name = "model.layers.1.self_attn.k_proj.weight"
    return replace(step, gradients={**step.gradients, name: 1.02 * step.gradients[name]})


WRONG_STEPS = {
    "a gradient of one tensor": one_tensor_off,
    "the loss": lambda step: replace(step, loss=1.003 * step.loss),
    "the loss after an update": lambda step: replace(step, after=1.003 * step.after),
    "a loss that is no number": lambda step: replace(step, after=float("nan")),
}


@pytest.fixture(scope="module")
def right():
    """A step of the tiny llama."""
    return checks.step_on(CPU, checks.step_cases()["llama"])


@pytest.mark.parametrize("wrong", WRONG_STEPS)
def test_a_step_that_differs_is_told(monkeypatch, right, wrong):
    given = [right, right, WRONG_STEPS[wrong](right), right]
    monkeypatch.setattr(checks, "step_on", lambda device, case: given.pop(0))
    case = checks.step_cases()["llama"]
    assert checks.step_row("llama", case, CPU).found == 0
    assert not checks.step_row("llama", case, CPU).good


def test_an_optimizer_that_differs_is_told(a_gpu_that_errs):
    case = checks.optimizer_cases()["adamw, 8-bit states, exact"]
    assert checks.optimizer_row("adamw", case, CPU).good
    a_gpu_that_errs("updated_on", lambda found: (found[0], found[1] + 0.04 * (found[1] - found[0])))
    assert not checks.optimizer_row("adamw", case, CPU).good


def test_a_host_view_whose_writes_are_lost_is_told(monkeypatch):
    monkeypatch.setattr(checks, "ROUNDS", 4)
    monkeypatch.setattr(checks, "BUSY", 64)

    def lost(view):
        view[17] = -1

    assert checks.views_row(CPU).good
    assert checks.views_row(CPU, lost).found >= checks.ROUNDS


def test_a_row_that_differs_ends_the_command_with_1_and_is_named(capsys, a_gpu_that_errs):
    wanted = ["--device", "cpu", "--only", "^(llama|adamw, 8-bit states, exact)$"]
    a_gpu_that_errs("step_on", one_tensor_off)
    assert rehearsal.main(wanted) == 1
    said = capsys.readouterr().out
    assert "\nNO  llama " in said
    assert "\nok  adamw, 8-bit states, exact " in said
    assert "model.layers.1.self_attn.k_proj.weight" in said


def test_without_a_gpu_the_command_says_so(capsys, monkeypatch):
    monkeypatch.setattr(mx, "is_available", lambda device: False)
    assert rehearsal.main([]) == 0
    assert capsys.readouterr().out == "skipped: no GPU\n"


def test_every_family_tuning_and_optimizer_is_asked():
    steps = checks.step_cases()
    kinds = {(case.family, case.dtype) for case in steps.values()}
    families = {*FAMILIES, *OTHER_FAMILIES}
    assert kinds >= {(family, dtype) for family in families for dtype in ("float32", "bfloat16")}
    assert {case.tuning["type"] for case in steps.values() if hasattr(case, "tuning")} == {
        "lora",
        "dora",
        "qlora",
    }
    assert len(checks.optimizer_cases()) == 3 * 2 * 5


@pytest.mark.slow
def test_the_cpu_in_the_place_of_the_gpu_differs_nowhere(capsys):
    code = rehearsal.main(["--device", "cpu"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert said.count("\nok ") == len(checks.step_cases()) + len(checks.optimizer_cases()) + 2
