"""The tokenizer in a GGUF's metadata as tokenizer.json and tokenizer_config.json.

Byte-level BPE is built here rather than by transformers' GGUF loader, which leaves out what llama.cpp's pre-tokenizer
name means for some models (SmolLM splits digits before anything else). A pre-tokenizer that is not known is an error:
guessing would give other tokens than the model was trained on, and nobody would notice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.models.errors import ModelError
from workers.models.gguf_config import CONTROL, GgufConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

USER_DEFINED = 4  # token type: matched whole in text, but no special token

_GPT2 = ("gpt-2", "phi-2", "olmo")
_SMOLLM = ("smollm",)
_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "smaug-bpe", "falcon3")
_QWEN2 = ("qwen2", "deepseek-r1-qwen", "megrez")
_TEKKEN = ("tekken",)
KNOWN_PRE_TOKENIZERS = _GPT2 + _SMOLLM + _LLAMA3 + _QWEN2 + _TEKKEN

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
_QWEN2_SPLIT = _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_ROUND_TRIP = "Hello, world! 1234 3.14\n\n  it's  fine\tnaïve 你好 🌍 x=[1, 23];"


def write_tokenizer(source: Path, metadata: GgufConfig, target: Path) -> None:
    """Raises ModelError when the file has no tokenizer or one that is not known."""
    kind = metadata.get("tokenizer.ggml.model")
    if (ready := metadata.get("tokenizer.huggingface.json")) is not None:
        tokenizer = _parsed(source, ready)
    elif kind == "gpt2":
        tokenizer = _byte_level(source, metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece(source)
    else:
        raise ModelError(
            f"{source.name}: tokenizer model {kind!r} is not supported; supported are gpt2 and llama"
        )
    tokenizer.save(str(target / "tokenizer.json"))
    config = json.dumps(_tokenizer_config(metadata), indent=2, ensure_ascii=False)
    (target / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")


def _tokenizer_config(metadata: GgufConfig) -> dict[str, Any]:
    tokens = metadata.tokens
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata.architecture}.context_length"),
    }
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, key in keys.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and token_id < len(tokens):
            config[f"{name}_token"] = tokens[token_id]
    if metadata.chat_template is not None:
        config["chat_template"] = metadata.chat_template
    return config


def _parsed(source: Path, text: str) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:
        raise ModelError(f"{source.name}: its tokenizer.json cannot be read: {error}") from error


def _byte_level(source: Path, metadata: GgufConfig) -> Tokenizer:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in KNOWN_PRE_TOKENIZERS:
        raise ModelError(
            f"{source.name}: pre-tokenizer {pre!r} is not known (known: {', '.join(KNOWN_PRE_TOKENIZERS)}); "
            "use the model's Hugging Face directory"
        )
    tokens = metadata.tokens
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise ModelError(f"{source.name}: its BPE vocabulary has no valid merges")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # Llama 3's tokens are looked up whole before any merge.
    whole_first = pre in _LLAMA3 + _TEKKEN
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole_first))
    except Exception as error:
        raise ModelError(f"{source.name}: its BPE vocabulary has no valid merges: {error}") from error
    splits = dict.fromkeys(_LLAMA3, _LLAMA3_SPLIT) | dict.fromkeys(_QWEN2, _QWEN2_SPLIT)
    splits |= dict.fromkeys(_TEKKEN, _TEKKEN_SPLIT)
    if pre in splits:
        first = pre_tokenizers.Split(Regex(splits[pre]), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, bytes_only])
    elif pre in _SMOLLM:
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    special, whole = [], []
    for token, kind in zip(tokens, metadata.get("tokenizer.ggml.token_type", []), strict=False):
        if kind == CONTROL:
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == USER_DEFINED:
            whole.append(AddedToken(token, normalized=False, special=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(whole)
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", whole_first):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]}:0 $A:0",
            pair=f"{tokens[bos]}:0 $A:0 $B:0",
            special_tokens=[(tokens[bos], bos)],
        )
    _check(source, tokenizer, tokens, [str(token.content) for token in special])
    return tokenizer


def _check(source: Path, tokenizer: Tokenizer, tokens: list[str], special: list[str]) -> None:
    """The ids are the file's, special tokens stay whole, and text comes back as it went in."""
    for token in special:
        ids = tokenizer.encode(token, add_special_tokens=False).ids
        if len(ids) != 1 or tokens[ids[0]] != token:
            raise ModelError(f"{source.name}: special token {token!r} does not come out whole")
    ids = tokenizer.encode(_ROUND_TRIP, add_special_tokens=False).ids
    if tokenizer.decode(ids, skip_special_tokens=False) != _ROUND_TRIP:
        raise ModelError(f"{source.name}: its vocabulary does not give text back; the file may be damaged")


def _sentencepiece(source: Path) -> Tokenizer:
    """SentencePiece vocabularies: transformers recovers the merges from the scores."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
        tokenizer: Tokenizer = loaded.backend_tokenizer
    except (ValueError, KeyError, IndexError, OSError, ImportError, AttributeError) as error:
        raise ModelError(
            f"{source.name}: its tokenizer cannot be built ({error}); use its HF directory"
        ) from error
    return tokenizer
