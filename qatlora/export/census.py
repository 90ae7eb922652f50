"""What a build learns of its source while it reads it tensor by tensor: digests, grid, error."""

import math

from torch import Tensor

from qatlora.base.digests import TensorDigests
from qatlora.base.grids import LayerGrid, base_digest
from qatlora.base.layout import Layout
from qatlora.base.record import GridRecord
from qatlora.base.source import Source
from qatlora.grid import GRID_VERSION

_TILE_ROWS = 1024


class Census:
    """Collects the figures of a `GridRecord`; every tensor of the source is shown to it once."""

    def __init__(self) -> None:
        self._sources = TensorDigests()
        self._stores: dict[str, str] = {}
        self._blocks: dict[str, int] = {}
        self._on_grid: dict[str, int] = {}
        self._squared_error = self._squared_weight = 0.0

    def read(self, key: str, tensor: Tensor) -> None:
        """A tensor of the source, as stored."""
        self._sources.add(key, tensor)

    def built(self, name: str, grid: LayerGrid, weight: Tensor, stored: Tensor) -> None:
        """A weight that was quantized.

        Args:
            name: in the lists.
            grid: its stores, as the build will be loaded.
            weight: [..., in] in the source.
            stored: [..., in], what the build makes of it, in the source's dtype.
        """
        self._stores[name] = grid.digest()
        self._blocks[name] = grid.num_blocks
        self._on_grid[name] = grid.num_on_grid
        tiles = (tensor.flatten(0, -2).split(_TILE_ROWS) for tensor in (weight, stored))
        for rows, of_build in zip(*tiles, strict=True):
            self._squared_error += (rows.float() - of_build.float()).square().sum().item()
            self._squared_weight += rows.float().square().sum().item()

    def record(self, source: Source, layout: Layout, storage: str) -> GridRecord:
        """The record of the finished build."""
        squared_weight = self._squared_weight or 1.0  # all zeros are kept without error
        return GridRecord(
            grid_version=GRID_VERSION,
            storage=storage,
            source_name=source.name,
            source_digest=self._sources.digest(),
            base_digest=base_digest({name: self._stores[name] for name in layout.grid}),
            relative_error=math.sqrt(self._squared_error / squared_weight),
            blocks={name: self._blocks[name] for name in layout.grid},
            on_grid_blocks={name: self._on_grid[name] for name in layout.grid},
        )
