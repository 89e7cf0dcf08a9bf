"""Every key of a recipe is read by something outside `recipe/`: a key that nothing reads would be a lie.

A key `section.leaf` counts as read where the code has `<something>.section.leaf`, or `name.leaf` with a name
that is called `section`, ends in `_section`, is annotated with the section's class, or was assigned from
`<something>.section`.
"""

import ast
from pathlib import Path

import pytest

from mlx_empire.recipe.explain import leaf_fields, sections

PACKAGE = Path(__file__).parents[2] / "mlx_empire"


def keys_to_read() -> list[str]:
    return list(leaf_fields())


def annotated_section(annotation: ast.expr | None) -> str | None:
    words = ast.unparse(annotation) if annotation else ""
    return next((name for name, cls in sections().items() if cls.__name__ in words), None)


def names_of_sections(tree: ast.AST) -> dict[str, set[str]]:
    """Which sections each variable or attribute name of a module may stand for."""
    names: dict[str, set[str]] = {name: {name} for name in sections()}
    for node in ast.walk(tree):
        found: list[tuple[str, str | None]] = []
        if isinstance(node, ast.arg):
            found = [(node.arg, annotated_section(node.annotation))]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name | ast.Attribute):
            target = node.target
            found = [
                (
                    target.id if isinstance(target, ast.Name) else target.attr,
                    annotated_section(node.annotation),
                )
            ]
        elif isinstance(node, ast.Assign | ast.NamedExpr):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=False))
                for left, right in pairs:
                    if isinstance(right, ast.Attribute) and isinstance(left, ast.Name | ast.Attribute):
                        found.append((left.id if isinstance(left, ast.Name) else left.attr, right.attr))
        for name, section in found:
            if section in sections():
                names.setdefault(name, set()).add(str(section))
    return names


def keys_read(source: str) -> set[str]:
    tree = ast.parse(source)
    names = names_of_sections(tree)
    read = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            possible = names.get(owner, {owner.removesuffix("_section")})
            read |= {f"{section}.{node.attr}" for section in possible}
    return read


def test_the_reader_sees_what_it_should() -> None:
    source = """
def f(settings: OptimizerSection, recipe):
    memory, run = recipe.memory, recipe.run
    batch = recipe.batch
    print(settings.eps, memory.shares, run.seed, batch.cells, recipe.model.path, unrelated.zero_stage)
"""
    read = keys_read(source) & set(keys_to_read())
    assert read == {"optimizer.eps", "memory.shares", "run.seed", "batch.cells", "model.path"}


@pytest.fixture(scope="module")
def read() -> set[str]:
    outside = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "recipe"]
    return set().union(*(keys_read(path.read_text()) for path in outside))


@pytest.mark.parametrize("key", keys_to_read())
def test_key_is_read(key: str, read: set[str]) -> None:
    assert key in read, f"nothing outside recipe/ reads {key}"
