"""Decides what happens when a launch ends: done, stop, give up, or start again on the machines that are there.

A lost rank or machine (exit code 75) is started again as often as the budget allows; what the ranks refuse (3, 64, 65,
70) never is, nor is a GPU that runs out of memory a second time (3). Two restarts in a row that brought no newer
checkpoint are a crash loop, and end it. Every failure gets one report: who, where, why, what is saved, and the command
that goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from mlx_empire.errors import GPU_OUT_OF_MEMORY, DoesNotFitError, LostRankError
from mlx_empire.launch.ending import LOST, Ending, Events, ending_of
from mlx_empire.launch.machines import Memory, NothingWired, Probe, away, wait_until_free, without
from mlx_empire.launch.notices import StallWatch
from mlx_empire.launch.process import GRACE_SECONDS, Asked, LaunchProcess, say
from mlx_empire.run.launched import LaunchState, RunFolder
from mlx_empire.run.mpirun import Launch, mpirun_line, printed
from mlx_empire.run.stop import stop_requested

PAUSE_SECONDS = 2.0
NOTE_SECONDS = 5.0  # at most so often `launch.json` says anew where the ranks are
FRUITLESS = 2  # restarts in a row without a newer checkpoint
STARTING = "starting"
REPORTED = (65, 70)  # refusals that happen in the middle of work


@dataclass
class Supervisor:
    """One run from its first launch to its end. `resume`: the command that starts it again, for the reports."""

    launch: Launch
    folder: RunFolder
    environment: Mapping[str, str]
    asked: Asked
    budget: int
    resume: str
    probe: Probe
    memory: Memory = field(default_factory=NothingWired)
    grace: float = GRACE_SECONDS
    pause: float = PAUSE_SECONDS
    say: Callable[[str], None] = say
    notify: Callable[[str, str], None] = lambda kind, sentence: None
    state: LaunchState = field(default_factory=LaunchState)

    def run(self) -> int:
        """The exit code of it all. LostRankError where a machine is not there at the start."""
        self.state.command, self.state.budget = self.resume, self.budget
        missing = away(self.launch.cluster, self.probe)
        if missing:
            named = "; ".join(f"{name}: {why}" for name, why in missing.items())
            raise LostRankError(
                f"{self.launch.hostfile}: {named}; `ssh` must reach every machine without a password"
            )
        before = self.memory.wired()
        fruitless, newest = -1, self.folder.committed  # the first launch is no restart
        launch = self.launch
        while True:
            ending, events = self._once(launch)
            ending = self._again(ending)
            if ending.kind == "lost" or ending.code in REPORTED or GPU_OUT_OF_MEMORY in ending.cause:
                self._report(ending, events)
            if ending.kind != "lost":
                return self._over(ending)
            committed = self.folder.committed
            fruitless = fruitless + 1 if committed == newest else 0
            newest = committed
            if not self._may_restart(fruitless):
                return self._over(ending)
            held = wait_until_free(self.memory, before, self.say, self._stopped)
            if held:
                self.say(
                    f"{', '.join(held)}: the memory of the last run is not given back; restart that machine"
                )
                return self._over(ending)
            next_launch = self._with_who_is_there()
            if next_launch is None:
                return self._over(ending)
            launch = next_launch
            self.state.restarts += 1
            committed = self.folder.committed
            begin = "from the beginning" if committed is None else f"from the checkpoint of step {committed}"
            self.say(f"restart {self.state.restarts} of {self.budget}, {begin}")
            self.notify(
                "restart", f"{ending.sentence}; restart {self.state.restarts} of {self.budget}, {begin}"
            )

    def _once(self, launch: Launch) -> tuple[Ending, Events]:
        line = mpirun_line(launch, self.environment)
        self.say(printed(line))
        self.state.machines = [host.name for host in launch.cluster.nodes]
        self._note(STARTING)  # nothing is written at first: the run makes its folder when it may begin
        self._stalls = StallWatch()
        launched = LaunchProcess(line, self.environment, self.asked, self._tick, self.grace)
        code = launched.run()
        self._pass_on(launched.events)
        ending = ending_of(launched.events, code, self.folder.complete, self._stopped())
        return ending, launched.events

    def _again(self, ending: Ending) -> Ending:
        """A GPU that ran out of memory once before does not hold this run."""
        full = ending.kind == "lost" and GPU_OUT_OF_MEMORY in ending.cause
        if full and any(GPU_OUT_OF_MEMORY in failure["cause"] for failure in self.state.failures):
            return replace(ending, kind="refused", code=DoesNotFitError.exit_code)
        return ending

    def _tick(self, events: Events) -> None:
        if not self.asked.times and stop_requested(self.folder.path, self.state.started):
            self.asked.stop()
        if self.state.said == STARTING and self.folder.take():
            self._note("loading")
        if self.state.said == "loading" and events.step:
            if self.state.failures:
                self.state.failures[-1]["again"] = time.time()
            self._note("training")
        self._note_places(events)
        self._pass_on(events)
        stalled = self._stalls.stalled(events, time.monotonic())
        if stalled:
            self.notify("stalled", stalled)

    def _pass_on(self, events: Events) -> None:
        """Send what ranks want the owner to hear."""
        while events.notices:
            self.notify(*events.notices.pop(0))

    def _stopped(self) -> bool:
        return self.asked.times > 0

    def _note(self, said: str, code: int | None = None) -> None:
        self.state.said, self.state.code = said, code
        self.folder.write(self.state)

    def _note_places(self, events: Events) -> None:
        """Say for who looks on where each rank is."""
        if time.time() - self.state.noted < NOTE_SECONDS or self.state.said == STARTING:
            return
        places = {str(rank): place for rank in events.places if (place := events.place_of(rank))}
        if places != self.state.places:
            self.state.places, self.state.noted = places, time.time()
            self.folder.write(self.state)

    def _saved(self) -> str:
        committed = self.folder.committed
        return "no checkpoint" if committed is None else f"the checkpoint of step {committed}"

    def _may_restart(self, fruitless: int) -> bool:
        if self._stopped() or not self.budget:
            return False
        if self.state.restarts >= self.budget:
            self.say(f"no restart: the budget of {self.budget} is spent")
            return False
        if fruitless >= FRUITLESS:
            self.say(
                f"no restart: no progress between restarts, the last {FRUITLESS} brought no newer checkpoint"
            )
            return False
        return True

    def _with_who_is_there(self) -> Launch | None:
        """What to launch next: on all machines if they answer, else on those that do; None if none of the rest can."""
        deadline = time.monotonic() + self.pause
        while time.monotonic() < deadline and not self._stopped():
            time.sleep(min(0.1, self.pause))
        if self._stopped():
            return None
        missing = away(self.launch.cluster, self.probe)
        if not missing:
            return self.launch
        for name, why in missing.items():
            self.say(f"{name} stays away: {why}")
        kept = [host for host in self.launch.cluster.nodes if host.name not in missing]
        if not kept or not self.folder.take():
            return None
        path, cluster = without(self.launch.cluster, missing, self.folder.path)
        names = ", ".join(host.name for host in kept)
        self.say(
            f"GOING ON WITHOUT {', '.join(missing)}: on {names}, by {path}; the plan there says if that fits"
        )
        overrides = (*self.launch.overrides, *self.launch.with_fewer)
        return replace(self.launch, hostfile=path, cluster=cluster, overrides=overrides)

    def _report(self, ending: Ending, events: Events) -> None:
        phase, step = ending.place or ("", events.step)
        lines = [
            f"what   {ending.sentence}",
            f"where  {phase or 'an unknown phase'}, {f'step {step}' if step else 'before step 1'}",
            f"saved  {self._saved()}",
            f"go on  {self.resume}",
        ]
        self.say("the run failed\n  " + "\n  ".join(lines))
        self.state.failures.append(
            {
                "time": time.time(),
                "rank": ending.rank,
                "host": ending.host,
                "phase": phase,
                "step": step,
                "cause": ending.cause,
                "committed": self.folder.committed,
                "again": None,  # when a restarted run began its next step
            }
        )

    def _over(self, ending: Ending) -> int:
        if ending.kind == "stopped":
            self.say(f"{ending.cause}; there is {self._saved()}; to go on: {self.resume}")
        elif ending.code not in (0, LOST, *REPORTED):
            self.say(f"ended with exit code {ending.code}: {ending.sentence}")
        if ending.kind in ("complete", "stopped"):
            self.notify("end", f"{ending.cause}, exit code {ending.code}; there is {self._saved()}")
        else:
            self.notify(
                "failure",
                f"{ending.sentence}; exit code {ending.code}; there is {self._saved()}; to go on: {self.resume}",
            )
        self._note(ending.kind, ending.code)
        return ending.code
