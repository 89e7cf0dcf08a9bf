"""Decides how the verbs read their command lines: wrong usage is bad input like any other."""

from __future__ import annotations

import argparse
from typing import NoReturn

from mlx_empire.errors import UserError, on_all_ranks


class UserArguments(argparse.ArgumentParser):
    """One line and exit code 64 for wrong usage, said once whatever the number of ranks."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise on_all_ranks(UserError(f"{message}; see {self.prog} --help"))
