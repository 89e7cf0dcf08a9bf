"""The daughters that one machine trains together: which has which place, what a step leaves behind, which go on.

A daughter that is done leaves its place to the next. One whose data cannot be used, whose loss is no longer finite, or
whose files cannot be written fails alone; so does one that was interrupted and may not go on as things are by now, and
its files are kept. Where a disk has no room for a result, all wait until it has. When one is to be saved
(`run.save_every`) or is done, all that are present are saved: a command that was killed goes on with the same daughters
side by side, and comes to the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import mlx.core as mx

from mlx_empire import progress
from mlx_empire.checkpoint.manifest import Origin, config_digest
from mlx_empire.checkpoint.shard import live_pieces
from mlx_empire.cluster.hostfile import Node
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.data.batches import validation_micro_batches
from mlx_empire.daughters import saved
from mlx_empire.daughters.daughter import Daughter, JobsOf
from mlx_empire.daughters.jobs import DONE, FAILED, TRAINING, WAITING
from mlx_empire.daughters.saved import ResumePoint
from mlx_empire.engine.multi_adapter import MultiAdapterSteps, StepInput, StepOutput
from mlx_empire.errors import EmpireError, NumericsError, UnreadableError, UserError
from mlx_empire.formats.adapter_folder import AdapterWriter
from mlx_empire.model.spec import own_name
from mlx_empire.model.target import Target
from mlx_empire.plan.shares import RunPlan
from mlx_empire.recipe.idle import refuse_unmeasured
from mlx_empire.recipe.load import dump_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.metrics import MetricsWriter
from mlx_empire.run import result
from mlx_empire.run.agree import load_evaluator, share_gate
from mlx_empire.run.folder import refuse_other_scorers, write_plan
from mlx_empire.run.job import Job
from mlx_empire.run.parent import Lineage, beside_plan, lineage_of, read_parent
from mlx_empire.run.resume import require_same, require_steps_left
from mlx_empire.run.shared_rows import load_data

Tell = Callable[..., None]  # tell(name, **fields)


@dataclass(frozen=True)
class Capacity:
    """What a machine holds at a time: the model for `places` daughters and the plan for them."""

    places: int
    plan: RunPlan


class Daughters:
    """The places and who is in them. `base`: the digest of the base's weights; `single`: the model with one adapter."""

    def __init__(
        self,
        jobs: JobsOf,
        node: Node,
        capacity: Capacity,
        single: Target,
        base: str,
        adapters: MultiAdapterSteps,
        tell: Tell,
    ) -> None:
        self._jobs, self._node, self._capacity = jobs, node, capacity
        self._single, self._base, self._adapters, self._tell = single, base, adapters, tell
        self._comm = SoloCommunicator(node.name)
        self._daughters: dict[int, Daughter] = {}
        self._failed: list[str] = []
        self._passes = 0
        self._pauses: Mapping[str, int] = {}

    def run(self, waiting: list[str], pauses: Mapping[str, int] = MappingProxyType({})) -> list[str]:
        """Until none waits and every place is empty; those that failed. What had a place takes it again first.

        pauses: the step after which a daughter leaves its place for now, by name.
        """
        self._pauses = pauses
        places = {name: place_of(self._jobs.of(name)) for name in waiting}
        waiting.sort(key=lambda name: places[name] is None)
        for name, place in places.items():
            if place is not None and place < self._capacity.places and place not in self._daughters:
                waiting.remove(name)
                self._admit(place, name)
        while waiting or self._daughters:
            for place in range(self._capacity.places):
                while place not in self._daughters and waiting:
                    self._admit(place, waiting.pop(0))
            if self._daughters:
                self._step()
        return self._failed

    # ---- coming

    def _admit(self, place: int, name: str) -> None:
        recipe = self._jobs.of(name)
        try:
            result.refuse_taken(recipe)
            plan, spec = self._capacity.plan, self._single.spec
            splits = load_data(recipe, spec)
            if (
                recipe.evaluation.stop_when is not None
            ):  # without a gate a person may well have no held-out rows
                refuse_unmeasured(recipe, splits.valid is not None)
            evaluator = load_evaluator(recipe, spec, plan)
            config = config_digest(recipe.model.path)
            origin = Origin(dump_recipe(recipe), splits.digest, self._base, config)
            job = Job.of(recipe, splits.train)
            step, note = self._resumed(place, recipe, origin, job.steps)
            note = "; ".join(filter(None, (note, *splits.warnings)))
            scorers = {} if evaluator is None else evaluator.scorer_digests
            if step:
                refuse_other_scorers(recipe, scorers)
            lineage = lineage_of(recipe.run.dir) if step else self._begin(place, recipe)
            saved.clear(recipe.run.dir, goes_on=step > 0)
            comes_from = beside_plan(self._base, lineage)
            write_plan(
                recipe,
                plan,
                [self._node],
                spec,
                splits,
                job.steps,
                resumed=step > 0,
                origin=comes_from,
                scorers=scorers,
            )
            self._jobs.begun(name, goes_on=step > 0)
            metrics = MetricsWriter(recipe.run.dir, step)
            gate = share_gate(self._comm, recipe, job.gate)
        except (EmpireError, OSError) as error:
            self._fail(name, str(error))
            return
        pause = self._pauses.get(name)
        daughter = Daughter(name, recipe, splits, origin, job, evaluator, gate, metrics, step, step, pause)
        self._daughters[place] = daughter
        self._tell(name, state=TRAINING, machine=self._node.name, step=step, steps=job.steps, note=note)
        with self._alone(place, daughter):
            if not step:
                self._evaluate(place, daughter)
            if daughter.done:
                self._graduate(place, daughter)

    def _resumed(self, place: int, recipe: Recipe, origin: Origin, steps: int) -> tuple[int, str]:
        """Put an interrupted daughter into its place as it was; its step (0: it begins) and what to say.

        Only a damaged file makes it begin anew. UserError or OSError where a whole file is not one to go on from.
        """
        folder = recipe.run.dir
        if recipe.run.resume == "never" or not (folder / saved.FILE_NAME).exists():
            return 0, ""
        try:
            found, arrays = saved.resume_point_of(folder), saved.read_arrays(folder)
        except UnreadableError:
            raise
        except UserError as error:
            return 0, f"begins anew: {error}"
        assert found is not None
        where = str(folder / saved.FILE_NAME)
        require_same(found.origin, origin, where)
        require_steps_left(found.step, steps, where)
        saved.restore(arrays, self._adapters.store, place, folder)
        self._adapters.carry_on(place, found.last_norm)
        return found.step, f"goes on after step {found.step}"

    def _begin(self, place: int, recipe: Recipe) -> Lineage | None:
        """Put one that begins into a place, as tuning.start says; where it comes from. UserError."""
        parent = None if recipe.tuning.start is None else read_parent(recipe, self._single, self._base)
        self._adapters.begin(place, None if parent is None else parent.weights)
        return None if parent is None else parent.lineage

    # ---- learning

    def _step(self) -> None:
        self._passes += 1
        progress.begin_step(self._passes)
        began = time.perf_counter()
        inputs = {place: self._input(daughter) for place, daughter in self._daughters.items()}
        outcomes = self._adapters.step(inputs)
        seconds, now = time.perf_counter() - began, time.monotonic()
        for place, outcome in outcomes.items():
            daughter = self._daughters[place]
            daughter.step += 1
            with self._alone(place, daughter):
                if not math.isfinite(outcome.norm):
                    saved.forget(daughter.recipe.run.dir)  # it would lead here again
                    raise NumericsError(
                        f"step {daughter.step}: its gradient is not finite; look at this daughter's data"
                    )
                self._record(daughter, inputs[place], outcome, seconds)
                if daughter.to_be_scored(now):
                    only_compared = daughter.only_compared(now)
                    self._evaluate(place, daughter, comparison=only_compared)
                    daughter.evaluated_at = daughter.evaluated_at if only_compared else now
        if any(daughter.to_be_saved(now) for daughter in self._daughters.values()):
            self._save()
        for place, daughter in [
            (place, daughter) for place, daughter in self._daughters.items() if daughter.done
        ]:
            with self._alone(place, daughter):
                self._graduate(place, daughter)
        for place in [place for place, daughter in self._daughters.items() if daughter.pauses]:
            daughter = self._daughters.pop(place)
            daughter.metrics.close()
            self._tell(daughter.name, state=WAITING, step=daughter.step)

    def _input(self, daughter: Daughter) -> StepInput:
        job, step = daughter.job, daughter.step + 1
        return StepInput(job.batches(step), job.targets(step), step, job.rates(step))

    def _record(self, daughter: Daughter, given: StepInput, outcome: StepOutput, seconds: float) -> None:
        positions = daughter.job.positions(daughter.step)
        daughter.metrics.write(
            {
                "step": daughter.step,
                "loss": outcome.loss,
                "learning_rate": given.learning_rate,
                "grad_norm": outcome.norm,
                "tokens": given.tokens,
                "tokens_per_second": given.tokens / seconds,
                "positions": positions,
                "positions_per_second": positions / seconds,
                "step_seconds": seconds,
                "comm_wait_seconds": 0.0,
                "together": len(self._daughters),
                "peak_bytes": [mx.get_peak_memory()],
                "cache_bytes": [mx.get_cache_memory()],
                "predicted_peak_bytes": [self._capacity.plan.ledgers[0].peak],
                "bytes_sent": [0],
                "bytes_received": [0],
            }
        )
        self._tell(daughter.name, step=daughter.step)

    def _evaluate(self, place: int, daughter: Daughter, *, comparison: bool = False) -> None:
        valid, run = daughter.splits.valid, daughter.recipe.run
        if valid is None and daughter.evaluator is None:
            return
        progress.reach("evaluate")
        found: dict[str, Any] = {"step": daughter.step, "eval_loss": None}
        found |= {"comparison": True} if comparison else {}
        if valid is not None:
            batches = validation_micro_batches(valid, daughter.recipe.batch.micro_size, run.eval_batches)
            found["eval_loss"] = self._adapters.held_out(place, list(batches), 1)
            before = {"before": found["eval_loss"]} if daughter.step == 0 else {}
            self._tell(daughter.name, held_out=found["eval_loss"], **before)
        if daughter.evaluator is not None:
            found["scores"] = daughter.evaluator.scores(self._adapters.with_only(place), self._comm, 1)
        daughter.metrics.write(found)
        daughter.gate.observe(found)

    # ---- going

    def _save(self) -> None:
        """All as they are now. A disk that refuses ends no training: what was saved before stays."""
        pieces = live_pieces(self._adapters.store, 0)
        kept = {
            place: daughter
            for place, daughter in self._daughters.items()
            if daughter.job.save_every or daughter.pauses
        }
        try:
            for place, daughter in kept.items():
                daughter.saved, daughter.saved_at = daughter.step, time.monotonic()
                progress.reach("save-write")
                norm = self._adapters.last_norm(place)
                point = ResumePoint(daughter.step, place, self._node.name, daughter.origin, norm)
                mine = [piece for piece in pieces if own_name(piece.tensor)[0] == place]
                saved.write_draft(daughter.recipe.run.dir, point, mine)
            progress.reach("save-rename")
            for daughter in kept.values():
                saved.put_in_place(daughter.recipe.run.dir)
        except OSError as error:
            for daughter in kept.values():
                self._tell(daughter.name, note=f"step {daughter.step} could not be saved: {error.strerror}")

    def _graduate(self, place: int, daughter: Daughter) -> None:
        """Write the result, which waits for room on the disk, and leave the place."""
        daughter.metrics.close()
        del self._daughters[place]
        progress.reach("finish")
        writer = result.result_writer(daughter.recipe, self._single)
        assert isinstance(writer, AdapterWriter)
        adapter = self._adapters.adapter(place)
        for index, unit in enumerate(self._single.spec.units):
            writer.write_unit(index, {t.name: adapter[t.name] for t in unit.tensors if t.trainable})
        for write in (writer.close, partial(result.seal, daughter.recipe, daughter.gate)):
            result.until_there_is_room(write, lambda note: self._tell(daughter.name, note=note))
        saved.forget(daughter.recipe.run.dir)
        said = daughter.gate.sentence() if daughter.gate.asks else ""
        note = "; ".join(filter(None, (said, self._jobs.done(daughter.name))))
        self._tell(daughter.name, state=DONE, step=daughter.step, note=note)

    @contextmanager
    def _alone(self, place: int, daughter: Daughter) -> Iterator[None]:
        """What fails in here for one daughter, such as its disk, ends its training and no other."""
        try:
            yield
        except (EmpireError, OSError) as error:
            daughter.metrics.close()
            self._daughters.pop(place, None)
            self._fail(daughter.name, str(error))

    def _fail(self, name: str, why: str) -> None:
        self._failed.append(name)
        self._tell(name, state=FAILED, machine=self._node.name, note=why)


def place_of(recipe: Recipe, machine: str | None = None) -> int | None:
    """The place in which a daughter was interrupted (on `machine`, if one is named); None where nothing was kept."""
    try:
        found = saved.resume_point_of(recipe.run.dir)
    except (UserError, OSError):
        return None
    return found.place if found is not None and machine in (None, found.machine) else None
