"""The tokenizer inside a GGUF file, rebuilt as the files of an HF folder.

Two kinds (`tokenizer.ggml.model`):

- `llama`: SentencePiece BPE with byte fallback (Gemma, Llama 1 and 2). A GGUF holds pieces, scores
  and types, from which both tokenizer.model (llama.cpp's converter needs it) and tokenizer.json
  follow. For Gemma 3 the vocabulary and all 514,906 merges equal the official tokenizer.json.
- `gpt2`: byte-level BPE with stored merges (SmolLM2, Llama 3).

llama.cpp's converter changes some tokens when it writes a GGUF, and this is undone: spaces in
user-defined tokens are stored plain, <unk> loses its type, and tokens that only look special
become control tokens.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from qatlora.errors import CheckpointError
from qatlora.llamacpp.gguf_read import GgufFile
from qatlora.llamacpp.pre_tokenizers import PRE_TOKENIZERS

_SPACE = "▁"  # U+2581, SentencePiece's visible space
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_LOOKS_SPECIAL = re.compile(r"<mask>|<2mass>|\[@BOS@\]|<unused\d+>")
"""Ordinary added tokens that the converter marks as control (`does_token_look_special`)."""
_SPECIAL_NAMES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


def write_tokenizer(gguf: GgufFile, folder: Path, chat_template: str | None) -> None:
    """Write tokenizer.json, tokenizer_config.json and, for SentencePiece, tokenizer.model.

    Args:
        gguf: file with a `llama` or `gpt2` vocabulary.
        folder: existing folder, written into.
        chat_template: Jinja text; None takes the file's own template, if it has one.

    Raises:
        CheckpointError: another kind of vocabulary, an unknown pre-tokenizer, or lists that do not
            belong together.
    """
    kind = gguf.require("tokenizer.ggml.model")
    if kind not in _BUILDERS:
        raise CheckpointError(
            f"{gguf.path} has a vocabulary of the kind {kind!r}; {' and '.join(_BUILDERS)} can be "
            "rebuilt: give the HF folder of the model instead."
        )
    tokenizer, settings = _BUILDERS[kind](gguf, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings["clean_up_tokenization_spaces"] = False
    settings |= _special_token_settings(gguf)
    settings["added_tokens_decoder"] = _added_tokens_decoder(tokenizer)
    _write_json(folder / "tokenizer_config.json", settings)
    template = chat_template or gguf.metadata.get("tokenizer.chat_template")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _sentencepiece(gguf: GgufFile, folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    pieces, types = _pieces(gguf), _types(gguf)
    # In SentencePiece models only learned pieces have scores; the converter sets the rest to -1000.
    stored = gguf.require("tokenizer.ggml.scores")
    scores = [
        0.0 if kind in (_CONTROL, _USER_DEFINED) else score
        for score, kind in zip(stored, types, strict=True)
    ]
    is_gemma = gguf.require("general.architecture").startswith("gemma")
    prefix_space = gguf.metadata.get("tokenizer.ggml.add_space_prefix", not is_gemma)
    proto = _sentencepiece_model(gguf, pieces, scores, types, prefix_space)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())

    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    unknown = pieces[gguf.metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    bpe = models.BPE(
        vocab=vocabulary,
        merges=_merges(vocabulary, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(bpe)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if is_gemma:
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        scheme = "first" if prefix_space else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, scheme, split=False)
        steps += [decoders.Strip(" ", 1, 0)] if prefix_space else []
    tokenizer.decoder = decoders.Sequence(steps)
    _add_tokens(tokenizer, pieces, types)
    adds_bos = _add_bos(tokenizer, gguf, pieces, default=True)
    class_name = "GemmaTokenizer" if is_gemma else "LlamaTokenizer"
    settings = {"tokenizer_class": class_name, "add_bos_token": adds_bos}
    if not is_gemma:
        settings |= {"add_prefix_space": prefix_space, "legacy": False}
    return tokenizer, settings


def _byte_level(gguf: GgufFile, folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    rule = gguf.metadata.get("tokenizer.ggml.pre", "(none)")
    if rule not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{gguf.path} splits text by the rule {rule!r}; {', '.join(PRE_TOKENIZERS)} can be "
            "rebuilt: give the HF folder of the model instead."
        )
    pieces = _pieces(gguf)
    merges = [tuple(merge.split(" ", 1)) for merge in gguf.require("tokenizer.ggml.merges")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    is_llama3 = rule == "llama-bpe"
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=is_llama3)
    )
    # The library builds pre-tokenizers from JSON only as a part of a whole tokenizer.
    whole = {"model": {"type": "BPE", "vocab": {}, "merges": []}}
    whole["pre_tokenizer"] = PRE_TOKENIZERS[rule]
    tokenizer.pre_tokenizer = tokenizers.Tokenizer.from_str(json.dumps(whole)).pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, pieces, _types(gguf))
    _add_bos(tokenizer, gguf, pieces, default=is_llama3)
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False}


_Builder = Callable[[GgufFile, Path], tuple[tokenizers.Tokenizer, dict[str, Any]]]
_BUILDERS: dict[str, _Builder] = {"llama": _sentencepiece, "gpt2": _byte_level}


def _pieces(gguf: GgufFile) -> list[str]:
    tokens: list[str] = gguf.require("tokenizer.ggml.tokens")
    if gguf.metadata["tokenizer.ggml.model"] == "llama":
        tokens = [
            token.replace(" ", _SPACE) if kind == _USER_DEFINED else token
            for token, kind in zip(tokens, _types(gguf), strict=True)
        ]
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(
            f"{gguf.path} has the same token more than once in its vocabulary of {len(tokens)}: "
            "no tokenizer.json can say that; give the HF folder of the model instead."
        )
    return tokens


def _types(gguf: GgufFile) -> list[int]:
    num_tokens = len(gguf.require("tokenizer.ggml.tokens"))
    types: list[int] = gguf.metadata.get("tokenizer.ggml.token_type", [_NORMAL] * num_tokens)
    if len(types) != num_tokens:
        raise CheckpointError(
            f"{gguf.path} has {num_tokens} tokens but {len(types)} token types: the file is "
            "damaged; convert it again."
        )
    return types


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, in the order in which SentencePiece would merge.

    SentencePiece joins the neighbours whose union has the best score; of equal scores (runs of
    spaces, of which all have 0) the official Gemma file puts longer left parts first.
    """
    ranked = []
    for piece, score in zip(vocabulary, scores, strict=True):
        splits = []
        for cut in range(1, len(piece)):
            left = piece[:cut]
            if left in vocabulary and (right := piece[cut:]) in vocabulary:
                order = (vocabulary[left], vocabulary[right])
                splits.append(((score, cut, len(piece) - cut), order, (left, right)))
        ranked += sorted(splits, key=lambda split: split[1])
    ranked.sort(key=lambda split: split[0], reverse=True)  # stable
    return [merge for _, _, merge in ranked]


