"""Machines that a fake ssh on the PATH plays: words on standard error, or the facts that a machine would print."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_empire.cluster.hostfile import Node
from mlx_empire.doctor import command

GIB = 1 << 30
SSH = """\
#!/bin/sh
echo "$@" >> {folder}/asked
while case $1 in -*) true;; *) false;; esac; do shift 2; done
cat > {folder}/question-$1
if test -e {folder}/$1.json; then sed "s/\"now\"/$(date +%s)/" {folder}/$1.json; exit 0; fi
cat {folder}/$1.said >&2
exit 255
"""


class Played:
    """Machines that the fake ssh plays; `hosts` are the lines of the hostfile."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hosts = folder, []  # type: Path, list[str]
        (folder / "bin").mkdir()
        (folder / "bin/ssh").write_text(SSH.format(folder=folder))
        (folder / "bin/ping").write_text("#!/bin/sh\nexit 1\n")
        for tool in ("ssh", "ping"):
            (folder / "bin" / tool).chmod(0o700)

    def silent(self, name: str, said: str) -> None:
        """A machine whose ssh fails with these words."""
        self.hosts.append(name)
        (self.folder / f"{name.split()[0].rpartition('@')[2]}.said").write_text(said + "\n")

    def answering(self, name: str, line: str = "", **more: Any) -> None:
        """A machine that prints facts: those of a sound one, and `more`."""
        self.hosts.append(f"{name} {line}")
        own = Node(name, 1, None, 64 * GIB, 48 * GIB, chip="Apple M3 Ultra")
        sound = {
            "hostname": name,
            "versions": {"mlx": "0.32.4", "python": "3.11"},
            "package": "a" * 64,
            "machine": asdict(own),
            "device": {"device_name": "Apple M3 Ultra"},
            "swap_bytes": 0,
            "disks": {"runs": 900 * GIB},
            "reached": {},
            "mac": None,
            "bytes_per_second": None,
            "clock": "now",  # when it is asked, however busy this machine is
        }
        (self.folder / f"{name}.json").write_text(json.dumps(sound | more))

    def doctor(self, *words: str) -> tuple[int, list[dict[str, Any]]]:
        """The exit code and the rows of check.json."""
        (self.folder / "hosts.txt").write_text("\n".join(self.hosts) + "\n")
        check = self.folder / "check"
        code = command.main([str(self.folder / "hosts.txt"), "--no-links", "--dir", str(check), *words])
        said = json.loads((check / "check.json").read_text())
        assert said["good"] == all(row["good"] for row in said["found"])
        assert code == (0 if said["good"] else 1)
        return code, said["found"]
