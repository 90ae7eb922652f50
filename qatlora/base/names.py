"""Names of tensors: in the files of a checkpoint, and in the model that transformers loads.

Multimodal checkpoints are published with the names of the transformers version they were made
with, and transformers renames them while it loads (and back when it saves). Everything here goes by
the names of the loaded model.

The three lists name a weight without ``.weight``. The experts of a layer are no linear modules but
parameters [experts, out, in], and such a *stack* has nothing behind its name: neither in the model
nor in the files.
"""

import re

# Keyed by `model_type`: patterns at the start of a name in the files, and what stands there in the
# model; the first that matches counts. The rules are transformers 5.23's; a test compares them.
_RENAMED = {
    "gemma3": (
        (r"language_model\.model\.", "model.language_model."),
        (r"language_model\.lm_head\.", "lm_head."),
        (r"vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
        (r"multi_modal_projector\.", "model.multi_modal_projector."),
    ),
    "gemma4_unified": (
        (r"model\.vision_embedder\.", "model.embed_vision."),
        (
            r"model\.embed_vision\.embedding_projection\.",
            "model.embed_vision.multimodal_embedder.embedding_projection.",
        ),
    ),
}


_STACK = re.compile(r".+\.experts\.(gate_up|down)_proj")


def is_stack(name: str) -> bool:
    """Whether a name of the lists means a stack of experts."""
    return _STACK.fullmatch(name) is not None


def weight_key(name: str) -> str:
    """The parameter, and the tensor in the files, that a name of the lists means."""
    return name if is_stack(name) else f"{name}.weight"


def model_name(stored: str, model_type: str) -> str:
    """The name that a tensor called `stored` in the files has in the loaded model."""
    for pattern, replacement in _RENAMED.get(model_type, ()):
        if match := re.match(pattern, stored):
            return replacement + stored[match.end() :]
    return stored


def text_model_name(name: str) -> str:
    """The name that a tensor or module of the decoder has in the text model alone.

    A GGUF file is loaded as the text model, while the lists of a multimodal base name the modules
    of the whole one; of a text model both names are the same.
    """
    return re.sub(r"^model\.language_model\.", "model.", name)
