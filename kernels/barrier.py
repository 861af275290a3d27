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
def wait(counter, exchange, programs, ALONE: tl.constexpr, fault, place, polls, jitter):
    """Until all ``programs`` of the team have stored their share of all exchanges before this.

    Args:
        ALONE: there is no other program to wait for.
        fault: int64 word, set to ``place`` where no more than ``polls`` looks were enough.
        jitter: look this many times more (a stress test's way to shuffle schedules).
    """
    if not ALONE:
        epoch = exchange.to(tl.int64) * programs
        # Adding nothing compiles to a load with acquire, made by one thread for all.
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        while (seen < epoch) & (polls > 0):
            seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
            polls -= 1
        while jitter > 0:
            tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
            jitter -= 1
        if seen < epoch:
            tl.store(fault, place)
            tl.atomic_add(counter, _GIVEN_UP, sem="relaxed", scope="gpu")
        # The loads of all threads come after what the one thread acquired.
        tl.debug_barrier()
