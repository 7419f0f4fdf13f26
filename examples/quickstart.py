"""Tour of `SoftKVStore`: run it with ``python examples/quickstart.py``, and read along."""

from __future__ import annotations

import torch

from softdb import SoftKVStore

torch.manual_seed(0)

# -- A table ----------------------------------------------------------------------------------------------------------

# A query is compared with the keys, and a read returns a blend of the values. Keys and values may have different
# widths. Here keys are points on a map, (east, north), and values are the weather there, (degrees, chance of rain).
store = SoftKVStore(key_dim=2, value_dim=2, metric="l2", temperature=8.0, fields=("country",), trainable=True)
store.reserve(16)  # Storage for later rows: it cannot grow between a read and its backward.

NORWAY, ITALY = 0, 1
places = ["Oslo", "Bergen", "Rome", "Naples"]
keys = torch.tensor([[1.0, 9.0], [0.0, 9.2], [2.0, 1.0], [2.6, 0.4]])
values = torch.tensor([[5.0, 0.3], [7.0, 0.8], [18.0, 0.2], [19.0, 0.1]])
ids = store.add(keys, values, fields={"country": [NORWAY, NORWAY, ITALY, ITALY]})  # Copies; the ids are 0, 1, 2, 3.


def show(title: str, weather: torch.Tensor) -> None:
    degrees, rain = weather.tolist()
    print(f"{title:<44} {degrees:5.1f} degrees, {rain:4.0%} rain")


# -- Three ways to read -----------------------------------------------------------------------------------------------

query = torch.tensor([1.5, 6.0])  # Hamburg, which is not in the table. Queries may have any batch shape, (..., 2).

# Exact: all rows, weighted by a softmax of their scores.
show("exact: a blend of all rows", store(query))  # Short for store.read(query).values.

# Top-k: only the k best rows. `mass` is their fraction of the exact softmax. It is NaN if an approximate search does
# not score all rows. In exact mode with k it is always known.
read = store.read(query, mode="topk", k=2)
show("top-k: a blend of the two best", read.values)
for number, weight in zip(read.ids.tolist(), read.weights.tolist(), strict=True):
    print(f"    {places[number]:<8} {weight:4.0%}")
print(f"    mass: {store.read(query, k=2).mass.item():.0%} of the exact softmax")

# Hard: the best row.
show("hard: the best row", store.read(query, mode="hard").values)

# -- Filters ----------------------------------------------------------------------------------------------------------

# `where` filters rows by their id and fields. A hidden row gets no weight and no gradient, as if it were deleted.
show("where: only in Italy", store.read(query, where=lambda row: row["country"] == ITALY).values)

# `exclude` hides ids per query. Here each row is predicted from the other rows.
stored = store.get(ids).keys
others = store.read(stored, exclude=ids.unsqueeze(1)).values  # (4, 2)
show("exclude: Rome, from the other rows", others[2])

# -- Temperature ------------------------------------------------------------------------------------------------------

# A low temperature selects the best row, a high temperature weighs all rows equally. It may be a tensor with gradient.
show("temperature 0.1: nearly hard", store.read(query, temperature=0.1).values)
show("temperature 10,000: the average of the table", store.read(query, temperature=10_000.0).values)

# -- Gradients --------------------------------------------------------------------------------------------------------

# The blend is differentiable: the gradient of the temperature points to warmer places.
point = query.clone().requires_grad_()
store(point)[0].backward()
east, north = point.grad.tolist()
print(f"{'gradient: warmer to the':<44} {'south' if north < 0 else 'north'}-{'east' if east > 0 else 'west'}")

# -- Training rows ----------------------------------------------------------------------------------------------------

# `trainable=True` makes keys and values Parameters. Fit a measurement of 10 degrees and 60 % at the query: each row
# changes in proportion to its weight.
measured = torch.tensor([10.0, 0.6])
optimizer = torch.optim.SGD([store.values], lr=0.5)
for _ in range(20):
    loss = (store(query) - measured).square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
show("trained: at the query", store(query))
show("    the row of Oslo", store.get(ids[:1]).values[0])
show("    the row of Rome, which has a small weight", store.get(ids[2:3]).values[0])

# -- Changing the table -----------------------------------------------------------------------------------------------

store.update(ids[:1], values=values[:1])  # Change keys, values or fields of existing rows.
store.put([7], torch.tensor([[1.5, 5.9]]), torch.tensor([[9.0, 0.7]]), fields={"country": NORWAY})  # Insert or replace.
show("put: Hamburg has a row now", store(query))
store.delete([7])  # `add` does not assign the id 7 again.
print(f"{len(store)} rows, ids {store.ids.tolist()}; 7 in store: {7 in store}")
