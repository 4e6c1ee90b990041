"""Numbers that a user gives: whether they are numbers, and in range."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def check_number(
    name: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    whole: bool = False,
    exclusive: bool = False,
) -> None:
    """Raise ValueError when a value is not a finite number in a range.

    Args:
        name: of the argument, for the message.
        value: what was given; a bool or a text is no number.
        least: the smallest number allowed.
        most: the largest number allowed.
        whole: only whole numbers are.
        exclusive: the ends of the range are not.
    """
    kind: Any = Integral if whole else Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name} must be {'a whole number' if whole else 'a number'}, got {value!r}")
    if abs(value) < math.inf and (least < value < most if exclusive else least <= value <= most):
        return
    if math.isfinite(most):
        span = f"between {least} and {most}" if exclusive else f"from {least} to {most}"
    elif math.isfinite(least):
        span = f"above {least}" if exclusive else f"at least {least}"
    else:
        span = "finite"
    raise ValueError(f"{name} must be {span}, got {value!r}")


def check_numbers(name: str, values: Any, number: int | None = None, **span: Any) -> None:
    """Raise ValueError when values are not a list of so many numbers (None: at least one), each as ``check_number``."""
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != (number or max(len(values), 1)):
        raise ValueError(f"{name} must be a list of {number or 'one or more'} numbers, got {values!r}")
    for value in values:
        check_number(f"each number of {name}", value, **span)


def check_range(name: str, values: Any, **span: Any) -> None:
    """Raise ValueError when values are not two numbers, the smaller one first, each as ``check_number``."""
    check_numbers(name, values, 2, **span)
    if values[0] > values[1]:
        raise ValueError(f"{name} must be the smaller number and then the larger one, got {values!r}")
