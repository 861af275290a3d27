"""``import fastlstm.opacus``: lets Opacus validate and train fastlstm's modules.

Opacus looks modules up by their exact type.  This registers a validator and a grad sampler for
``fastlstm.LSTM`` and ``fastlstm.compat.LSTM``; what its hooks can't see raises when it is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import opacus.grad_sample
import opacus.validators
from opacus.validators.errors import IllegalModuleConfigurationError, UnsupportedModuleError
from torch import Tensor, nn

from . import per_sample
from .compat import LSTM as CompatLSTM
from .module import LSTM


@opacus.validators.register_module_validator([LSTM, CompatLSTM])
def validate(module: nn.RNNBase) -> list[UnsupportedModuleError]:
    """What keeps Opacus from training ``module``."""
    why = per_sample.cannot(module)
    return [] if why is None else [IllegalModuleConfigurationError(why)]


@opacus.grad_sample.register_grad_sampler([LSTM, CompatLSTM])
def grad_sample(
    module: nn.RNNBase, activations: Sequence[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Per-sample gradients: (B, T, I) and (B, T, D*P) in, (B, ...) for each parameter out."""
    return per_sample.gradients(module, activations[0], backprops)
