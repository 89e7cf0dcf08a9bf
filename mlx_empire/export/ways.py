"""Turn results into what other tools open: the ways that `command` tells of, of which `push` has a file of its own.

A run's model card goes along. Nothing of the source is changed. What --pack loses of an adapter is measured on the
run's own rows and said.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_empire.comm.connect import choose_device
from mlx_empire.comm.failure import guard
from mlx_empire.errors import UserError
from mlx_empire.export.command import BITNET, PUSH, STORED
from mlx_empire.formats.adapter_folder import (
    CARD_NAME,
    Adapter,
    read_adapter,
    read_settings,
    write_mlx_lm,
    write_peft,
)
from mlx_empire.formats.bitnet_folder import write_bitnet
from mlx_empire.formats.convert import MergedSource, packed_as_stored, plain_weights, write_packed
from mlx_empire.formats.export_folder import FolderWriter
from mlx_empire.formats.hf_folder import open_folder
from mlx_empire.formats.hf_names import huggingface_names
from mlx_empire.formats.peft import no_peft_form
from mlx_empire.formats.staging import disk_errors, fresh_folder, publish, refuse_foreign, write_text
from mlx_empire.model.build import compute_dtype
from mlx_empire.model.config import read_config
from mlx_empire.model.packing_config import refuse_foreign_packing
from mlx_empire.model.quantize import QUANT_FORMATS, QuantFormat, quant_format_of, uniformly, unpacked
from mlx_empire.model.target import Target, make_target, with_adapter
from mlx_empire.recipe.load import load_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.recipe.sections import TuningSection
from mlx_empire.run.finished import current_of, packed_from
from mlx_empire.run.packing_loss import packing_loss


@dataclass(frozen=True)
class ExportSource:
    """What is exported: the adapter's folder, its base's, how that was packed, and of its run model card and recipe."""

    adapter: Path
    model: Path | None
    packing: QuantFormat | None
    card: str
    recipe: Recipe | None


def export_command(options: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code."""
    with guard(None):
        choose_device()
        if options.way == PUSH:
            from mlx_empire.export.push import push  # what talks to the Hub

            sent = push(options.source, str(options.out), base=options.base, public=options.public)
            print("\n".join(sent))
            return 0
        if options.base is not None or options.public:
            raise UserError("--base and --public go with push")
        for note in export(options):
            print(note)
        print(f"written: {options.out}")
    return 0


def export(options: argparse.Namespace) -> list[str]:
    """Do what the command line asks; returns notes for the user. UserError."""
    refuse_foreign(options.out)
    packing = _packing(options.bits, "--bits")
    again = None if options.pack == STORED else _packing(options.pack, "--pack")
    if options.pack is not None and options.way != "merge":
        raise UserError(f"--pack: only merge packs its result again; for {options.way} leave it out")
    if options.way == "base":
        if packing is None:
            raise UserError(f"--bits: say how the base is packed: {', '.join(map(str, QUANT_FORMATS))}")
        plain = _plain(options.source)
        source = plain_weights(options.source, plain)
        about = packed_from(options.source, options.bits)
        return write_packed(options.out, source, plain.spec, uniformly(packing), options.source, about=about)
    if options.way == BITNET:
        plain = _plain(options.source)
        return write_bitnet(options.out, plain_weights(options.source, plain), plain, options.source)
    found = _source(options.source, options.model, packing)
    if options.way == "merge":
        return _merge(found, options.out, again, as_stored=options.pack == STORED)
    return _convert(found, options.out, options.way)


def _packing(bits: str | None, option: str) -> QuantFormat | None:
    if bits is None:
        return None
    found = {str(name): packing for name, packing in QUANT_FORMATS.items()}.get(bits)
    if found is None:
        raise UserError(f"{option}: {bits}: expected one of {', '.join(map(str, QUANT_FORMATS))}")
    return found


