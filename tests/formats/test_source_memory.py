"""Reading weights: no more than a unit is held, no GPU waits for the disk, and a GPU's fault is not the folder's."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest
from formats.stored import Write, all_tensors, huggingface_tensors
from support.tiny_models import tiny_config, tiny_model

from mlx_empire.formats import source as source_module
from mlx_empire.formats.source import FolderSource, RandomSource, WeightSource


@pytest.mark.parametrize("kind", ["folder", "random"])
@pytest.mark.parametrize("family", ["llama", "llama4", "qwen3_moe"])
def test_no_more_than_about_one_unit_is_held(family: str, kind: str, write_folder: Write) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 512}
    if family == "llama4":
        sizes["intermediate_size_mlp"] = 512
    build, spec = tiny_model(family, **sizes)
    if kind == "folder":
        folder = write_folder(tiny_config(family, **sizes), huggingface_tensors(family, **sizes))
        source: WeightSource = FolderSource(folder, build, spec)
    else:
        source = RandomSource(build, spec, seed=0)
    largest = max(4 * unit.parameters for unit in spec.units)
    assert largest < 0.3 * 4 * spec.parameters
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for index in range(len(spec.units)):
        for _, array in source.unit(index):
            del array
    held = (mx.get_peak_memory() - before) / largest
    assert held <= 1.3, f"{held:.2f} units"
    assert mx.get_active_memory() - before < 0.01 * largest


def test_a_kept_tensor_does_not_pin_the_fused_one(write_folder: Write) -> None:
    """llama4 stores gate and up in one tensor: who keeps the gate must not keep both."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "intermediate_size_mlp": 512}
    folder = write_folder(tiny_config("llama4", **sizes), huggingface_tensors("llama4", **sizes))
    build, spec = tiny_model("llama4", **sizes)
    source = FolderSource(folder, build, spec)
    before = mx.get_active_memory()
    kept = [a for t, a in source.unit(2) if t.name.endswith("experts.gate_proj.weight")]
    assert len(kept) == 1
    assert mx.get_active_memory() - before < 1.1 * kept[0].nbytes


def test_a_gpu_never_waits_for_the_disk(write_folder: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is made of a lazily read tensor is made on the stream that reads it, the CPU's."""
    streams: list[object] = []
    made: list[object] = []
    stream, contiguous, read_stored = mx.stream, mx.contiguous, source_module.read_stored

    class Entered:
        def __init__(self, device: object) -> None:
            self._device, self._real = device, stream(device)

        def __enter__(self) -> None:
            streams.append(self._device)
            self._real.__enter__()

        def __exit__(self, *error: object) -> None:
            streams.pop()
            self._real.__exit__(*error)

    def noted(work: Callable[..., object]) -> Callable[..., object]:
        return lambda *given: (made.append(streams[-1:]), work(*given))[1]

    folder = write_folder(tiny_config("llama4"), huggingface_tensors("llama4"))
    build, spec = tiny_model("llama4")
    monkeypatch.setattr(mx, "stream", Entered)
    monkeypatch.setattr(mx, "contiguous", noted(contiguous))
    monkeypatch.setattr(source_module, "read_stored", noted(read_stored))
    all_tensors(FolderSource(folder, build, spec), spec)
    tensors = sum(len(unit.tensors) for unit in spec.units)
    assert len(made) >= tensors + 1
    assert made == [[mx.cpu]] * len(made)


def test_a_fault_of_the_gpu_is_not_taken_for_a_bad_file(
    write_folder: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tiny_config("llama"), huggingface_tensors("llama"))
    build, spec = tiny_model("llama")

    def timed_out(*arrays: object) -> None:
        raise RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error")

    source = FolderSource(folder, build, spec)
    monkeypatch.setattr(source_module.mx, "eval", timed_out)
    with pytest.raises(RuntimeError, match="GPU Timeout"):
        next(source.unit(0))
