"""What a user gives: numbers, whether they are in range, and what a library does not take."""

import contextlib
import difflib
import math
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any

REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)


def check_number(
    name: str,
    value: Any,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> None:
    """Raise ValueError when a value is not a finite number in a range.

    Args:
        name: of the argument, for the message.
        value: what was given; a bool or a text is no number.
        least: the smallest number allowed.
        most: the largest number allowed.
        above: every number has to be larger.
        below: every number has to be smaller.
        whole: only whole numbers are allowed.
    """
    kind: Any = Integral if whole else Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name} must be {'a whole number' if whole else 'a number'}, got {value!r}")
    limits = {"at least": least, "above": above, "at most": most, "below": below}
    kept = (
        abs(value) < math.inf,
        least is None or value >= least,
        most is None or value <= most,
        above is None or value > above,
        below is None or value < below,
    )
    if not all(kept):
        span = " and ".join(f"{words} {limit}" for words, limit in limits.items() if limit is not None)
        raise ValueError(f"{name} must be {span or 'finite'}, got {value!r}")


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


def in_one_line(error: BaseException) -> str:
    """What an error says, and of which class it is, in at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextlib.contextmanager
def refusals(what: str) -> Iterator[None]:
    """Raise ValueError, that ``what`` is so, for an error by which a library refuses what a user gave it.

    Libraries assert, look up, divide and call with what they are given; their errors are of as many classes. Those
    that tell a user something already, ValueError and OSError, go through as they are.
    """
    try:
        yield
    except REFUSALS as error:
        raise ValueError(f"{what}: {in_one_line(error)}") from error


def check_name(what: str, name: str, known: Any, remote: bool = False) -> None:
    """Raise ValueError with the nearest names when name is not known."""
    if name in known or (remote and ":" in name):
        return
    near = difflib.get_close_matches(name, list(known), n=3)
    raise ValueError(f"unknown {what} {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
