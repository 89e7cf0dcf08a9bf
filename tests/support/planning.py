"""A recipe, a small made-up model, those of the catalog, and nodes for tests of plans: everything is numbers."""

from collections.abc import Sequence

from mlx_empire.cluster.hostfile import Node
from mlx_empire.model.spec import ModelSpec, TensorSpec, UnitSpec
from mlx_empire.model.target import catalog_target
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.assess import Assessment
from mlx_empire.plan.assess import assess as assessed
from mlx_empire.recipe.load import parse_recipe
from mlx_empire.recipe.schema import Recipe

MIB = 2**20

RECIPE = """
model: {path: llama-3.2-1b, dtype: bfloat16}
data: {path: data, sequence_length: 2048}
batch: {global_size: 8, micro_size: 1}
optimizer: {learning_rate: 1.0e-5, state_bits: 8}
memory: {gradient_checkpointing: true, zero_stage: auto, shares: memory, gradient_dtype: auto}
run: {dir: runs/test, steps: 100}
"""


def recipe_of(*overrides: str) -> Recipe:
    return parse_recipe(RECIPE, "test.yaml", overrides)


def node_of(name: str, limit: int, **more: object) -> Node:
    return Node(name, 1, None, limit, limit, **more)  # type: ignore[arg-type]


def nodes_of(limits: Sequence[int]) -> list[Node]:
    return [node_of(f"node-{i}", limit) for i, limit in enumerate(limits)]


def catalog_spec(name: str, recipe: Recipe) -> ModelSpec:
    """The catalog model `name` as `recipe` tunes it."""
    return catalog_target(name, recipe).spec


def assess(recipe: Recipe, spec: ModelSpec, nodes: Sequence[Node]) -> Assessment:
    """What a plan says with the recipe's own optimizer."""
    return assessed(recipe, spec, nodes, state_bytes_of)


def llama_like(
    layers: int = 4, hidden: int = 256, vocabulary: int = 1024, dtype: str = "bfloat16"
) -> ModelSpec:
    """A dense model with an untied head: 4 h^2 of attention and 3 x h x 4h of feed-forward per layer."""
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "max_position_embeddings": 65536,
    }
    root = UnitSpec(
        "root",
        (
            TensorSpec("model.embed_tokens.weight", (vocabulary, hidden), dtype),
            TensorSpec("lm_head.weight", (vocabulary, hidden), dtype),
        ),
    )
    units = [root]
    for i in range(layers):
        square = [(f"self_attn.{n}_proj", (hidden, hidden)) for n in "qkvo"]
        wide = [(f"mlp.{n}_proj", (4 * hidden, hidden)) for n in ("gate", "up")]
        shapes = [*square, *wide, ("mlp.down_proj", (hidden, 4 * hidden))]
        tensors = tuple(TensorSpec(f"model.layers.{i}.{n}.weight", s, dtype) for n, s in shapes)
        units.append(UnitSpec(f"model.layers.{i}", tensors))
    return ModelSpec("tiny", "llama", dtype, tuple(units), config)
