"""What a checkpoint is: one digest over all its tensors, however it is cut into files."""

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor, nn

from qatlora.base.source import Source


class TensorDigests:
    """Collects the digests of a checkpoint's tensors, in any order."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, key: str, tensor: Tensor) -> None:
        """A tensor, as stored."""
        head = f"{key} {tensor.dtype} {tuple(tensor.shape)}"
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        self._lines.append(f"{head} {hashlib.sha256(content).hexdigest()}")

    def digest(self) -> str:
        """Hex SHA-256 over what was added."""
        return hashlib.sha256("\n".join(sorted(self._lines)).encode()).hexdigest()


def digest_of_others(model: nn.Module, grid: Collection[str]) -> str:
    """Digest of what a loaded model has besides the modules `grid`: embeddings, norms, towers."""
    digests = TensorDigests()
    seen = {id(one) for name in grid for one in model.get_submodule(name).parameters()}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # tied ones once
            seen.add(id(tensor))
            digests.add(key, tensor.detach().cpu())
    return digests.digest()


def digest_of_tensors(source: Source) -> str:
    """Digest of a checkpoint; of a build of ours, that of the checkpoint it was built from."""
    if source.record is not None:
        return source.record.source_digest
    digests = TensorDigests()
    for key in source.files:
        digests.add(key, source.tensor(key))
    return digests.digest()
