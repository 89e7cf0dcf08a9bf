"""Which code a machine runs: `python -m mlx_empire.setup.code` prints it as JSON, there and here."""

import json
import sys

from mlx_empire.comm.checks import environment, package_digest


def own_code() -> dict[str, str | None]:
    """The versions that a run's handshake compares, and the digest of the package's own files."""
    return {**environment(), "package": package_digest()}


if __name__ == "__main__":
    print(json.dumps(own_code()))
    sys.exit(0)
