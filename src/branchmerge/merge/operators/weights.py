"""Weights of the models, one each in the order of the tree: one rule for all operators."""

from collections.abc import Sequence


def as_weights(weights: Sequence[float] | float | None) -> tuple[float, ...] | None:
    """Weights from what a user wrote; one number holds for every model. Raises ValueError on anything else."""
    if weights is None:
        return None
    listed = [weights] if isinstance(weights, int | float) else list(weights)
    if not listed or not all(isinstance(w, int | float) and abs(w) < float("inf") for w in listed):
        raise ValueError(f"weights must be finite numbers, one a model, they are {weights!r}")
    return tuple(float(w) for w in listed)


def weights_for(
    weights: tuple[float, ...] | None, models: int, default: float = 1.0, name: str = "weights"
) -> tuple[float, ...]:
    """One weight per model; raises ValueError if there are more or fewer.

    Other parameters with one value per model follow the same rule; `name` is the parameter, for the error message.
    """
    if weights is None:
        return (default,) * models
    if len(weights) == 1:
        return weights * models
    if len(weights) != models:
        raise ValueError(f"{len(weights)} {name} for {models} models")
    return weights


def shares_of_one(weights: tuple[float, ...] | None, models: int) -> list[float]:
    """The weights made to sum to one; raises ValueError where they sum to zero."""
    w = weights_for(weights, models)
    if not sum(w):
        raise ValueError(f"weights {w} sum to zero, so they cannot be made to sum to one")
    return [w_i / sum(w) for w_i in w]
