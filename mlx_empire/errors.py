"""The errors a user may see and the exit code of each (one line on the terminal, never a traceback).

Exit codes: 0 complete, 3 does not fit, 64 bad input, 65 damaged data or numerics, 70 internal error,
75 temporary (a lost rank, a hang: a restart makes sense), 143 stopped on request.

Wrong usage of a command is bad input like any other.
"""

from __future__ import annotations

import argparse
from typing import NoReturn


class EmpireError(ValueError):
    """Base of every error whose message is meant for the user: one line naming key, value, host and remedy."""

    exit_code = 70
    shared = (
        False  # True: every rank raises it by itself, so one of them says it and nobody has to be stopped
    )


def on_all_ranks(error: EmpireError) -> EmpireError:
    """Mark an error that every rank finds at the same place from the same numbers."""
    error.shared = True
    return error


class UserError(EmpireError):
    """Bad input: a recipe, a hostfile, a model folder or a data file that cannot be used as it is."""

    exit_code = 64


class NoRoomError(UserError):
    """A disk is full: what was refused can be written once there is room. `needed`: bytes, 0 where not known."""

    def __init__(self, message: str, needed: int = 0) -> None:
        super().__init__(message)
        self.needed = needed


class UnreadableError(UserError):
    """A file that the system does not let us read: it may be whole, so nobody may take it for damaged."""


class DoesNotFitError(EmpireError):
    """The plan needs more memory than a node has."""

    exit_code = 3


class NumericsError(EmpireError):
    """Damaged data or numerics: a non-finite loss or gradient, a digest that does not match."""

    exit_code = 65


class DamagedError(EmpireError):
    """A checkpoint that cannot be used: a file is missing or is not what the manifest says."""

    exit_code = 65


class UnsavedError(EmpireError):
    """A checkpoint that the run should have left could not be written; the newest one before it is whole."""

    exit_code = 75


class StoppedError(EmpireError):
    """The run was asked to stop and has saved."""

    exit_code = 143


class LostRankError(EmpireError):
    """A rank died, hung or missed a deadline; starting again makes sense."""

    exit_code = 75


class UnreachableError(EmpireError):
    """What a network leads to did not answer, or not to the end: trying again makes sense."""

    exit_code = 75


# What a clone without Git LFS has in the place of a large file.
_POINTER_BEGINS = b"version https://git-lfs.github.com/spec/"
POINTER = "a pointer of Git LFS, in the place of the file; bring that by `git lfs pull`, or download it again"


def is_pointer(start: bytes) -> bool:
    """Whether a file that begins so is a `POINTER`."""
    return start.startswith(_POINTER_BEGINS)


GPU_FAULTS = ("[METAL]",)
NO_MEMORY = ("[metal::malloc]", "[malloc] Unable to allocate", "[malloc_or_wait] Unable to allocate")
GPU_OUT_OF_MEMORY = "the GPU ran out of memory"  # what the supervisor looks for when it happens again
_GPU_IS_FULL = ("OutOfMemory", "Insufficient Memory", "(00000008:")
AWAY_FROM_THE_DISPLAY = (
    "let the display sleep, start over ssh, and export AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 before the start"
)


def of_gpu(error: BaseException, plan: str = "") -> EmpireError | None:
    """What a RuntimeError of MLX about the GPU or memory means for a run, with its remedy; None for any other error.

    A fault of the GPU is worth a restart, also the first time that it ran out of memory. Memory that the system does
    not give is not there the next time either; `plan`: what the ledger said of it.
    """
    text = " ".join(str(error).split())[:300]
    if not isinstance(error, RuntimeError) or not text.startswith((*GPU_FAULTS, *NO_MEMORY)):
        return None
    planned = f"; {plan}" if plan else ""
    room = "close other programs, lower limit= in the hostfile, or try memory.wired: off"
    if text.startswith(NO_MEMORY):
        return DoesNotFitError(f"the system gives no more memory: {text}{planned}; {room}")
    if any(word in text for word in _GPU_IS_FULL):
        return LostRankError(f"{GPU_OUT_OF_MEMORY}: {text}{planned}; {room}")
    return LostRankError(f"the GPU gave up: {text}; {AWAY_FROM_THE_DISPLAY}")


class UserArguments(argparse.ArgumentParser):
    """One line and exit code 64 for wrong usage, said once whatever the number of ranks."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise on_all_ranks(UserError(f"{message}; see {self.prog} --help"))
