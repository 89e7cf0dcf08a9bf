"""Recipes that mean harm, or nothing at all: refused quickly and in one line."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe.test_load import assert_one_line

from mlx_empire.errors import UserError
from mlx_empire.recipe.load import load_recipe, parse_recipe

HOSTILE = {
    "billion laughs": "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n",
    "brackets": "[" * 60_000,
    "braces": "{" * 60_000,
    "dashes": "- " * 30_000,
    "long list": "a: [" + "1," * 30_000 + "]",
    "many keys": "".join(f"k{number}: 1\n" for number in range(6_000)),
    "long key": "a" * 60_000 + ": 1",
    "many lines": "a\n" * 30_000,
    "escapes": 'a: "' + "\\x41" * 15_000 + '"',
    "divisors": "batch: {global_size: 2147483647, micro_size: 2147483646}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_refused_quickly(minimal: str, text: str) -> None:
    if text.startswith("batch"):
        text = minimal.replace("batch:\n  global_size: 8", text)
    start = time.process_time()
    with pytest.raises(UserError) as error:
        parse_recipe(text, "x.yaml")
    assert time.process_time() - start < 2
    assert_one_line(error)


@settings(deadline=2000)
@given(st.binary(max_size=300))
def test_any_bytes_give_a_recipe_or_one_line(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "x.yaml"
    path.write_bytes(raw)
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert_one_line(error)


PIECES = [
    "model:",
    "  path: ",
    "run",
    "\n",
    ": ",
    "[",
    "]",
    "{",
    "}",
    "- ",
    "&a",
    "*a",
    "!!str ",
    "'",
    '"',
    "#",
]
PIECES += [
    "null",
    "1e-5",
    "9" * 50,
    "\t",
    "\0",
    "\ufeff",
    "\u2028",
    "\r",
    "|",
    ">",
    "%",
    "@",
    "? ",
    "---\n",
    "\\U",
]


@settings(deadline=2000)
@given(
    st.lists(st.sampled_from(PIECES), max_size=40).map("".join), st.lists(st.text(max_size=30), max_size=2)
)
def test_any_text_and_overrides_give_a_recipe_or_one_line(text: str, overrides: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse_recipe(text, "x.yaml", overrides)
    assert_one_line(error)


@settings(deadline=2000)
@given(
    st.sampled_from(["run.steps", "model.path", "memory.shares", "tuning.rank", "run.hosts"]),
    st.text(max_size=40),
)
def test_any_override_value_gives_a_recipe_or_one_line(key: str, value: str) -> None:
    from_file = "model: {path: m}\ndata: {path: d, sequence_length: 1}\nbatch: {global_size: 1}\n"
    from_file += "optimizer: {learning_rate: 1}\nrun: {dir: d, steps: 1}\n"
    message = ""
    try:
        parse_recipe(from_file, "x.yaml", [f"{key}={value}"])
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
