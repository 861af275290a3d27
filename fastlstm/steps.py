"""Which row's state enters the step of which other row, in each direction.

Forward, h_{t-1} and c_{t-1} enter step t; in reverse, those of step t + 1.  They come from h0 and
c0 where a sequence begins, and are zero where a reset cuts them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(batch_sizes: Tensor, device: torch.device) -> Tensor:
    """A copy of ``batch_sizes`` on ``device``, made without waiting for the device."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A captured copy would read this memory again at every replay. Captured fills do not.
        values, counts = batch_sizes.unique_consecutive(return_counts=True)
        runs = zip(values.tolist(), counts.tolist(), strict=True)
        return torch.cat([batch_sizes.new_full((n,), value, device=device) for value, n in runs])
    return batch_sizes.to(device, non_blocking=True)


def first_rows(batch_sizes: Tensor) -> Tensor:
    """(T + 1) first row of each step, and the number of all rows; on the same device."""
    starts = batch_sizes.new_zeros(batch_sizes.numel() + 1)
    torch.cumsum(batch_sizes, 0, out=starts[1:])
    return starts


def are_whole(rows: int, batch: int, batch_sizes: Tensor, reset: Tensor | None) -> bool:
    """Do all of some sequences have all steps, and nothing is cut?  Then what enters a step is what
    left the one before, moved by so many rows."""
    return reset is None and batch_sizes.numel() * batch == rows > 0


def entered(
    d: int, values: Tensor, initial: Tensor, batch_sizes: Tensor, reset: Tensor | None
) -> Tensor:
    """What entered the step of each row of direction ``d``, (N, size): from ``values (N, size)``,
    which left the steps, from ``initial (B, size)``, or zero at a reset."""
    batch = len(initial)
    if are_whole(len(values), batch, batch_sizes, reset):
        parts = (initial, values[:-batch]) if d == 0 else (values[batch:], initial)
        return torch.cat(parts)
    source, cut = _sources(d, len(values), batch_sizes, reset, values.device)
    found = torch.cat((values, initial)).index_select(0, source)
    return found if cut is None else found.masked_fill(cut.unsqueeze(-1), 0)


def left(
    d: int, gradients: Tensor, batch: int, batch_sizes: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Its transpose: ``gradients (N, size)`` of what entered each row's step, as gradients of what
    left the steps, (N, size), and of the initial states, (B, size)."""
    rows = len(gradients)
    zeros = gradients.new_zeros(batch, gradients.size(1))
    if are_whole(rows, batch, batch_sizes, reset):
        if d == 0:
            return torch.cat((gradients[batch:], zeros)), gradients[:batch]
        return torch.cat((zeros, gradients[:-batch])), gradients[-batch:]
    source, cut = _sources(d, rows, batch_sizes, reset, gradients.device)
    if cut is not None:
        gradients = gradients.masked_fill(cut.unsqueeze(-1), 0)
    # No two rows are entered by the same one, nor by the same initial state.
    found = gradients.new_zeros(rows + batch, gradients.size(1)).index_copy_(0, source, gradients)
    return found[:rows], found[rows:]


def apart(rows: Tensor, samples: int) -> Tensor:
    """Packed rows of so many samples, whose sequences are those whose number is theirs modulo
    ``samples``, as (samples, rows of one, ...)."""
    return rows.unflatten(0, (-1, samples)).transpose(0, 1)


def last_rows(d: int, batch_sizes: Tensor) -> Tensor:
    """The rows of the steps that direction ``d`` takes last, of the sequences that have any."""
    batch = int(batch_sizes[0]) if batch_sizes.numel() else 0
    sequences = torch.arange(batch, device="cpu")
    if d == 1:
        return sequences
    steps = (batch_sizes.unsqueeze(1) > sequences).sum(0)
    return first_rows(batch_sizes)[steps - 1] + sequences


def _sources(
    d: int, rows: int, batch_sizes: Tensor, reset: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """For each row the place of what enters its step, in all rows followed by the initial states;
    and where that is cut."""
    sizes = on_device(batch_sizes, device)
    starts = first_rows(sizes)
    row = torch.arange(rows, device=device)
    step = torch.searchsorted(starts, row, right=True) - 1
    sequence = row - starts[step]
    neighbour = (step - 1 if d == 0 else step + 1).clamp(0, max(sizes.numel() - 1, 0))
    goes_on = sequence < sizes[neighbour] if d == 1 else step > 0
    goes_on &= neighbour != step
    source = torch.where(goes_on, starts[neighbour] + sequence, rows + sequence)
    if reset is None:
        return source, None
    # Forward: the step itself starts a segment. Reverse: the later step it came from does.
    first = reset.bool()
    if d == 1:
        first = first.index_select(0, torch.where(goes_on, source, 0)) & goes_on
    return source, first