def _sentencepiece_model(
    gguf: GgufFile, pieces: list[str], scores: list[float], types: list[int], prefix_space: bool
) -> sentencepiece_proto.ModelProto:
    proto = sentencepiece_proto.ModelProto()
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = sentencepiece_proto.TrainerSpec.BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = True
    for name, short in _SPECIAL_NAMES.items():
        index = gguf.metadata.get(f"tokenizer.ggml.{name}_token_id", -1)
        setattr(trainer, f"{short}_id", index)
        if index >= 0:
            setattr(trainer, f"{short}_piece", pieces[index])
    unknown = trainer.unk_id = max(trainer.unk_id, 0)
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = prefix_space
    normalizer.remove_extra_whitespaces = False
    for index, (piece, score, kind) in enumerate(zip(pieces, scores, types, strict=True)):
        looks_special = kind == _CONTROL and _LOOKS_SPECIAL.fullmatch(piece)
        kind = _UNKNOWN if index == unknown else _USER_DEFINED if looks_special else kind
        proto.pieces.add(piece=piece, score=score, type=kind)
    return proto


def _add_tokens(tokenizer: tokenizers.Tokenizer, pieces: list[str], types: list[int]) -> None:
    added = []
    for piece, kind in zip(pieces, types, strict=True):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            special = kind != _USER_DEFINED and not _LOOKS_SPECIAL.fullmatch(piece)
            added.append(AddedToken(piece, normalized=False, special=special))
    tokenizer.add_tokens(added)


def _add_bos(
    tokenizer: tokenizers.Tokenizer, gguf: GgufFile, pieces: list[str], default: bool
) -> bool:
    """Put BOS in front of every text if the file says so; returns whether it does."""
    bos_id = gguf.metadata.get("tokenizer.ggml.bos_token_id")
    if bos_id is None or not gguf.metadata.get("tokenizer.ggml.add_bos_token", default):
        return False
    bos = pieces[bos_id]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )
    return True


def _special_token_settings(gguf: GgufFile) -> dict[str, Any]:
    pieces = gguf.metadata["tokenizer.ggml.tokens"]
    settings: dict[str, Any] = {}
    for name, short in _SPECIAL_NAMES.items():
        index = gguf.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None:
            settings[f"{short}_token"] = pieces[index]
    settings.setdefault("pad_token", settings.get("eos_token"))
    architecture = gguf.metadata["general.architecture"]
    settings["model_max_length"] = gguf.require(f"{architecture}.context_length")
    return settings


def _added_tokens_decoder(tokenizer: tokenizers.Tokenizer) -> dict[str, dict[str, Any]]:
    """The added tokens as tokenizer_config.json lists them.

    llama.cpp's converter takes the types of SentencePiece tokens from there and nowhere else.
    """
    return {
        str(index): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for index, token in tokenizer.get_added_tokens_decoder().items()
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
