"""The equations of one LSTM cell, once for every Triton kernel.

docs/design.md derives what "(eq. n)" names; csrc/gate_math.h and fastlstm/reference.py state
the same, and tests/test_gate_math.py holds the three together.  All values are float32.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """Of an exponential of -|x|: nothing overflows, and the small tail keeps its digits."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(x):
    """From an exponential of -2|x|; where that would cancel, x times a series in x²."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    # tanh(x)/x - 1; float32 sees five terms of it below 0.35.
    s = x * x
    p = 62.0 / 2835.0 - s * (1382.0 / 155925.0)
    p = -17.0 / 315.0 + s * p
    p = 2.0 / 15.0 + s * p
    p = -1.0 / 3.0 + s * p
    near = x * (1.0 + s * p)
    return tl.where(tl.abs(x) < 0.35, near, tl.where(x < 0, -far, far))


@triton.jit
def activate(a_i, a_f, a_g, a_o):
    """(eq. 2) Pre-activations to gates."""
    return sigmoid(a_i), sigmoid(a_f), tanh(a_g), sigmoid(a_o)


@triton.jit
def cell_forward(i, f, g, o, c_prev):
    """(eq. 3, 4) Gates and ``c_{t-1}`` to ``c_t, m_t``."""
    c = f * c_prev + i * g
    return c, o * tanh(c)


@triton.jit
def cell_backward(i, f, g, o, c_prev, c, dm, dc):
    """(eq. 5, 6, 7) Gradients of the four pre-activations, and of ``c_{t-1}``."""
    tanh_c = tanh(c)
    dc = dc + dm * o * (1 - tanh_c * tanh_c)
    da_i = dc * g * i * (1 - i)
    da_f = dc * c_prev * f * (1 - f)
    da_g = dc * i * (1 - g * g)
    da_o = dm * tanh_c * o * (1 - o)
    return da_i, da_f, da_g, da_o, dc * f
