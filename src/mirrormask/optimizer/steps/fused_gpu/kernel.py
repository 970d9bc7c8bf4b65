"""The kernel: pullback, decay, the base's step and push of ``x = m ⊙ w``, each value read and written once.

Its tensors are found through a table of addresses: one launch steps all weights, as in torch's fused ones.
With TRITON_INTERPRET=1 it runs on a CPU, which is how its arithmetic is tested where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = ["FIELDS", "NUMBERS", "step"]

#: The addresses of a weight, in the order of the table; momentum SGD has no second moments.
FIELDS = ("x", "grad", "m", "w", "first_m", "first_w", "second_m", "second_w")
#: The numbers of a weight, in the order of the table: those of SGD, and Adam's.
NUMBERS = ("lr", "keep", "coupled", "momentum", "beta2", "eps", "correction1", "correction2")


@triton.jit  # type: ignore[untyped-decorator]
def _array(table, of, field: tl.constexpr, at, dtype: tl.constexpr, aligned: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.load(table + of * 8 + field).to(tl.pointer_type(dtype)) + at
    if aligned:  # gradients may lie at any place; only where none does are four values read at a time
        places = tl.max_contiguous(tl.multiple_of(places, 16), 16)
    return places


@triton.jit  # type: ignore[untyped-decorator]
def _sgd(own, pulled, momentum, lr, mu, keep, nesterov: tl.constexpr):  # type: ignore[no-untyped-def]
    momentum = mu * momentum + pulled
    update = momentum
    if nesterov:
        update = pulled + mu * momentum
    return keep * own - lr * update, momentum


@triton.jit  # type: ignore[untyped-decorator]
def _adam(own, pulled, first, second, lr, beta1, beta2, eps, correction1, correction2, keep):  # type: ignore[no-untyped-def]
    first = first + (1.0 - beta1) * (pulled - first)
    second = beta2 * second + (1.0 - beta2) * pulled * pulled
    denominator = tl.sqrt(second) / tl.sqrt(correction2) + eps
    return keep * own - lr / correction1 * (first / denominator), first, second


@triton.jit  # type: ignore[untyped-decorator]
def step(  # type: ignore[no-untyped-def]
    table,
    numbers,
    pieces,
    good,
    x_dtype: tl.constexpr,
    grad_dtype: tl.constexpr,
    adam: tl.constexpr,
    nesterov: tl.constexpr,
    aligned: tl.constexpr,
    whole: tl.constexpr,
    block: tl.constexpr,
):
    """Step one piece of one weight.

    With ``c = 2α`` where the decay is coupled (else 0) and ``keep = 1 - 2 lr α`` where it is not (else 1)::

        gm = g w + c m                 gw = g m + c w
        m  = keep m - lr u(gm)         w  = keep w - lr u(gw)        u: SGD's or Adam's update
        x  = m w

    Args:
        table: int64 (weights, 8), addresses of :data:`FIELDS`.
        numbers: float32 (weights, 8), :data:`NUMBERS`.
        pieces: int64 (pieces, 3), of each program the weight, its first element and the end of the piece.
        good: a bool; where it is False gradients count as zeros.
        x_dtype, grad_dtype: of the weights and their gradients; all else is float32.
        adam, nesterov: which base.
        aligned: whether all addresses are multiples of 16.
        whole: whether all pieces have ``block`` elements: with nothing to leave out, four are read at a time.
        block: elements of a piece, a power of two.
    """
    piece = tl.program_id(0)
    of = tl.load(pieces + piece * 3)
    start = tl.multiple_of(tl.load(pieces + piece * 3 + 1), block)
    at = start + tl.arange(0, block)
    here = None
    if not whole:
        here = at < tl.load(pieces + piece * 3 + 2)

    x_at = _array(table, of, 0, at, x_dtype, aligned)
    grad_at = _array(table, of, 1, at, grad_dtype, aligned)
    m_at = _array(table, of, 2, at, tl.float32, aligned)
    w_at = _array(table, of, 3, at, tl.float32, aligned)
    first_m_at = _array(table, of, 4, at, tl.float32, aligned)
    first_w_at = _array(table, of, 5, at, tl.float32, aligned)

    lr = tl.load(numbers + of * 8)
    keep = tl.load(numbers + of * 8 + 1)
    coupled = tl.load(numbers + of * 8 + 2)
    mu = tl.load(numbers + of * 8 + 3)
    finite = tl.load(good) != 0

    grad = tl.load(grad_at, mask=here).to(tl.float32)
    grad = tl.where(finite, grad, 0.0)
    m = tl.load(m_at, mask=here)
    w = tl.load(w_at, mask=here)
    first_m = tl.load(first_m_at, mask=here)
    first_w = tl.load(first_w_at, mask=here)
    grad_m = grad * w + coupled * m
    grad_w = grad * m + coupled * w
    if adam:
        second_m_at = _array(table, of, 6, at, tl.float32, aligned)
        second_w_at = _array(table, of, 7, at, tl.float32, aligned)
        beta2 = tl.load(numbers + of * 8 + 4)
        eps = tl.load(numbers + of * 8 + 5)
        correction1 = tl.load(numbers + of * 8 + 6)
        correction2 = tl.load(numbers + of * 8 + 7)
        second_m = tl.load(second_m_at, mask=here)
        second_w = tl.load(second_w_at, mask=here)
        m, first_m, second_m = _adam(m, grad_m, first_m, second_m, lr, mu, beta2, eps, correction1, correction2, keep)
        w, first_w, second_w = _adam(w, grad_w, first_w, second_w, lr, mu, beta2, eps, correction1, correction2, keep)
        tl.store(second_m_at, second_m, mask=here)
        tl.store(second_w_at, second_w, mask=here)
    else:
        m, first_m = _sgd(m, grad_m, first_m, lr, mu, keep, nesterov)
        w, first_w = _sgd(w, grad_w, first_w, lr, mu, keep, nesterov)
    tl.store(m_at, m, mask=here)
    tl.store(w_at, w, mask=here)
    tl.store(first_m_at, first_m, mask=here)
    tl.store(first_w_at, first_w, mask=here)
    # -0.0, which a product may leave, is a value that files must store.
    tl.store(x_at, (m * w + 0.0).to(x_dtype), mask=here)


#: Triton's names of torch's dtypes.
DTYPES: dict[str, Any] = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}
