"""What Open MPI sends without a handshake, by its settings; and what the ranks make of them."""

import pytest

from mlx_empire.errors import UserError
from mlx_empire.plan.traffic import (
    EAGER_LIMIT,
    PIECE_BYTES,
    UNASKED_FACT,
    agreed_unasked_bytes,
    eager_words,
    unasked_bytes,
)


def test_without_a_setting_messages_of_64_kib_less_a_header_are_unasked() -> None:
    assert unasked_bytes({}) == 65536 - 1024
    assert unasked_bytes({f"OMPI_MCA_{EAGER_LIMIT}": "1"}) > 0
    assert unasked_bytes({f"OMPI_MCA_{EAGER_LIMIT}": "much"}) == unasked_bytes({})
    assert unasked_bytes({f"OMPI_MCA_{EAGER_LIMIT}": "128K"}) == 128 * 1024 - 1024


def test_a_launch_has_pieces_sent_unasked() -> None:
    words = eager_words()
    settings = dict(zip(words[1::3], words[2::3], strict=True))
    assert unasked_bytes({f"OMPI_MCA_{name}": value for name, value in settings.items()}) == PIECE_BYTES
    assert int(settings["btl_tcp_max_send_size"]) >= int(settings[EAGER_LIMIT])
    assert words[0::3] == ["--mca"] * 2


def test_the_ranks_take_the_smallest_and_part_from_an_earlier_version() -> None:
    assert agreed_unasked_bytes([{UNASKED_FACT: 64512}, {UNASKED_FACT: 5000}]) == 5000
    with pytest.raises(UserError, match="different versions"):  # what version 0.1 compares at this place
        agreed_unasked_bytes([{UNASKED_FACT: 64512}, {"mlx_empire": "0.1.0", "python": "3.11"}])
