"""A job for launchd that starts a run again after a power cut, or when the launcher itself was lost.

A daemon and not an agent: launchd's daemons may use the local network without being asked. It starts with the machine,
does nothing where the run is complete, and tries again only where that makes sense (75). The project did not run it on
a Mac.
"""

from __future__ import annotations

import getpass
import os
import plistlib
import shlex
import sys
from pathlib import Path

from mlx_empire.recipe.load import load_recipe
from mlx_empire.run.launched import COMPLETE

LABEL = "mlx-empire"
PAUSE_SECONDS = 60
TEMPORARY = 75


def job(hostfile: Path, recipe_path: Path) -> bytes:
    """The property list, XML; for /Library/LaunchDaemons. UserError for a recipe that cannot be read."""
    run = load_recipe(recipe_path).run.dir
    words = [sys.executable, "-m", "mlx_empire.launch", str(hostfile), str(recipe_path)]
    complete = shlex.quote(str(run / COMPLETE))
    # launchd repeats what ends with another code than 0: only what is worth it.
    line = f"test -e {complete} || {shlex.join(words)}; test $? -ne {TEMPORARY}"
    return plistlib.dumps(
        {
            "Label": LABEL,
            "UserName": getpass.getuser(),
            "WorkingDirectory": os.getcwd(),
            "ProgramArguments": ["/bin/sh", "-c", line],
            "EnvironmentVariables": {"HOME": str(Path.home())},
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": PAUSE_SECONDS,
            "StandardOutPath": f"{os.getcwd()}/{LABEL}.log",
            "StandardErrorPath": f"{os.getcwd()}/{LABEL}.log",
        },
        sort_keys=False,
    )
