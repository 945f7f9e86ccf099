"""Weights of the models, one each in the order of the tree: the same rule for every operator that has them."""

from collections.abc import Sequence


def as_weights(weights: Sequence[float] | float | None) -> tuple[float, ...] | None:
    """What a user wrote -> weights; one number stands for every model. Raises ValueError on anything else."""
    if weights is None:
        return None
    listed = [weights] if isinstance(weights, int | float) else list(weights)
    if not listed or not all(isinstance(w, int | float) and abs(w) < float("inf") for w in listed):
        raise ValueError(f"weights must be finite numbers, one a model, they are {weights!r}")
    return tuple(float(w) for w in listed)


def weights_for(weights: tuple[float, ...] | None, models: int, default: float = 1.0) -> tuple[float, ...]:
    """The weight of each of so many models; raises ValueError where the number does not fit."""
    if weights is None:
        return (default,) * models
    if len(weights) == 1:
        return weights * models
    if len(weights) != models:
        raise ValueError(f"{len(weights)} weights for {models} models")
    return weights
