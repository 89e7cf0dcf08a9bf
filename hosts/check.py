"""Try out on your own machines what no test on Linux can prove: python hosts/check.py hosts/empire.txt

This is `mlx-empire doctor HOSTFILE --train`: every machine is asked about itself, then the tiny model of the tests is
trained over all of them twice, once with a process killed; with `--unit RECIPE` one true layer of its model instead.
Start it in the repository, on the first machine, after `make setup` on all of them. Nothing is written but into
`--dir`: its `check.json` has all of the table, and no variable of the environment. The table is printed whatever fails.
Not run in CI on macOS.
"""

import sys

from mlx_empire.doctor.command import main

if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(main(words if "--unit" in words else [*words, "--train"]))
