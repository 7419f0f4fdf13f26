"""Release of torch that runs the tests."""

from __future__ import annotations

import torch

# (major, minor), so that tests compare releases as tuples of numbers.
TORCH_RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])
