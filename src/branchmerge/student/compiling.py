"""What torch.compile is told before anything is compiled."""

import torch


def allow_many_compilations() -> None:
    """So many that nothing runs uncompiled without a word, as from the ninth version of a function on.

    Versions differ in whether gradients are wanted (validation, samples and trials want none), in the kind of a model's
    layer, and in short rows.
    """
    torch._dynamo.config.recompile_limit = 64
