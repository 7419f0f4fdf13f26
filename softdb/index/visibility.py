"""Hide entries of a base index from searches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import faiss

__all__ = ["EntryVisibility"]


class EntryVisibility:
    """Visibility of the entries of a base index, as a bitmap for FAISS.

    Attributes:
        hidden: Number of hidden entries.
    """

    def __init__(self, entries: int) -> None:
        self._bitmap = np.packbits(np.ones(entries, dtype=bool), bitorder="little")
        self._entries = entries
        self.hidden = 0

    def at(self, entries: Tensor) -> Tensor:
        """Return whether ``entries`` are visible, (m,) bool."""
        numbers = entries.numpy()
        return torch.from_numpy((self._bitmap[numbers >> 3] >> (numbers & 7).astype(np.uint8) & 1).astype(bool))

    def all(self) -> Tensor:
        """Return whether each entry is visible, (n,) bool."""
        return torch.from_numpy(np.unpackbits(self._bitmap, count=self._entries, bitorder="little").astype(bool))

    def selector(self) -> Any:
        """Return a FAISS selector of the visible entries."""
        return faiss.IDSelectorBitmap(self._bitmap)

    def show(self, entries: Tensor) -> None:
        """Make ``entries``, without duplicates, visible to searches."""
        self.hidden -= len(entries) - int(self.at(entries).sum())
        numbers = entries.numpy()
        np.bitwise_or.at(self._bitmap, numbers >> 3, np.uint8(1) << (numbers & 7).astype(np.uint8))

    def hide(self, entries: Tensor) -> None:
        """Hide ``entries``, without duplicates, from searches."""
        self.hidden += int(self.at(entries).sum())
        numbers = entries.numpy()
        np.bitwise_and.at(self._bitmap, numbers >> 3, ~(np.uint8(1) << (numbers & 7).astype(np.uint8)))

    def extend(self, count: int) -> None:
        """Append ``count`` visible entries."""
        bits = np.concatenate([self.all().numpy(), np.ones(count, dtype=bool)])
        self._bitmap = np.packbits(bits, bitorder="little")
        self._entries += count
