"""Weights of a read, summed by the class of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from softdb._checks import INTEGER_DTYPES, check_dense, check_device, check_float_tensor, check_positive, describe
from softdb.errors import ArgumentError, DtypeError, ShapeError
from softdb.transforms import is_active, move_samples_first, suspend_transforms

__all__ = ["class_weights"]


def class_weights(labels: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    """Sum the weights of each class, over the last dimension.

    Equal to::

        (one_hot(labels, num_classes) * weights[..., None]).sum(-2)     # where a label of -1 has no class

    without the (..., k, num_classes) tensor. The result is differentiable in ``weights``, any number of times and by
    every transform of torch.func. With the labels and weights of the rows of a read, it is a k-nearest-neighbor
    classifier: it returns the probability of each class. Rows that were not reported do not contribute.

    Args:
        labels: Class of each row, (..., k), integers from 0 to num_classes - 1; -1 counts for nothing. For a read,
            ``store.fields_at(read.ids, "label")``.
        weights: Weight of each row, (..., k), floating point, as in ``read.weights``. The shapes of labels and weights
            broadcast.
        num_classes: Number of classes.

    Returns:
        (..., num_classes), in the dtype of the weights, at least float32.

    Raises:
        ArgumentError: A label is less than -1, or at least ``num_classes``. In a graph of torch.compile it is a
            RuntimeError.
        ShapeError: The shapes do not broadcast, or have no dimension.
        DtypeError: An argument has the wrong type.
        DeviceError: The tensors are on different devices.

    Source: Khandelwal et al. 2020 (arXiv 1911.00172), equation 2; Vinyals et al. 2016 (arXiv 1606.04080).

    Example:
        >>> import torch
        >>> from softdb.functional import class_weights
        >>> class_weights(torch.tensor([[2, 0, 2, -1]]), torch.tensor([[0.5, 0.25, 0.125, 0.125]]), 3)
        tensor([[0.2500, 0.0000, 0.6250]])
    """
    if not isinstance(labels, Tensor) or labels.dtype not in INTEGER_DTYPES:
        raise DtypeError(f"labels: expected a tensor of integers, got {describe(labels)}; convert it with .long()")
    check_float_tensor("weights", weights, (-1, None))
    check_dense("labels", labels)
    check_device("labels", labels, weights.device)
    num_classes = check_positive("num_classes", num_classes)
    try:
        labels, weights = torch.broadcast_tensors(labels.long(), weights)
    except RuntimeError:
        raise ShapeError(
            f"labels: expected a shape that broadcasts with that of weights, {tuple(weights.shape)}, "
            f"got {tuple(labels.shape)}"
        ) from None
    _check_labels(labels, num_classes)
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32)).masked_fill(labels < 0, 0.0)
    return weights.new_zeros(*weights.shape[:-1], num_classes).scatter_add(-1, labels.clamp(min=0), weights)


def _check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise unless all labels are classes or -1."""
    wanted = f"labels: expected integers from -1 to {num_classes - 1}, below num_classes={num_classes}"
    if torch.compiler.is_compiling():
        if is_active():
            return  # No rule of vmap covers the assertion; the scatter raises for labels that are too large.
        torch._assert_async(((labels >= -1) & (labels < num_classes)).all(), wanted)
        return
    if is_active():
        with suspend_transforms():
            _check_labels(move_samples_first(labels), num_classes)
        return
    outside = (labels < -1) | (labels >= num_classes)
    if not labels.is_meta and bool(outside.any()):
        raise ArgumentError(f"{wanted}, got {int(labels[outside][0])}")
