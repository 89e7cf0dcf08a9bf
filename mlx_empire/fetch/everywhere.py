"""How a fetched folder comes from this machine to all others of the hostfile: over ssh, by tar, and checked there.

Only files that are missing or wrong there are sent, so the same command goes on after a cut. The other machine checks
by itself (`python -m mlx_empire.fetch.everywhere FOLDER`, which reads the record and answers in JSON) and leaves the
record only beside what is whole.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mlx_empire.cluster.hostfile import Cluster, Host
from mlx_empire.cluster.reach import ask, is_here, line_to, of_all, with_python
from mlx_empire.disk import free_bytes, with_headroom
from mlx_empire.errors import DamagedError, DoesNotFitError, EmpireError, UnreachableError
from mlx_empire.formats.fetched import Record, differing, write_record
from mlx_empire.sizes import amount

CHECK_SECONDS = 3600.0  # a few hundred gigabytes are read


def copy_to_all(
    cluster: Cluster, folder: Path, record: Record, say: Callable[[str], None], *, dry_run: bool = False
) -> None:
    """Copy the folder to every machine but this one. UnreachableError, DoesNotFitError, DamagedError."""
    environment = os.environ
    others = Cluster(tuple(host for host in cluster.nodes if not is_here(host)), cluster.source)

    def examined(host: Host) -> dict[str, str] | EmpireError:
        try:
            return missing_there(host, folder, record, environment)
        except EmpireError as error:
            return error

    found = of_all(others, examined)
    for answer in found.values():
        if isinstance(answer, EmpireError):
            raise answer
    for host in others.nodes:
        missing = found[host.name]
        assert not isinstance(missing, EmpireError)
        nbytes = sum(record["files"][name]["bytes"] for name in missing)
        say(
            f"{host.name}: {len(missing)} files, {amount(nbytes)} to copy"
            if missing
            else f"{host.name}: whole"
        )
        if missing and not dry_run:
            send(host, folder, list(missing), environment)
            left, _ = folder_there(host, folder, record, environment)
            if left:
                name, why = next(iter(left.items()))
                raise DamagedError(f"{host.name}: {folder / name}: {why}; run the same command again")
            say(f"{host.name}: whole")


def missing_there(host: Host, folder: Path, record: Record, environment: Mapping[str, str]) -> dict[str, str]:
    """What is missing on a machine. DoesNotFitError where that does not fit there."""
    missing, free = folder_there(host, folder, record, environment)
    needed = sum(record["files"][name]["bytes"] for name in missing)
    if needed and with_headroom(needed) > free:
        raise DoesNotFitError(
            f"{host.name}: {folder}: {amount(needed)} are still to copy, and {amount(free)} are free there; make room"
        )
    return missing


def folder_there(
    host: Host, folder: Path, record: Record, environment: Mapping[str, str]
) -> tuple[dict[str, str], int]:
    """(what is not there as it should be, and why; free bytes) on a machine. UnreachableError."""
    words = with_python(["-m", "mlx_empire.fetch.everywhere", str(folder)])
    try:
        answer = ask(host, words, environment, CHECK_SECONDS, json.dumps(record))
        said = json.loads(answer.stdout)
        return dict(said["wrong"]), int(said["free"])
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error)
    except (ValueError, KeyError, TypeError):
        reason = " ".join(answer.stderr.split())[-160:] or f"exit code {answer.returncode}"
    raise UnreachableError(f"{host.name}: {reason}; `mlx-empire doctor HOSTFILE` says what to mend")


def send(host: Host, folder: Path, names: Sequence[str], environment: Mapping[str, str]) -> None:
    """Send these files of the folder. UnreachableError."""
    there = shlex.quote(str(folder))
    unpack = f"cd {shlex.quote(os.getcwd())} && mkdir -p {there} && exec tar -C {there} -xf -"
    with subprocess.Popen(
        ["tar", "-C", str(folder), "-cf", "-", "--", *names], stdout=subprocess.PIPE
    ) as packing:
        done = subprocess.run(
            line_to(host, ["/bin/sh", "-c", unpack], environment),
            env=dict(environment),
            stdin=packing.stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert packing.stdout is not None
        packing.stdout.close()  # so that tar ends where nobody reads any more
    if done.returncode != 0 or packing.returncode != 0:
        reason = " ".join(done.stderr.split())[-160:] or "the copy was cut off"
        raise UnreachableError(
            f"{host.name}: {reason}; run the same command again, which keeps what is whole"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """On the other machine: check a folder against the record on standard input, and keep the record if it is whole."""
    (name,) = sys.argv[1:] if arguments is None else arguments
    folder, record = Path(name), json.load(sys.stdin)
    wrong = differing(folder, record["files"])
    if not wrong:
        write_record(folder, record)
    print(json.dumps({"wrong": wrong, "free": free_bytes(folder)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
