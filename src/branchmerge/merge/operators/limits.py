"""Checks of operator parameters, each with a one-line error."""

from collections.abc import Sequence
from math import isfinite


def number(name: str, value: object, low: float = float("-inf"), high: float = float("inf")) -> float:
    """A finite number of [low, high]; raises ValueError on anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError(f"{name} must be a finite number, it is {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must lie between {low:g} and {high:g}, it is {value!r}")
    return float(value)


def positive(name: str, value: object) -> float:
    """A finite number above zero; raises ValueError on anything else."""
    if number(name, value) <= 0:
        raise ValueError(f"{name} must be above zero, it is {value!r}")
    return number(name, value)


def fractions(name: str, values: Sequence[float] | float) -> tuple[float, ...]:
    """Fractions of [0, 1], one a model; one number stands for every model. Raises ValueError on anything else."""
    listed = list(values) if isinstance(values, list | tuple) else [values]
    if not listed:
        raise ValueError(f"{name} must be one number or one a model, it is empty")
    return tuple(number(name, value, 0, 1) for value in listed)


def whole(name: str, value: object, low: int) -> int:
    """A whole number of at least `low`; raises ValueError on anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be a whole number of at least {low}, it is {value!r}")
    return value


def switch(name: str, value: object) -> bool:
    """true or false; raises ValueError on anything else."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, it is {value!r}")
    return value