def _source(folder: Path, model: Path | None, packing: QuantFormat | None) -> ExportSource:
    folder = current_of(folder)
    recipe_file = next(
        (f / "recipe.yaml" for f in (folder, folder.parent) if (f / "recipe.yaml").exists()), None
    )
    if recipe_file is None:
        return ExportSource(folder, model, packing, "", None)
    recipe = load_recipe(recipe_file)
    if recipe.tuning.type == "full":
        raise UserError(f"{folder}: a run of full fine-tuning: its final/ is a whole model already")
    final = recipe_file.parent / "final"
    if not final.is_dir():
        raise UserError(f"{recipe_file.parent}: this run has no final/ yet")
    card = final / CARD_NAME
    text = card.read_text() if card.exists() else ""
    packing = packing or quant_format_of(recipe.tuning)
    return ExportSource(final, model or recipe.model.path, packing, text, recipe)


def _plain(folder: Path) -> Target:
    """The model of a folder without adapters, lazily; a packed one as the plain model it was made from. UserError."""
    config = read_config(folder)
    refuse_foreign_packing(config, str(folder))
    plain: dict[str, Any] = unpacked(config) if config.get("quantization") else config
    stored = open_folder(folder).stored()
    return make_target(plain, TuningSection(), str(folder), compute_dtype(config, None), stored)


def _base_of(source: ExportSource) -> Path:
    if source.model is None:
        named = read_settings(source.adapter).get("base_model_name_or_path")
        if isinstance(named, str) and Path(named).is_dir():
            return Path(named)
        raise UserError(f"--model: {source.adapter} does not name its base's folder; say --model FOLDER")
    return source.model


def _convert(source: ExportSource, out: Path, way: str) -> list[str]:
    base = _base_of(source)
    plain = _plain(base)
    adapter = read_adapter(source.adapter, plain.spec)
    if way == "mlx-lm":
        return _publish(out, lambda folder: write_mlx_lm(folder, adapter), "mlx-lm adapters", source.card)
    spec = with_adapter(plain, adapter.settings)
    why = no_peft_form(spec, huggingface=huggingface_names(plain.spec, open_folder(base), spec.adapted))
    if why is not None:
        raise UserError(f"{source.adapter}: PEFT cannot take it: {why}")
    return _publish(
        out, lambda folder: write_peft(folder, adapter, spec, str(base)), "PEFT adapter", source.card
    )


def _publish(out: Path, fill: Callable[[Path], None], layout: str, card: str) -> list[str]:
    temporary = out.parent / f".{out.name}.partial"
    with disk_errors(out):
        fresh_folder(temporary)
        fill(temporary)
        if card:
            write_text(temporary / CARD_NAME, card)
        publish(temporary, out, layout, [])
    return []


def _merge(source: ExportSource, out: Path, again: QuantFormat | None, *, as_stored: bool) -> list[str]:
    base = _base_of(source)
    plain = _plain(base)
    stored = bool(read_config(base).get("quantization"))
    packing = None if stored else source.packing  # what is stored packed is what the adapter was trained on
    weights = plain_weights(base, plain)
    adapter = read_adapter(source.adapter, plain.spec)
    merged = MergedSource(weights, plain.spec, adapter, packing, str(source.adapter))
    if again is not None or as_stored:
        choose = packed_as_stored(base, plain) if as_stored else uniformly(again)
        notes = write_packed(out, merged, plain.spec, choose, base, source.card)
        return [*notes, _cost(source, base, adapter, out)]
    with FolderWriter(out, plain.spec, plain.rebuild, base) as writer:
        writer.card = source.card
        for index in range(len(plain.spec.units)):
            writer.write_unit(index, {tensor.name: array for tensor, array in merged.unit(index)})
    if stored:
        writer.notes.append(
            f"{base} is stored packed, the merged weights are plain {plain.spec.dtype}: most of an adapter is smaller "
            "than a step of packed weights (--pack stored, 8 or another packs them and measures what is left)"
        )
    return writer.notes


def _cost(source: ExportSource, base: Path, adapter: Adapter, out: Path) -> str:
    """What is left of the adapter after packing, in a sentence."""
    if source.recipe is None:
        return (
            f"what packing costs was not measured: {source.adapter} is no run's folder, so there are no rows"
        )
    try:
        return packing_loss(source.recipe, base, adapter.weights, out).sentence()
    except UserError as error:
        return f"what packing costs was not measured: {error}"
