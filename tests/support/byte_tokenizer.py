"""A tokenizer of 256 bytes and the special tokens that a test names, as a model folder has it."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from mlx_empire.data.encode import load_tokenizer


def byte_tokenizer(
    folder: Path,
    template: Any,
    specials: tuple[str, ...],
    ends: tuple[str, ...],
    eos: str | None = None,
    bos: str | None = None,
    adds: str = "",
) -> Any:
    """Write and load it. ends: eos_token_id of generation_config.json; adds: "bos", "bos eos" around each text."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in specials])
    if adds:
        around = f"{bos} $A {eos}" if "eos" in adds else f"{bos} $A"
        named = [(text, tokenizer.token_to_id(text)) for text in specials]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=named)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    config |= {"eos_token": eos, "bos_token": bos}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ids = [tokenizer.token_to_id(text) for text in ends]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return load_tokenizer(folder)
