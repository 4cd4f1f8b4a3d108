"""What is done to single numbers: exponentials, activations, norms; in float32, as polynomials that vectors take."""

import math
from typing import Any

import numpy as np
from numba import int32, njit

from microglia.execution.cpu.memory import FAST, ONE, ZERO, f32, power_of_two, put_f32, single, stand_alone
from microglia.execution.cpu.tables import GELU, LAYER, SILU, TANH_GELU

_single: Any = np.float32
HALF, TWO = single(0.5), single(2)
_LOG2E, _LN2_HIGH, _LN2_LOW = (single(x) for x in (1.44269504, 0.693359375, -2.12194440e-4))
_C0, _C1, _C2 = (single(x) for x in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3))
_C3, _C4, _C5 = (single(x) for x in (4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1))
_LOWEST, _HIGHEST = single(-87), single(88)
_GELU_SCALE, _GELU_CUBE, _ROOT_HALF = single(math.sqrt(2 / math.pi)), single(0.044715), single(math.sqrt(0.5))


@njit(**FAST)
def exponential(x: float) -> float:
    """e to the power of x, within 2e-7 of it (the polynomial of Cephes), for x from -87 to 88, else as at the end."""
    x = min(max(x, _LOWEST), _HIGHEST)
    n = np.floor(x * _LOG2E + HALF)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((_C0 * r + _C1) * r + _C2) * r + _C3) * r + _C4) * r + _C5
    return (p * r * r + r + ONE) * power_of_two(int32(n))


@njit(**FAST)
def tanh(x: float) -> float:
    """The hyperbolic tangent, within 2e-7."""
    return ONE - TWO / (exponential(TWO * x) + ONE)


@njit(**FAST)
def activated(kind: int, x: float) -> float:
    """One of the activations."""
    if kind == SILU:
        return x / (ONE + exponential(-x))
    if kind == TANH_GELU:
        return HALF * x * (ONE + tanh(_GELU_SCALE * (x + _GELU_CUBE * x * x * x)))
    if kind == GELU:
        return HALF * x * (ONE + _single(math.erf(x * _ROOT_HALF)))
    return max(x, ZERO)


@njit(**FAST)
def normed(kind: int, weight: int, bias: int, eps: float, x: int, out: int, size: int) -> None:
    """The norm of `size` numbers at x, to out; both may be the same place."""
    stand_alone()
    mean, square = ZERO, ZERO
    if kind == LAYER:
        for i in range(size):
            mean += f32(x, i)
        mean /= _single(size)
    for i in range(size):
        centred = f32(x, i) - mean
        square += centred * centred
    scale = ONE / _single(math.sqrt(square / _single(size) + eps))
    for i in range(size):
        put_f32(out, i, (f32(x, i) - mean) * scale * f32(weight, i))
    if bias != 0:
        for i in range(size):
            put_f32(out, i, f32(out, i) + f32(bias, i))
