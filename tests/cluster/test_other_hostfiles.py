"""MLX's hostfile is read as one of mpirun would be, and measured speeds change nothing but `link=` of their lines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_empire.cluster.hostfile import parse_hostfile
from mlx_empire.cluster.other_hostfiles import (
    load_any_hostfile,
    replace_hostfile,
    with_links,
    written_hostfile,
    written_rate,
)
from mlx_empire.errors import UserError

LINES = (
    "{} slots=2",
    "me@{}   slots=1 port=2222  # role=king    memory=512GiB chip=M3-Ultra",
    "{} # link=9 and some words, link = is not here again".replace("link = ", "a link "),
    "{}\t#link = 1.5GB/s   role=soldier",
    "# a line of words, with link=7",
    "",
)


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(LINES), min_size=1, max_size=8),
    st.lists(st.floats(1e5, 1e12), min_size=8, max_size=8),
    st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_only_link_of_the_named_hosts_changes(
    lines: list[str], rates: list[float], named: list[bool]
) -> None:
    text = "\n".join([*(line.format(f"host-{n}") for n, line in enumerate(lines)), "last slots=1"]) + "\n"
    before = parse_hostfile(text, "hosts").nodes
    wanted = {h.name: rate for h, rate, yes in zip(before, rates, named, strict=False) if yes}
    after_text = with_links(text, "hosts", wanted)
    after = parse_hostfile(after_text, "hosts").nodes
    for old, new in zip(before, after, strict=True):
        assert replace(new, link_bytes_per_second=old.link_bytes_per_second) == old
        if old.name in wanted:
            assert new.link_bytes_per_second == pytest.approx(wanted[old.name], rel=0.006)
        else:
            assert new.link_bytes_per_second == old.link_bytes_per_second
    untouched = [
        n
        for n, line in enumerate(text.split("\n"))
        if not any(h.line - 1 == n for h in before if h.name in wanted)
    ]
    assert [after_text.split("\n")[n] for n in untouched] == [text.split("\n")[n] for n in untouched]


@pytest.mark.parametrize(
    ("rate", "written"),
    [(1.1e9, "1.1GB/s"), (11.72e6, "11.7MB/s"), (6.123e9, "6.12GB/s"), (1.2e8, "0.12GB/s")],
)
def test_a_speed_is_written_with_three_digits(rate: float, written: str) -> None:
    assert written_rate(rate) == written


@pytest.mark.parametrize("wrapped", [False, True])
def test_mlxs_hostfile_names_the_same_machines(wrapped: bool, tmp_path: Path) -> None:
    hosts = [{"ssh": "king.local", "ips": ["10.0.0.1"]}, {"ssh": "s1.local", "ips": []}, {"ssh": "s1.local"}]
    path = tmp_path / "hosts.json"
    path.write_text("\n" + json.dumps({"backend": "ring", "hosts": hosts} if wrapped else hosts))
    found = load_any_hostfile(path)
    assert [(host.name, host.slots) for host in found.nodes] == [("king.local", 1), ("s1.local", 2)]
    assert parse_hostfile(written_hostfile(found.nodes), "hosts").nodes == found.nodes


@pytest.mark.parametrize("text", ["[", "[1]", '{"hosts": 3}', "{}", '[{"ssh": "-oProxyCommand=x"}]', "[]"])
def test_a_broken_hostfile_of_mlx_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "hosts.json").write_text(text)
    with pytest.raises(UserError, match=r"hosts\.json") as caught:
        load_any_hostfile(tmp_path / "hosts.json")
    assert "\n" not in str(caught.value)


def test_a_hostfile_keeps_its_mode_and_a_link_to_it_stays(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("a\n")
    (tmp_path / "real.txt").chmod(0o640)
    (tmp_path / "hosts.txt").symlink_to("real.txt")
    replace_hostfile(tmp_path / "hosts.txt", "b\n")
    assert (tmp_path / "hosts.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "b\n"
    assert (tmp_path / "real.txt").stat().st_mode & 0o777 == 0o640
    assert len(list(tmp_path.iterdir())) == 2
