"""Hide entries of a base index from searches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import faiss

__all__ = ["EntryVisibility"]


class EntryVisibility:
    """Hold the visible entries of a base index as the bitmap that FAISS takes.

    Attributes:
        hidden: The number of hidden entries.
    """

    def __init__(self, entries: int) -> None:
        self._bitmap = np.packbits(np.ones(entries, dtype=bool), bitorder="little")
        self._entries = entries
        self.hidden = 0

    def at(self, entries: Tensor) -> Tensor:
        """Return the visibility of ``entries``, (m,) bool."""
        numbers = entries.numpy()
        return torch.from_numpy((self._bitmap[numbers >> 3] >> (numbers & 7).astype(np.uint8) & 1).astype(bool))

    def all(self) -> Tensor:
        """Return the visibility of all entries, (n,) bool."""
        return torch.from_numpy(np.unpackbits(self._bitmap, count=self._entries, bitorder="little").astype(bool))

    def selector(self) -> Any:
        """Make the selector of a FAISS search."""
        return faiss.IDSelectorBitmap(self._bitmap)

    def show(self, entries: Tensor) -> None:
        """Show ``entries``, each given once, to searches."""
        self.hidden -= len(entries) - int(self.at(entries).sum())
        numbers = entries.numpy()
        np.bitwise_or.at(self._bitmap, numbers >> 3, np.uint8(1) << (numbers & 7).astype(np.uint8))

    def hide(self, entries: Tensor) -> None:
        """Hide ``entries``, each given once, from searches."""
        self.hidden += int(self.at(entries).sum())
        numbers = entries.numpy()
        np.bitwise_and.at(self._bitmap, numbers >> 3, ~(np.uint8(1) << (numbers & 7).astype(np.uint8)))

    def extend(self, count: int) -> None:
        """Append visible entries."""
        bits = np.concatenate([self.all().numpy(), np.ones(count, dtype=bool)])
        self._bitmap = np.packbits(bits, bitorder="little")
        self._entries += count
