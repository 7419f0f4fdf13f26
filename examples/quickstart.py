"""A guided tour of `SoftKVStore`: run it with ``python examples/quickstart.py``, and read along."""

from __future__ import annotations

import torch

from softdb import SoftKVStore

torch.manual_seed(0)

# -- A table ----------------------------------------------------------------------------------------------------------

# Keys are what rows are found by, values are what they hand over. The two live in spaces of their own: here keys are
# points on a map, (east, north), and values are what the weather is like there, (degrees, chance of rain).
store = SoftKVStore(key_dim=2, value_dim=2, metric="l2", temperature=8.0, fields=("country",), trainable=True)
store.reserve(16)  # room for rows to come: while gradients wait for their backward, the storage cannot grow

NORWAY, ITALY = 0, 1
places = ["Oslo", "Bergen", "Rome", "Naples"]
keys = torch.tensor([[1.0, 9.0], [0.0, 9.2], [2.0, 1.0], [2.6, 0.4]])
values = torch.tensor([[5.0, 0.3], [7.0, 0.8], [18.0, 0.2], [19.0, 0.1]])
ids = store.add(keys, values, fields={"country": [NORWAY, NORWAY, ITALY, ITALY]})  # copies; new ids: 0, 1, 2, 3


def show(what: str, weather: torch.Tensor) -> None:
    degrees, rain = weather.tolist()
    print(f"{what:<44} {degrees:5.1f} degrees, {rain:4.0%} rain")


# -- Three ways to read -----------------------------------------------------------------------------------------------

query = torch.tensor([1.5, 6.0])  # Hamburg, which is not in the table; any number at once: (..., 2)

# Exact: every row counts, by a softmax of how well its key matches.
show("exact: a blend of all rows", store(query))  # short for store.read(query).values

# Top-k: only the k best rows. `mass` says how much of the exact softmax they hold; an approximate search of many
# rows may not know, and then it is NaN. With k in exact mode it is always known.
read = store.read(query, mode="topk", k=2)
show("top-k: a blend of the two best", read.values)
for place, weight in zip(read.ids.tolist(), read.weights.tolist(), strict=True):
    print(f"    {places[place]:<8} {weight:4.0%}")
print(f"    these hold {store.read(query, k=2).mass.item():.0%} of the exact softmax")

# Hard: the one best row.
show("hard: the best row alone", store.read(query, mode="hard").values)

# -- Who may be seen --------------------------------------------------------------------------------------------------

# `where` filters rows by their id and fields. A hidden row gets no weight and no gradient, as if it were deleted.
show("where: only in Italy", store.read(query, where=lambda row: row["country"] == ITALY).values)

# `exclude` hides ids query by query. So rows can be asked about themselves: what would the others have said?
stored = store.get(ids).keys
others = store.read(stored, exclude=ids.unsqueeze(1)).values  # (4, 2)
show("exclude: Rome, as the others see it", others[2])

# -- Soft and hard are the ends of one scale --------------------------------------------------------------------------

# A low temperature leaves the best row only, a high one weighs all alike. It may be a tensor, with a gradient.
show("temperature 0.1: hard, nearly", store.read(query, temperature=0.1).values)
show("temperature 10,000: the average of the table", store.read(query, temperature=10_000.0).values)

# -- Gradients --------------------------------------------------------------------------------------------------------

# The blend is differentiable: in which direction would one have to walk for a warmer day?
walker = query.clone().requires_grad_()
store(walker)[0].backward()
east, north = walker.grad.tolist()
print(f"{'gradient: warmer lies to the':<44} {'south' if north < 0 else 'north'}-{'east' if east > 0 else 'west'}")

# -- Training rows ----------------------------------------------------------------------------------------------------

# `trainable=True` makes keys and values Parameters. Somebody measured 10 degrees and 60 % where the query is:
# the rows learn it, each as much as it had a say.
measured = torch.tensor([10.0, 0.6])
optimizer = torch.optim.SGD([store.values], lr=0.5)
for _ in range(20):
    loss = (store(query) - measured).square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
show("trained: at the query", store(query))
show("    and the row of Oslo", store.get(ids[:1]).values[0])
show("    and the row of Rome, with little say", store.get(ids[2:3]).values[0])

# -- Changing the table -----------------------------------------------------------------------------------------------

store.update(ids[:1], values=values[:1])  # keys, values or fields of rows that exist
store.put([7], torch.tensor([[1.5, 5.9]]), torch.tensor([[9.0, 0.7]]), fields={"country": NORWAY})  # insert or replace
show("put: Hamburg has a row now", store(query))
store.delete([7])  # the id 7 will not be handed out again
print(f"{len(store)} rows, ids {store.ids.tolist()}; is 7 there? {7 in store}")
