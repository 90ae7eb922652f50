"""What a merge may have changed besides the weights: warnings in a sentence each."""

from transformers import PreTrainedTokenizerBase

from qatlora.base.load import load_tokenizer
from qatlora.base.source import Source
from qatlora.data.templates import strip_generation_markers


def warnings_of(merged: Source, base: Source, tied: bool) -> list[str]:
    """Compare a merged checkpoint's tensors, tokenizer and template with the base's.

    Args:
        merged: the checkpoint.
        base: what it was made from.
        tied: whether the embeddings and lm_head of this architecture are one tensor.
    """
    found = []
    if tied and "lm_head.weight" in merged.files:
        found.append(
            "lm_head.weight lies in the merged checkpoint although its embeddings are tied: "
            "llama.cpp's converter would untie the model and write a second matrix. Leave it out."
        )
    missing = sorted(base.files.keys() - merged.files.keys() - {"lm_head.weight"})
    if missing:
        found.append(f"{len(missing)} tensors of the base are missing, for example {missing[0]}.")
    after, before = (load_tokenizer(source.folder) for source in (merged, base))
    if after.get_vocab() != before.get_vocab():
        found.append(
            f"The tokenizer is another one: {len(after)} tokens where the base has {len(before)}, "
            "or other ids. A GGUF takes the merged folder's; copy the base's if none was added."
        )
    if _rendered(after) != _rendered(before):
        found.append(
            "The chat template is another one than the base's: a GGUF carries it, and a model "
            "answers badly under a template that it was not trained with."
        )
    return found


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template without marks that only training needs."""
    return strip_generation_markers(tokenizer.chat_template or "")
