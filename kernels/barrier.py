"""The epoch barrier: the programs of one team wait for each other, and for nobody else.

A *team* is the programs that walk one (direction, batch tile) together. Its counter only grows:
each of its programs adds 1 when it has stored its share of an exchange, so after ``k`` exchanges
of a team of ``n`` the counter is ``k * n``, and it never needs a reset.

A spin is bounded. Who gives up says where in the fault word, and adds so much to the counter that
nobody of the team ever waits again: the launch runs to its end, its results are worthless, and
the host raises when it next looks at the fault word.
"""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
# Of int64 counters, from one team's to the next: the teams' polls go to cache lines of their own.
COUNTER_STRIDE = tl.constexpr(16)
# More than any number of arrivals, and so little that a whole team may add it at once: programs
# that began to wait together give up together, and an overflow would let them wait again.
_GIVEN_UP = tl.constexpr(1 << 48)


@triton.jit
def arrive(counter, ALONE: tl.constexpr):
    """Let the team see what this program has stored so far."""
    # One thread counts for all: the stores of the others must come before its release.
    tl.debug_barrier()
    if not ALONE:
        tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def _look(counter):
    """The arrivals so far, with acquire, as the program's first warp sees them.

    The other warps do not look, and go on to the barrier in ``wait``. An atomic operation of
    Triton's would have all of them share what one thread has seen, with two barriers a look.
    """
    if _INTERPRETED:
        return tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.lt.u32 first, thread, 32;
            mov.b64 $0, 0x7fffffffffffffff;
            @first ld.acquire.gpu.global.b64 $0, [$1];
            }""",
            "=&l,l", [counter], dtype=tl.int64, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def wait(counter, exchange, programs, ALONE: tl.constexpr, fault, place, polls, jitter, looks):
    """Until all ``programs`` of the team have stored their share of all exchanges before this.

    Args:
        ALONE: there is no other program to wait for.
        fault: int64 word, set to ``place`` where no more than ``polls`` looks were enough.
        jitter, looks: look ``looks`` modulo ``jitter + 1`` times more, a stress test's way to
            shuffle schedules; the division takes time only where that is asked for.
    """
    if not ALONE:
        epoch = exchange.to(tl.int64) * programs
        seen = _look(counter)
        while (seen < epoch) & (polls > 0):
            seen = _look(counter)
            polls -= 1
        if jitter > 0:
            more = looks % (jitter + 1)
            while more > 0:
                seen = tl.minimum(seen, _look(counter))  # an unused look would not be made
                more -= 1
        if seen < epoch:  # in the first warp alone, whose first thread stores and adds
            tl.store(fault, place)
            tl.atomic_add(counter, _GIVEN_UP, sem="relaxed", scope="gpu")
        # The loads of all threads come after what the first warp acquired.
        tl.debug_barrier()
