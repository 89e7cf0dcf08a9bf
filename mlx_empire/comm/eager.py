"""Which messages Open MPI's TCP sends without asking the receiver first, and how a launch has pieces among them.

Knows no MPI, so that the launcher can ask it.
"""

from collections.abc import Mapping

from mlx_empire.plan.traffic import PIECE_BYTES

LIMIT = "btl_tcp_eager_limit"  # Open MPI's name for it; with the header
DEFAULT_LIMIT = 65536
HEADER_BYTES = 1024  # more than what Open MPI adds to a message


def unasked_bytes(environment: Mapping[str, str]) -> int:
    """The largest message that is sent unasked by a rank with this environment, in which mpirun puts its settings."""
    limit = int(environment.get(f"OMPI_MCA_{LIMIT}", DEFAULT_LIMIT))
    return max(limit - HEADER_BYTES, HEADER_BYTES)


def eager_words() -> list[str]:
    """Words of the mpirun line with which a piece is sent unasked. The second limit may not be below the first."""
    size = str(PIECE_BYTES + HEADER_BYTES)
    return ["--mca", LIMIT, size, "--mca", "btl_tcp_max_send_size", size]
