"""Cost of `lab.compare`, relative to the reads that it compares."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main

from softdb import SoftKVStore, lab
from softdb.lab import choices as choices_module


def cases(small: bool) -> Iterator[Case]:
    """Yield comparisons at six temperatures and five k; the peer is 24 exact reads."""
    rows, queries = (256, 16) if small else (4096, 512)
    for width, value_width in ((64, 64), (384, 32))[: 1 if small else None]:
        yield _make_case(rows, queries, width, value_width)


def _make_case(rows: int, queries: int, width: int, value_width: int) -> Case:
    store = SoftKVStore(width, value_width)
    store.add(torch.randn(rows, width), torch.randn(rows, value_width))
    query = torch.randn(queries, width)
    normalizers_by_name = {"compare": ("softmax",), "with straight_through": ("softmax", "straight_through")}

    @torch.no_grad()
    def read_exactly() -> None:
        for factor in 4 * choices_module.TEMPERATURE_FACTORS:
            store.read(query, temperature=factor)

    return Case(
        f"{rows:,} rows of {width} and {value_width}, {queries} queries",
        softdb={
            name: lambda normalizers=normalizers: lab.compare(  # type: ignore[misc]
                store, query, ks=(1, 4, 16, 64, 256), normalizers=normalizers
            )
            for name, normalizers in normalizers_by_name.items()
        },
        peers={"24 exact reads": read_exactly},
        claims={("compare", "24 exact reads"): 10.0},
    )


if __name__ == "__main__":
    main("lab", cases)
