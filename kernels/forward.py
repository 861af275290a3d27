"""The forward walk (eq. 1 to 4): a persistent kernel over a range of a sequence's steps.

A program owns one direction, BATCH_TILE sequences and HIDDEN_TILE hidden units with their four
gates, whose rows of W_hh it reads before the time loop (the same span of outputs with a
projection). Cell states stay in registers within a range and in ``c_carry`` between ranges. h is
exchanged through y, every step in rows of its own, so nothing is overwritten that somebody may
still read; with a projection m is exchanged before it.
"""

import triton
import triton.language as tl

from .barrier import COUNTER_STRIDE, arrive, wait
from .exchange import (
    PROJECTION_CHUNK,
    resident_product,
    resident_slice,
    step_rows,
    streamed_product,
)
from .gate_math import activate, cell_forward

# Nothing is compiled for the values of these.
RUN_TIME = (
    *("begin", "end", "steps", "batch", "rows_per_step"),
    *("origin_forward", "origin_reverse", "first_team", "polls", "jitter"),
)


@triton.jit(do_not_specialize=RUN_TIME)
def lstm_forward(
    gates,  # (rows, D, 4H) in: W_ih x + b; out, with RESERVE: activated
    y,  # (N, D*P)
    c_all,  # (N, D*H) float32, or None
    m,  # with a projection: (N, D*H) with RESERVE, else (B, D*H), written anew at every step
    h_n,  # (D, B, P)
    c_carry,  # (D, B, H) float32, in and out
    h0,  # (D, B, P)
    w_hh,  # (D, 4H, P)
    w_hr,  # (D, P, H), or None
    reset,  # (N) uint8, or None
    starts,  # (T + 1) int64, or None where all steps have rows_per_step rows
    counters,  # (teams * COUNTER_STRIDE) int64, arrivals so far
    fault,  # (1) int64
    begin: tl.int32,  # exchanges of the walk, begin <= exchange < end
    end: tl.int32,
    steps: tl.int32,  # T
    batch: tl.int32,  # B
    rows_per_step: tl.int32,  # of the longest step
    origin_forward: tl.int64,  # the row that comes first in gates, by direction
    origin_reverse: tl.int64,
    first_team: tl.int32,
    polls: tl.int32,
    jitter: tl.int32,
    D: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    BATCH_TILE: tl.constexpr,
    HIDDEN_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    RESIDENT: tl.constexpr,
    REGISTERS: tl.constexpr,
    RESERVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    EXCHANGES: tl.constexpr = 1 if w_hr is None else 2  # a step has: of h, or of m and then h
    PART: tl.constexpr = min(CHUNK, PROJECTION_CHUNK)  # of a projection's depth
    ALONE: tl.constexpr = H <= HIDDEN_TILE and P <= HIDDEN_TILE  # a team of one waits for nobody
    tile, tiles = tl.program_id(1), tl.num_programs(1)
    team = first_team + tl.program_id(0)
    counter = counters + team * COUNTER_STRIDE
    batch_tiles = tl.cdiv(rows_per_step, BATCH_TILE)
    d = (team // batch_tiles).to(tl.int64)
    b = (team % batch_tiles) * BATCH_TILE + tl.arange(0, BATCH_TILE)
    j = tile * HIDDEN_TILE + tl.arange(0, HIDDEN_TILE)
    in_hidden, in_output = (j < H)[None, :], (j < P)[None, :]

    # The four gates of a unit are neighbours among the slice's columns, and are split apart again.
    column = tl.arange(0, 4 * HIDDEN_TILE)
    unit = tile * HIDDEN_TILE + column // 4
    w_columns = w_hh + d * (4 * H * P) + ((column % 4) * H + unit).to(tl.int64) * P
    if RESIDENT:
        w_slice = resident_slice(w_columns, unit < H, 1, P, CHUNK, SPLIT)

    states = (d * batch + b)[:, None] * H + j[None, :]
    in_states = (b < batch)[:, None] & in_hidden
    c = tl.load(c_carry + states, mask=in_states, other=0.0)
    exchange = begin
    while exchange < end:
        position, half = exchange // EXCHANGES, exchange % EXCHANGES
        t = tl.where(d == 0, position, steps - 1 - position)
        onward = tl.where(d == 0, 1, -1)
        start, count = step_rows(starts, t, steps, rows_per_step)
        start_in, count_in = step_rows(starts, t - onward, steps, rows_per_step)
        count_out = step_rows(starts, t + onward, steps, rows_per_step)[1]
        row, row_in = start + b, start_in + b
        live = b < count
        out = live[:, None] & in_output
        last = out & (b >= count_out)[:, None]
        outputs = y + (row * D + d)[:, None] * P + j[None, :]
        finals = h_n + (d * batch + b)[:, None] * P + j[None, :]
        m_rows = h0 if m is None else m + ((row if RESERVE else b) * D + d) * H
        place = (position.to(tl.int64) << 24) | (team << 4) | 1
        looks = exchange * 30011 + tile * 40503  # a stress test's
        if half == 0:
            from_step = live & (b < count_in)  # entered by what a step left, not by h0 and c0
            entered = live
            if reset is not None:
                first = tl.where(d == 0, row, row_in)
                may_cut = tl.where(d == 0, live, from_step)
                entered = live & (tl.load(reset + first, mask=may_cut, other=0) == 0)
            here = live[:, None] & in_hidden
            # What does not depend on other programs comes before the wait.
            gate_row = row - tl.where(d == 0, origin_forward, origin_reverse)
            gate = gates + (gate_row * D + d)[:, None] * (4 * H) + j[None, :]
            a_i = tl.load(gate, mask=here, other=0.0).to(tl.float32)
            a_f = tl.load(gate + H, mask=here, other=0.0).to(tl.float32)
            a_g = tl.load(gate + 2 * H, mask=here, other=0.0).to(tl.float32)
            a_o = tl.load(gate + 3 * H, mask=here, other=0.0).to(tl.float32)

            wait(counter, exchange, tiles, ALONE, fault, place, polls, jitter, looks)
            h_rows = tl.where(from_step, y + (row_in * D + d) * P, h0 + (d * batch + b) * P)
            if RESIDENT:
                acc = resident_product(
                    h_rows, entered, w_slice, 4 * HIDDEN_TILE, P, CHUNK, SPLIT, REGISTERS, PRECISION
                )
            else:
                acc = streamed_product(
                    h_rows, entered, w_columns, unit < H, 1, P, CHUNK, SPLIT, PRECISION
                )
            i_g, f_o = tl.split(tl.reshape(acc, (BATCH_TILE, HIDDEN_TILE, 2, 2)))
            r_i, r_g = tl.split(i_g)
            r_f, r_o = tl.split(f_o)
            # (eq. 1)
            i, f, g, o = activate(a_i + r_i, a_f + r_f, a_g + r_g, a_o + r_o)
            c_t, m_t = cell_forward(i, f, g, o, tl.where(entered[:, None], c, 0.0))
            c = tl.where(here, c_t, c)
            # What others wait for goes first, and the rest after the arrival.
            if w_hr is None:
                tl.store(outputs, m_t, mask=out)
            else:
                tl.store(m_rows[:, None] + j[None, :], m_t, mask=here)
            arrive(counter, ALONE)
            if w_hr is None:
                tl.store(finals, m_t, mask=last)
            if RESERVE:
                tl.store(gate, i, mask=here)
                tl.store(gate + H, f, mask=here)
                tl.store(gate + 2 * H, g, mask=here)
                tl.store(gate + 3 * H, o, mask=here)
            if c_all is not None:
                tl.store(c_all + (row * D + d)[:, None] * H + j[None, :], c_t, mask=here)
        elif w_hr is not None:
            wait(counter, exchange, tiles, ALONE, fault, place, polls, jitter, looks)
            w_rows = w_hr + (d * P + j) * H
            h_t = streamed_product(m_rows, live, w_rows, j < P, 1, H, PART, SPLIT, PRECISION)
            tl.store(outputs, h_t, mask=out)
            arrive(counter, ALONE)
            tl.store(finals, h_t, mask=last)
        exchange += 1
    tl.store(c_carry + states, c, mask=in_states)
