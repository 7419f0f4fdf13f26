"""Step of `softdb.optim.RowAdam` in one kernel.

A row-sparse gradient may name a row several times, in any order. Its rows are sorted on the device. The program of the
first entry of a row sums the gradients of the row and updates it; the programs of other entries return at once. So no
two programs write to the same row, and neither atomics nor the number of distinct rows are needed.

Source: the reverse index of the embedding backward in facebookresearch/memory (Berges et al. 2024, arXiv 2412.09764).
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from softdb.kernels.cuda.launch import on_device

__all__ = ["adam_step", "launch_adam"]

# Elements of a program of a dense gradient, and of a chunk of gradients of the same row.
DENSE_ELEMENTS, CHUNK_ELEMENTS = 1024, 2048
MAX_CHUNK = 32

GOLDEN_GAMMA = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
FIRST_FACTOR = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
SECOND_FACTOR = tl.constexpr(0x94D049BB133111EB - 2**64)

# Random bits of an element, by the dtype of rows that are rounded stochastically.
NOISE_BITS = {torch.bfloat16: 16, torch.float16: 32}

# Arguments whose values change between steps. Specialization for their values would compile the kernels again.
CHANGING = ["count", "step", "size", "eps", "lr", "log_beta1", "log_beta2", "log_decay", "last_log_decay", "key"]


@triton.jit
def _mix_bits(numbers):
    """Mix the bits of int64 numbers, as `softdb.scoring.gumbel.mix_bits`."""
    numbers = ((numbers >> 30) & (2**34 - 1)) ^ numbers
    numbers = numbers * FIRST_FACTOR
    numbers = ((numbers >> 27) & (2**37 - 1)) ^ numbers
    numbers = numbers * SECOND_FACTOR
    return ((numbers >> 31) & (2**33 - 1)) ^ numbers


@triton.jit
def _draw_bits(key, rows, columns, BITS: tl.constexpr):
    """Draw random bits for each entry, as `softdb.optim.rounding.draw_noise`."""
    per_number: tl.constexpr = 64 // BITS
    streams = _mix_bits((columns // per_number).to(tl.int64) * GOLDEN_GAMMA + key)
    numbers = _mix_bits(rows[:, None] * GOLDEN_GAMMA + streams[None, :])
    return numbers >> ((columns % per_number) * BITS).to(tl.int64)[None, :]


@triton.jit
def _round_stochastically(numbers, bits, LARGEST: tl.constexpr, IS_BF16: tl.constexpr):
    """Round float32 numbers, as `softdb.optim.rounding.round_stochastically`."""
    within = tl.where(numbers > LARGEST, LARGEST, tl.where(numbers < -LARGEST, -LARGEST, numbers))
    pattern = within.to(tl.int32, bitcast=True)
    if IS_BF16:
        noise = ((bits & 0xFFFF) ^ 0x8000).to(tl.int32)
        rounded = ((pattern + noise) & -65536).to(tl.float32, bitcast=True)
    else:
        exponent = pattern & 0x7F800000
        spacing = (tl.where(exponent < 0x38800000, 0x38800000, exponent) - 0x05000000).to(tl.float32, bitcast=True)
        ratio = tl.math.div_rn(tl.abs(within), spacing)
        whole = tl.floor(ratio)
        uniform = (bits & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
        rounded = (whole + (uniform < ratio - whole).to(tl.float32)) * spacing
        rounded = (rounded.to(tl.int32, bitcast=True) | (pattern & -2147483648)).to(tl.float32, bitcast=True)
    return rounded - (within - numbers)


@triton.jit
def _to_float64(bits, like):  # bits of a float64, an int64 tensor
    """Return the float64 with the given bits, in the shape of ``like``."""
    return (tl.zeros_like(like) + bits).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=CHANGING)
def adam_kernel(
    P,  # rows
    M,  # averages of gradients
    V,  # averages of squared gradients
    VMAX,  # largest V so far, with amsgrad
    G,  # gradients
    SLOTS,  # rows of the gradients, ascending; None for a dense gradient
    ORDER,  # places of the gradients; None if each row has one, at the place of its slot
    IDS,  # ids of a table, negative at free slots
    GENERATION,  # generations of a table
    OWN_GENERATION,
    BORN,
    DECAYED,
    FLAG,  # one float64
    count,
    width,
    step,
    size,
    eps,
    lr,
    beta2,
    weight1,
    weight2,
    log_beta1,
    log_beta2,
    log_decay,
    last_log_decay,
    key,
    MAXIMIZE: tl.constexpr,
    NOISE_BITS: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Update one row of a row-sparse gradient, or ``ROWS`` rows of a dense gradient.

    ``lr``, ``log_beta1``, ``log_beta2``, ``log_decay`` and ``last_log_decay`` are the bits of float64 numbers.
    """
    columns = tl.arange(0, WIDTH)
    fits = columns < width
    block = tl.arange(0, ROWS)
    if SLOTS is None:
        rows = tl.program_id(0).to(tl.int64) * ROWS + block
        live = rows < count
        inside = live[:, None] & fits[None, :]
        gradient = tl.load(G + rows[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        entry = tl.program_id(0).to(tl.int64)
        slot = tl.load(SLOTS + entry)
        place = entry
        if ORDER is not None:
            if tl.load(SLOTS + entry - 1, mask=entry > 0, other=-1) == slot:
                return
            place = tl.load(ORDER + entry)
        total = tl.load(G + place * width + columns, mask=fits, other=0.0).to(tl.float32)
        if ORDER is not None:
            entry += 1
            more = tl.load(SLOTS + entry, mask=entry < count, other=-1) == slot
            while more:
                entries = entry + block
                same = tl.load(SLOTS + entries, mask=entries < count, other=-1) == slot
                places = tl.load(ORDER + entries, mask=same, other=0)
                inside = same[:, None] & fits[None, :]
                part = tl.load(G + places[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
                total += tl.sum(part, axis=0)
                entry += ROWS
                more = tl.sum(same.to(tl.int32)) == ROWS
        rows = slot + tl.zeros((1,), tl.int64)
        live = rows >= 0
        gradient = total[None, :]
    if IDS is not None:
        live = live & (tl.load(IDS + rows, mask=live, other=-1) >= 0)
    if FLAG is not None:
        unfit = tl.where(tl.abs(gradient) <= 3.4028234663852886e38, 0, 1)  # A NaN compares as False.
        skipped = live & (tl.max(unfit, axis=1) > 0)
        tl.store(FLAG + tl.zeros_like(rows), float("inf"), mask=skipped)
        live = live & (tl.max(unfit, axis=1) == 0)
    inside = live[:, None] & fits[None, :]
    place = rows[:, None] * width + columns[None, :]
    mean = tl.load(M + place, mask=inside, other=0.0)
    square = tl.load(V + place, mask=inside, other=0.0)
    stored = tl.load(P + place, mask=inside, other=0.0).to(tl.float32)
    if VMAX is not None:
        largest = tl.load(VMAX + place, mask=inside, other=0.0)
    if DECAYED is not None:
        decayed = tl.load(DECAYED + rows, mask=live, other=0.0)
    if BORN is not None:
        born = tl.load(BORN + rows, mask=live, other=0)
    new = live & False
    if GENERATION is not None:
        generation = tl.load(GENERATION + rows, mask=live, other=0)
        new = live & (tl.load(OWN_GENERATION + rows, mask=live, other=0) != generation)
    # Several warps load the state of a row. None may store it before all have loaded it.
    tl.debug_barrier()
    if GENERATION is not None:
        tl.store(OWN_GENERATION + rows, generation, mask=new)
        mean = tl.where(new[:, None], 0.0, mean)
        square = tl.where(new[:, None], 0.0, square)
        if VMAX is not None:
            largest = tl.where(new[:, None], 0.0, largest)
    if DECAYED is not None:
        now = _to_float64(log_decay, rows)
        before = tl.where(new, _to_float64(last_log_decay, rows), decayed)
        stored = stored * tl.exp(now - before).to(tl.float32)[:, None]
        tl.store(DECAYED + rows, now, mask=live)
    if BORN is not None:
        born = tl.where(new, step - 1, born)
        tl.store(BORN + rows, born, mask=new)
        age = (step - born).to(tl.float64)
        root = tl.sqrt(1.0 - tl.exp2(age * _to_float64(log_beta2, rows)))
        sizes = root * _to_float64(lr, rows) / (1.0 - tl.exp2(age * _to_float64(log_beta1, rows)))
        step_size = sizes.to(tl.float32)[:, None]
        added = eps
        if SLOTS is None:
            added = (root * eps).to(tl.float32)[:, None]
    else:
        step_size = size
        added = eps
    if MAXIMIZE:
        gradient = -gradient
    # The two formulas of `torch.lerp` keep the result exact for weights near 0 and near 1.
    change = gradient - mean
    mean = tl.where(weight1 < 0.5, mean + weight1 * change, gradient - change * (1.0 - weight1))
    square = square * beta2 + weight2 * gradient * gradient
    tl.store(M + place, mean, mask=inside)
    tl.store(V + place, square, mask=inside)
    if VMAX is not None:
        square = tl.maximum(largest, square, propagate_nan=tl.PropagateNan.ALL)
        tl.store(VMAX + place, square, mask=inside)
    result = stored - tl.math.div_rn(mean * step_size, tl.sqrt_rn(square) + added)
    if NOISE_BITS > 0:
        bits = _draw_bits(key, rows, columns, NOISE_BITS)
        result = _round_stochastically(result, bits, LARGEST, NOISE_BITS == 16)
    tl.store(P + place, result.to(P.dtype.element_ty), mask=inside)


def _bits_of(number: float) -> int:
    """Return the bits of a float64 as an int64."""
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits


def _log2(number: float) -> float:
    return math.log2(number) if number > 0 else -math.inf


def launch_adam(
    rows: Tensor,  # (n, ...)
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    gradient: Tensor,  # (m, ...), or (n, ...) if dense
    slots: Tensor | None,  # (m,) ascending
    order: Tensor | None,  # (m,)
    ids: Tensor | None,  # (n,)
    generation: Tensor | None,  # (n,)
    own_generation: Tensor | None,  # (n,)
    born: Tensor | None,  # (n,)
    decayed: Tensor | None,  # (n,) float64
    flag: Tensor | None,  # () float64
    count: int,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    log_decay: float,
    last_log_decay: float,
    maximize: bool,
    key: int,
) -> None:
    """Update rows and their state in place, in one kernel.

    `softdb.optim.RowAdam` gives the equations. All tensors are contiguous. Free slots are skipped; with a ``flag``,
    also rows whose gradient is not finite.

    Args:
        rows: Rows in float32, bfloat16 or float16, of at most 8,192 elements each: a program holds whole rows.
        exp_avg: Average of the gradients, in float32.
        exp_avg_sq: Average of the squared gradients, in float32.
        max_exp_avg_sq: Largest ``exp_avg_sq`` of all steps, with amsgrad.
        gradient: Gradients of the entries of ``slots``, or of all rows.
        slots: Row of each entry, ascending, with duplicates; None if the gradient is dense.
        order: Place of the gradient of each entry; None if ``slots`` is the order of the gradients, without duplicates.
        ids: Ids of the table of the rows, if there is one; negative at free slots.
        generation: Generations of the table.
        own_generation: Generation whose state is kept.
        born: Number of steps before the first step of each row; None if all rows have the same age.
        decayed: ``log_decay`` at the last step of each row, with weight decay.
        flag: Number that is set to infinity if the gradient of a row is not finite.
        count: Number of entries, or of rows to update if the gradient is dense.
        step: Number of the step, from 1.
        lr: Learning rate.
        beta1: Coefficient of ``exp_avg``.
        beta2: Coefficient of ``exp_avg_sq``.
        eps: Term that is added to the denominator.
        log_decay: Logarithm of the decay factor of all steps.
        last_log_decay: Logarithm of the decay factor of all steps before this one.
        maximize: Whether to use the negative gradient.
        key: Key of the random bits of this step, for rows in bfloat16 or float16.
    """
    width = math.prod(rows.shape[1:])
    if count == 0 or width == 0:
        return
    block = triton.next_power_of_2(width)
    root = math.sqrt(1 - beta2**step)
    if slots is None:
        per_program = max(1, DENSE_ELEMENTS // block)
        grid, elements = -(-count // per_program), per_program * block
    else:
        per_program = max(1, min(MAX_CHUNK, CHUNK_ELEMENTS // block))
        grid, elements = count, block
    with on_device(rows):
        adam_kernel[(grid,)](
            rows,
            exp_avg,
            exp_avg_sq,
            max_exp_avg_sq,
            gradient,
            slots,
            order,
            ids,
            generation,
            own_generation,
            born,
            decayed,
            flag,
            count,
            width,
            step,
            root * lr / (1 - beta1**step),
            # AdamW adds eps after the bias correction of sqrt(v), SparseAdam before it.
            root * eps if slots is None and born is None else eps,
            _bits_of(lr),
            beta2,
            1 - beta1,
            1 - beta2,
            _bits_of(_log2(beta1)),
            _bits_of(_log2(beta2)),
            _bits_of(log_decay),
            _bits_of(last_log_decay),
            key,
            MAXIMIZE=maximize,
            NOISE_BITS=NOISE_BITS.get(rows.dtype, 0),
            LARGEST=torch.finfo(rows.dtype).max,
            ROWS=per_program,
            WIDTH=block,
            num_warps=max(1, min(16, elements // 128)),
        )


# Operators have a small overhead if they are defined by torch.library.define instead of torch.library.custom_op.
torch.library.define(
    "softdb::row_adam_",
    "(Tensor(a!) rows, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? max_exp_avg_sq, Tensor gradient, "
    "Tensor? slots, Tensor? order, Tensor? ids, Tensor? generation, Tensor(e!)? own_generation, Tensor(f!)? born, "
    "Tensor(g!)? decayed, Tensor(h!)? flag, int count, int step, float lr, float beta1, float beta2, float eps, "
    "float log_decay, float last_log_decay, bool maximize, int key) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("softdb::row_adam_", "default")(launch_adam)


@torch.library.register_fake("softdb::row_adam_")
def _(*_: object) -> None:
    """Do nothing: the operator returns nothing."""


adam_step = torch.ops.softdb.row_adam_
