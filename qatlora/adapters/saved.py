"""Adapter folders: PEFT's layout plus an identity file, refused by plain PEFT and by another base.

adapter_config.json          peft_type QATLORA: plain PEFT knows no such type and stops, instead
of serving the adapter off the grid it was trained inside
adapter_model.safetensors    PEFT's names and tensors, float32
identity.json                the rule, the base's digest, the digests of the deployed tensors
SHA256SUMS                   of these three: a damaged adapter is refused
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qatlora import files
from qatlora.adapters.attach import AdaptedModel, attach
from qatlora.adapters.deployed import AdapterRule
from qatlora.base.load import LoadedBase
from qatlora.errors import AdapterError, first_line
from qatlora.grid import GRID_VERSION

PEFT_TYPE = "QATLORA"
_CONFIG, _WEIGHTS, _IDENTITY = "adapter_config.json", "adapter_model.safetensors", "identity.json"


@dataclass(frozen=True)
class AdapterIdentity:
    """What an adapter belongs to and what it deploys.

    Attributes:
        grid_version: version of the numerics in `qatlora.grid` and `deployed_weight`.
        rule: rounding, dither and seed among others.
        base_name: for people.
        base_storage: nf4, q4_0 or bf16; the latents differ between them.
        base_digest: `LoadedBase.digest`.
        trained: the modules in order.
        deployed: tensor name -> SHA-256 of its packed blocks when training ended.
        others_digest: `LoadedBase.others_digest`; empty in folders of earlier versions.
    """

    grid_version: int
    rule: AdapterRule
    base_name: str
    base_storage: str
    base_digest: str
    trained: tuple[str, ...]
    deployed: dict[str, str]
    others_digest: str = ""


def save_adapter(adapted: AdaptedModel, folder: Path) -> AdapterIdentity:
    """Write the folder atomically; returns the identity with the digests of this moment."""
    base = adapted.base
    identity = AdapterIdentity(
        grid_version=GRID_VERSION,
        rule=adapted.rule,
        base_name=base.name,
        base_storage=base.storage,
        base_digest=base.digest,
        trained=base.trained,
        deployed=adapted.deployed_digests(),
        others_digest=base.others_digest,
    )
    config = {
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": base.name,
        "task_type": "CAUSAL_LM",
        "r": adapted.rule.rank,
        "lora_alpha": adapted.rule.alpha,
        "target_modules": list(base.trained),
    }
    state = get_peft_model_state_dict(adapted.model)
    with files.replacing_folder(folder) as partial:
        files.write_json(partial / _CONFIG, config)
        files.write_json(partial / _IDENTITY, dataclasses.asdict(identity))
        save_file({name: t.contiguous().cpu() for name, t in state.items()}, partial / _WEIGHTS)
        files.write_sums(partial)
    return identity


def read_identity(folder: Path) -> AdapterIdentity:
    """Read and check the identity file, before anything long is loaded.

    Raises:
        AdapterError: the folder is no adapter of ours, damaged, or of another version of the grid.
    """
    for name in (_CONFIG, _WEIGHTS, _IDENTITY):
        if not (folder / name).is_file():
            raise AdapterError(
                f"adapter.path is '{folder}', which has no {name}. Give the folder 'adapter' of a "
                "qatlora run; a plain LoRA of another tool was not trained inside the grid, and "
                "recipe=validate validate.adapter=FOLDER says what Q4_0 would keep of it."
            )
    if problem := files.broken_sum(folder):
        raise AdapterError(
            f"{problem}: the adapter is damaged or was edited. Use the folder as the run wrote it."
        )
    path = folder / _IDENTITY
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stored["rule"] = AdapterRule(**stored["rule"])
        stored["trained"] = tuple(stored["trained"])
        identity = AdapterIdentity(**stored)
    except (ValueError, TypeError, KeyError) as problem:
        raise AdapterError(
            f"{path} is no identity file of qatlora ({type(problem).__name__}: {problem}). It is "
            "damaged or was edited: use the adapter folder as the run wrote it."
        ) from None
    if identity.grid_version != GRID_VERSION:
        raise AdapterError(
            f"{folder} was trained with grid version {identity.grid_version} and this qatlora has "
            f"{GRID_VERSION}; the same adapter would deploy other weights. Use the qatlora that "
            "trained it, or train again."
        )
    return identity


def require_base(
    identity: AdapterIdentity, folder: Path, trained: tuple[str, ...], storage: str
) -> None:
    """Refuse what names and storage tell already; the rest tells the digest of the loaded base.

    Raises:
        AdapterError: other weights are trained, or one of the two bases is in NF4.
    """
    if sorted(identity.trained) != sorted(trained):
        strange = next(iter(set(identity.trained) ^ set(trained)), None)
        raise AdapterError(
            f"The adapter in {folder} changes {len(identity.trained)} weights of "
            f"'{identity.base_name}', and of the base at hand {len(trained)} are trained; "
            f"{strange} is among one of them only. Set base and base.trained as in its run."
        )
    if "nf4" in {identity.base_storage, storage} and identity.base_storage != storage:
        raise AdapterError(
            f"The adapter in {folder} was trained on '{identity.base_name}' as "
            f"{identity.base_storage}, and storage={storage} has other steps or levels, so the "
            f"adapter would deploy other weights. Set storage={identity.base_storage}."
        )


def load_adapter(base: LoadedBase, folder: Path) -> tuple[AdaptedModel, AdapterIdentity]:
    """Attach a saved adapter to the base it was trained on.

    Raises:
        AdapterError: another base (both digests are named), or damaged files.
    """
    identity = read_identity(folder)
    if identity.base_digest != base.digest:
        raise AdapterError(
            f"The adapter in {folder} was trained on '{identity.base_name}' as "
            f"{identity.base_storage} with digest {identity.base_digest}, and the base at hand is "
            f"'{base.name}' as {base.storage} with digest {base.digest}: their steps or levels "
            "differ, so the adapter would deploy other weights. Set base and storage as in its run."
        )
    if identity.others_digest not in ("", base.others_digest):
        raise AdapterError(
            f"The base in {base.source.folder} has the steps and levels that the adapter in "
            f"{folder} was trained on, but other embeddings, norms or towers (digest "
            f"{base.others_digest}, then {identity.others_digest}): it was damaged or edited. Set "
            "base as in its run."
        )
    try:
        adapted = attach(base, identity.rule)
    except (TypeError, ValueError, KeyError) as problem:
        raise AdapterError(
            f"The rule in {folder / _IDENTITY} cannot be applied ({type(problem).__name__}: "
            f"{problem}). It is damaged or was edited: use the adapter folder as the run wrote it."
        ) from problem
    path = folder / _WEIGHTS
    try:
        state = load_file(path)
        # peft annotates a call of namedtuple, which is no type.
        result: Any = set_peft_model_state_dict(adapted.model, state)
    except (SafetensorError, RuntimeError, OSError) as problem:
        raise AdapterError(
            f"{path} cannot be loaded ({first_line(problem)}). It is damaged or belongs "
            "to another adapter: use the folder as the run wrote it."
        ) from None
    missing = [name for name in result.missing_keys if "lora_" in name]
    if result.unexpected_keys or missing:
        raise AdapterError(
            f"{path} does not fit its identity file: it lacks {missing[:2]} and has unknown "
            f"{result.unexpected_keys[:2]}. Use the folder as the run wrote it."
        )
    return adapted, identity
