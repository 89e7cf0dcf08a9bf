"""`capacity --federation` as a user types it: the document's seven models on its six machines, and wrong files."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE, HOSTS = ROOT / "docs" / "federation" / "managers.yaml", ROOT / "docs" / "federation" / "hosts.txt"
PAGE = ROOT / "docs" / "federation.md"
# DeepSeek Coder 6.7B by its published configuration: 32 layers of 4,096 with 11,008 within, and 32,256 tokens twice.
PARAMETERS = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32256 * 4096 + 4096
WHOLE, CACHE = 2 * PARAMETERS, 4096 * 32 * 2 * 4096 * 2


def test_seven_models_live_on_six_machines(say) -> None:
    """By hand: a Mac lends three quarters of its memory, of which 95 % may be filled; a model is 13.5 GB at 16 bits."""
    found = say("--federation", FILE, "--hosts", HOSTS, "--json")
    assert found.code == 0
    models, nodes = ({one["name"]: one for one in found.json[key]} for key in ("models", "nodes"))
    assert {one["own_bytes"] for one in models.values()} == {WHOLE}
    assert {one["cache_bytes"] for one in models.values()} == {CACHE}
    for node in nodes.values():
        room = int(0.95 * (node["memory_bytes"] * 3 // 4))
        assert node["room_bytes"] == room
        assert node["whole_models"] == room // (WHOLE + CACHE)
        assert node["used_bytes"] <= room
    assert [nodes[name]["whole_models"] for name in ("server", "node-1", "laptop")] == [6, 1, 0]
    assert nodes["laptop"]["packed_models"] == 2, "a laptop of 16 GB holds them in 4 bits alone"
    hot = [one for one in models.values() if one["hot"]]
    assert sorted(one["node"] for one in hot) == ["node-1", "node-2", "node-3", "node-4", "server", "server"]
    assert models["UDM"]["node"] is None
    for one in models.values():
        assert one["backup"] not in (None, one["disk"], "laptop")
        assert one["swap_seconds"] == pytest.approx([WHOLE / 6e9, WHOLE / 3e9])
        assert one["over_link_seconds"] == pytest.approx([WHOLE / 1.1e9] * 2)


def test_the_page_shows_what_the_command_prints(say) -> None:
    told = say("--federation", FILE, "--hosts", HOSTS).out
    for line in filter(None, map(str.rstrip, told.splitlines())):
        assert line in PAGE.read_text(), f"{line!r}: write it anew in docs/federation.md"


def test_adapters_over_one_base_and_what_has_no_room(say, tmp_path, hosts) -> None:
    file = tmp_path / "people.yaml"
    file.write_text(
        "context: 0\nmodels:\n"
        + "".join(f"  p{i}: {{base: llama-3.2-1b, rank: 8}}\n" for i in range(20))
        + "  huge: {size: 900GB}\n  small: {size: 2 GiB, hot: false}\n"
    )
    found = say(
        "--federation", file, "--hosts", hosts("a # memory=16GiB chip=M2", "b # memory=16GiB"), "--json"
    )
    assert (found.code, found.json["hot_without_room"]) == (3, ["huge"])
    by_name = {one["name"]: one for one in found.json["models"]}
    assert len({by_name[f"p{i}"]["node"] for i in range(20)}) == 1, "the base is loaded once"
    huge = by_name["huge"]
    assert (huge["disk"], huge["backup"], huge["swap_seconds"]) == (None, None, None)
    loaded_by_b = [one for one in by_name.values() if one["disk"] == "b"]
    assert all(one["swap_seconds"] is None for one in loaded_by_b), "its chip is not named"
    said = say("--federation", file, "--hosts", hosts("a # memory=16GiB chip=M2"))
    assert said.code == 3
    assert "hot, and without room in any memory: huge" in said.out
    assert "none can" in said.out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ":1: it: "),
        ("models: {}\n", ":1: models: "),
        ("models:\n  a: {size: 12}\n", ":2: models.a.size: "),
        ("models:\n  a: {size: 12GB, wieght: 2}\n", ":2: models.a.wieght: "),
        ("models:\n  a: {weight: 2}\n", ":2: models.a: says not exactly one of model, size and base"),
        ("models:\n  a: {model: llama-3.2-1b, size: 1GB}\n", ":2: models.a: says not exactly one"),
        (
            "models:\n  a: {model: lama-3.2-1b}\n",
            "lama-3.2-1b: not in the catalog; did you mean llama-3.2-1b?",
        ),
    ],
)
def test_a_wrong_file_is_refused_in_a_line(say, tmp_path, hosts, text: str, words: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    said = say("--federation", file, "--hosts", hosts("a # memory=16GiB chip=M2"))
    assert (said.code, said.out, said.err.count("\n")) == (64, "", 1)
    assert words in said.err


def test_it_needs_its_hostfile_and_no_recipe(say, recipe) -> None:
    assert say("--federation", FILE).code == 64
    assert say(recipe, "--federation", FILE, "--hosts", HOSTS).code == 64
