"""Which entries of a base index searches may find."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import faiss


class Visible:
    """Which entries of a base searches may find: a bitmap as FAISS takes it, and how many are hidden."""

    def __init__(self, entries: int) -> None:
        self._bitmap = np.packbits(np.ones(entries, dtype=bool), bitorder="little")
        self._entries = entries
        self.hidden = 0

    def at(self, entries: Tensor) -> Tensor:
        """Whether each of ``entries`` is visible."""
        numbers = entries.numpy()
        return torch.from_numpy((self._bitmap[numbers >> 3] >> (numbers & 7).astype(np.uint8) & 1).astype(bool))

    def all(self) -> Tensor:
        """Whether each entry is visible."""
        return torch.from_numpy(np.unpackbits(self._bitmap, count=self._entries, bitorder="little").astype(bool))

    def selector(self) -> Any:
        """For a FAISS search."""
        return faiss.IDSelectorBitmap(self._bitmap)

    def show(self, entries: Tensor) -> None:
        """Let searches find ``entries``, each given once."""
        self.hidden -= len(entries) - int(self.at(entries).sum())
        numbers = entries.numpy()
        np.bitwise_or.at(self._bitmap, numbers >> 3, np.uint8(1) << (numbers & 7).astype(np.uint8))

    def hide(self, entries: Tensor) -> None:
        """Keep searches from finding ``entries``, each given once."""
        self.hidden += int(self.at(entries).sum())
        numbers = entries.numpy()
        np.bitwise_and.at(self._bitmap, numbers >> 3, ~(np.uint8(1) << (numbers & 7).astype(np.uint8)))

    def extend(self, count: int) -> None:
        """Add entries, visible."""
        bits = np.concatenate([self.all().numpy(), np.ones(count, dtype=bool)])
        self._bitmap = np.packbits(bits, bitorder="little")
        self._entries += count
