"""The backward walk (eq. 5 to 8): the forward kernel's twin, undoing one step after the other.

A program owns the same units as in the forward walk, and of W_hh the columns of those units, over
all 4H rows. da is exchanged through its own buffer, which the products after the walk (eq. 9)
read too; with a projection dh is exchanged before it. One position after the last step the
gradient of h0 is due: the walk has T + 1 positions where that is asked for.
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
from .gate_math import cell_backward

# Nothing is compiled for the values of these.
RUN_TIME = (
    *("begin", "end", "steps", "batch", "rows_per_step"),
    *("first_team", "polls", "jitter"),
)


@triton.jit(do_not_specialize=RUN_TIME)
def lstm_backward(
    da,  # (N, D, 4H), out
    dh_all,  # (N, D*P), out, with a projection only
    dh0,  # (D, B, P), out where a sequence has steps; or None
    dc_carry,  # (D, B, H) float32, in and out: gradient of c_n, in the end of c0
    dy,  # (N, D*P), or None
    dc_all,  # (N, D*H) float32, or None
    dh_n,  # (D, B, P), or None
    gates,  # (N, D, 4H)
    c_all,  # (N, D*H) float32
    c0,  # (D, B, H)
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
    PRECISION: tl.constexpr,
):
    EXCHANGES: tl.constexpr = 1 if w_hr is None else 2  # a step has: of da, or of dh and then da
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

    w_columns = w_hh + d * (4 * H * P) + j
    if RESIDENT:
        w_slice = resident_slice(w_columns, j < P, P, 4 * H, CHUNK, SPLIT)

    states = (d * batch + b)[:, None] * H + j[None, :]
    in_states = (b < batch)[:, None] & in_hidden
    dc = tl.load(dc_carry + states, mask=in_states, other=0.0)
    exchange = begin
    while exchange < end:
        position, half = exchange // EXCHANGES, exchange % EXCHANGES
        t = tl.where(d == 0, steps - 1 - position, position)
        onward = tl.where(d == 0, 1, -1)  # the way the forward pass went
        start, count = step_rows(starts, t, steps, rows_per_step)
        start_in, count_in = step_rows(starts, t - onward, steps, rows_per_step)
        start_out, count_out = step_rows(starts, t + onward, steps, rows_per_step)
        row, row_in, row_out = start + b, start_in + b, start_out + b
        live = b < count
        undone = b < count_out  # whose later step was undone just before
        from_step = live & (b < count_in)  # entered by what a step left, not by h0 and c0
        entered, carried = live, undone
        if reset is not None:
            first_in = tl.where(d == 0, row, row_in)
            may_cut = tl.where(d == 0, live, from_step)
            entered = live & (tl.load(reset + first_in, mask=may_cut, other=0) == 0)
            first_out = tl.where(d == 0, row_out, row)
            may_cut = tl.where(d == 0, undone, undone & live)
            carried = undone & (tl.load(reset + first_out, mask=may_cut, other=0) == 0)
        # With a projection the cells' turn is the second half of a step.
        here = (live & (half == EXCHANGES - 1))[:, None] & in_hidden
        out = live[:, None] & in_output

        # What does not depend on other programs comes before the wait.
        units = (row * D + d)[:, None] * H + j[None, :]
        gate = gates + (row * D + d)[:, None] * (4 * H) + j[None, :]
        i = tl.load(gate, mask=here, other=0.0).to(tl.float32)
        f = tl.load(gate + H, mask=here, other=0.0).to(tl.float32)
        g = tl.load(gate + 2 * H, mask=here, other=0.0).to(tl.float32)
        o = tl.load(gate + 3 * H, mask=here, other=0.0).to(tl.float32)
        c = tl.load(c_all + units, mask=here, other=0.0)
        units_in = (row_in * D + d)[:, None] * H + j[None, :]
        stepped, given = (entered & from_step)[:, None], (entered & (b >= count_in))[:, None]
        c_in = tl.load(c_all + units_in, mask=here & stepped, other=0.0)
        c_in += tl.load(c0 + states, mask=here & given, other=0.0).to(tl.float32)
        dc = tl.where((undone & (carried == 0))[:, None], 0.0, dc)
        dc_t = dc
        if dc_all is not None:
            dc_t += tl.load(dc_all + units, mask=here, other=0.0)

        place = (position.to(tl.int64) << 24) | (team << 4) | 2
        looks = exchange * 30011 + tile * 40503  # a stress test's
        dm = tl.zeros((BATCH_TILE, HIDDEN_TILE), tl.float32)
        if half == 0:
            outputs = (row * D + d)[:, None] * P + j[None, :]
            finals = (d * batch + b)[:, None] * P + j[None, :]
            dh = tl.zeros((BATCH_TILE, HIDDEN_TILE), tl.float32)
            if dy is not None:
                dh += tl.load(dy + outputs, mask=out, other=0.0).to(tl.float32)
            if dh_n is not None:
                last = out & (b >= count_out)[:, None]
                dh += tl.load(dh_n + finals, mask=last, other=0.0).to(tl.float32)
            wait(counter, exchange, tiles, ALONE, fault, place, polls, jitter, looks)
            # (eq. 8)
            da_rows = da + (row_out * D + d) * (4 * H)
            if RESIDENT:
                dh += resident_product(
                    da_rows,
                    carried,
                    w_slice,
                    HIDDEN_TILE,
                    4 * H,
                    CHUNK,
                    SPLIT,
                    REGISTERS,
                    PRECISION,
                )
            else:
                dh += streamed_product(
                    da_rows, carried, w_columns, j < P, P, 4 * H, CHUNK, SPLIT, PRECISION
                )
            if dh0 is not None:
                over = (undone & (b >= count))[:, None] & in_output
                tl.store(dh0 + finals, dh, mask=over)
            if w_hr is None:
                dm = dh
            else:
                tl.store(dh_all + outputs, dh, mask=out)
        elif w_hr is not None:
            wait(counter, exchange, tiles, ALONE, fault, place, polls, jitter, looks)
            dh_rows, w_rows = dh_all + (row * D + d) * P, w_hr + d * (P * H) + j
            dm = streamed_product(dh_rows, live, w_rows, j < H, H, P, PART, SPLIT, PRECISION)
        da_i, da_f, da_g, da_o, dc_in = cell_backward(i, f, g, o, c_in, c, dm, dc_t)
        dc = tl.where(here, dc_in, dc)
        da_gate = da + (row * D + d)[:, None] * (4 * H) + j[None, :]
        tl.store(da_gate, da_i, mask=here)
        tl.store(da_gate + H, da_f, mask=here)
        tl.store(da_gate + 2 * H, da_g, mask=here)
        tl.store(da_gate + 3 * H, da_o, mask=here)
        arrive(counter, ALONE)
        exchange += 1
    tl.store(dc_carry + states, dc, mask=in_states)
