"""Bounds of a configuration value, kept as metadata of its dataclass field; config_checks.py enforces them."""

from typing import Any


def choice(*choices: str) -> dict[str, Any]:
    """One of these words."""
    return {"choices": choices}


def at_least(low: float) -> dict[str, Any]:
    """A number, or a list of numbers, of at least `low`."""
    return {"low": low}


def between(low: float, high: float) -> dict[str, Any]:
    """A number, or a list of numbers, from `low` to `high`, both included."""
    return {"low": low, "high": high}


def not_empty() -> dict[str, Any]:
    """A text that is not empty."""
    return {"empty": False}
