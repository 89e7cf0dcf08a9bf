"""What Metal has for a node that MLX evaluates: the names of the kernels that it would look up, from MLX's sources.

Names only, one representative of each tiled family; not precision, races or speed. What `mx.fast` computes is put
together from other nodes on a CPU, so its own kernels are not seen here (see `test_fast_kernels`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from metal.kernel_names import SYSTEMS, known_names
from support.watching import Kind

MOST_BUFFERS = 31  # of one kernel's arguments
OWN_BUFFERS = 3  # that a fused kernel takes besides: shapes, strides, sizes
MOST_ELEMENTS = 2**31  # of one array; MLX's kernels index with 32 bits in places
REFUSED = frozenset({"float64", "complex64"})  # what no kernel takes
WIDE = frozenset({"int64", "uint64"})  # no scatter, no atomic addition

# Nodes that only say how memory is to be seen, or that run no kernel of their own.
_VIEWS = frozenset(
    [
        "Broadcast",
        "ExpandDims",
        "Squeeze",
        "Transpose",
        "Split",
        "StopGradient",
        "CustomTransforms",
        "AsStrided",
        "Depends",
        "Load",
    ]
)
_COPIES = frozenset(
    ["AsType", "Copy", "Contiguous", "Concatenate", "Reshape", "Flatten", "Unflatten", "Slice", "Pad", "Full"]
)
_REDUCTIONS = {"Sum": "sum", "Prod": "prod", "Max": "max", "Min": "min", "And": "and", "Or": "or"}
# Compiled when they are first used, from sources that take these dtypes.
_AT_RUN_TIME = frozenset(
    ["Gather", "GatherAxis", "Scatter", "Scatter Sum", "ScatterAxis", "ScatterAxis Sum", "SliceUpdate"]
)
_PRODUCTS = {
    "Matmul": "steel_gemm_fused_nn_{0}_{0}_bm64_bn64_bk16_wm2_wn2",
    "AddMM": "steel_gemm_fused_nn_{0}_{0}_bm64_bn64_bk16_wm2_wn2",
    "GatherMM": "steel_gather_mm_nn_{0}_{0}_bm64_bn64_bk16_wm1_wn2",
    "SegmentedMM": "steel_segmented_mm_nn_{0}_{0}_bm64_bn64_bk16_wm1_wn2",
}
_ONE_NAME = {
    "Softmax": "looped_softmax_{0}",
    "LogSumExp": "looped_logsumexp_{0}",
    "ArgReduce": "argmax_{0}",
    "ArgSort": "carg_block_sort_{0}_uint32_bn128_tn4",
    "ArgPartition": "carg_block_sort_{0}_uint32_bn128_tn4",
    "Sort": "c_block_sort_{0}_{0}_bn128_tn4",
    "RandomBits": "rbits",
    "CumSum": "contig_scan_inclusive_sum_{0}_{1}",
    "CumMax": "contig_scan_inclusive_max_{0}_{1}",
    "CumProd": "contig_scan_inclusive_prod_{0}_{1}",
    "Convolution": "depthwise_conv_1d_{0}",
}
_SHORT = {"float32": "float", "float16": "float16_t", "bfloat16": "bfloat16_t"}


def complaints(kind: Kind) -> Iterator[str]:
    """What Metal does not have, or does not take, of this kind of node; nothing if all is there."""
    dtypes = {*kind.inputs, *kind.outputs}
    if dtypes & REFUSED:
        yield f"{kind.primitive}: {sorted(dtypes & REFUSED)} on the GPU"
    if kind.elements >= MOST_ELEMENTS:
        yield f"{kind.primitive}: an array of {kind.elements:,} elements"
    if kind.primitive.startswith("Compiled"):
        yield from _of_fused(kind, dtypes)
        return
    for system in SYSTEMS:
        missing = [name for name in kernels(kind, known_names(system)) if name not in known_names(system)]
        if missing:
            yield f"macOS {system} has no {missing} for {kind.primitive} {kind.inputs} -> {kind.outputs}"


def _of_fused(kind: Kind, dtypes: set[str]) -> Iterator[str]:
    """A kernel that `mx.compile` writes: operations that exist, narrow dtypes, few enough buffers."""
    known = {name.removeprefix("op:") for name in known_names(SYSTEMS[0]) if name.startswith("op:")}
    words = "|".join(sorted(known | {"AsType", "Broadcast"}, key=len, reverse=True))
    if not re.fullmatch(f"Compiled(?:{words})+", kind.primitive):
        yield f"{kind.primitive}: an operation that Metal does not know"
    if dtypes & WIDE:
        yield f"{kind.primitive}: {sorted(dtypes & WIDE)} in a fused kernel"
    if kind.buffers + OWN_BUFFERS > MOST_BUFFERS:
        yield f"{kind.primitive}: {kind.buffers} arrays in one kernel, of {MOST_BUFFERS - OWN_BUFFERS}"


def kernels(kind: Kind, known: frozenset[str]) -> list[str]:
    """The kernels that a node needs; a name that cannot exist where the node itself is not known here.

    `known`: a release's names, from which one of the quantised families is taken.
    """
    name, given, made = kind.primitive, kind.inputs, kind.outputs
    if name in _VIEWS or name.startswith("View "):
        return []
    if name in _AT_RUN_TIME:
        wide = "Scatter" in name and made[0] in WIDE
        return ["a scatter of 8 bytes"] if wide else []
    if name in _PRODUCTS:
        return [_PRODUCTS[name].format(given[0])]
    if name in _ONE_NAME:
        return [_ONE_NAME[name].format((given or made)[0], made[0])]
    if name == "Arange":
        return [f"arange{made[0]}"]
    if name == "Select":
        return [f"g2_Select{given[1]}"]
    if name in _COPIES:
        return [f"v_copy{source}{made[0]}" for source in given] + [f"s_copy{made[0]}{made[0]}"]
    if name in _REDUCTIONS:
        return [f"all_reduce_{_REDUCTIONS[name]}{_reduced(_REDUCTIONS[name], given[0])}"]
    if name in ("QuantizedMatmul", "GatherQMM", "Quantize", "Dequantize"):
        return [_quantised(kind, known)]
    if f"op:{name}" in known:
        return [f"v_{name}{given[0]}{made[0]}"] if len(given) == 1 else [f"vv_{name}{given[0]}"]
    return [f"rule for {name}"]


def _reduced(reduction: str, dtype: str) -> str:
    """The dtype by whose name a reduction's kernel goes: whole numbers and truth values share some."""
    if reduction in ("sum", "prod"):
        return {"bool_": "int8"}.get(dtype, dtype)
    if reduction in ("max", "min") or dtype.startswith(("float", "bfloat")):
        return dtype
    return "bool_" if dtype in ("bool_", "int8", "uint8") else f"int{dtype[-2:]}"


def _quantised(kind: Kind, known: frozenset[str]) -> str:
    """One kernel of the family that multiplies or packs in low bits, for the dtype of its floating-point side."""
    floats = [dtype for dtype in (*kind.inputs, *kind.outputs) if dtype in _SHORT]
    scales = kind.inputs[2] if len(kind.inputs) > 2 else "uint8"
    gathered = "gather_" if kind.primitive == "GatherQMM" else ""
    what = (
        f"{gathered}qmm_t"
        if "M" in kind.primitive
        else "quantize"
        if kind.primitive == "Quantize"
        else "dequantize"
    )
    prefix = f"{'mxfp4' if scales == 'uint8' else 'affine'}_{what}_{_SHORT[floats[0]]}_gs_"
    return next((name for name in sorted(known) if name.startswith(prefix)), prefix)
