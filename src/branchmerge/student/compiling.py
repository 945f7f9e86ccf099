"""Settings of torch.compile."""

import torch


def allow_many_compilations() -> None:
    """Raise torch's limit of 8 compiled versions per function, beyond which it would silently run uncompiled.

    Versions differ in whether gradients are needed (not in validation, samples and trials), in the kind of a model's
    layer, and for short rows.
    """
    torch._dynamo.config.recompile_limit = 64
