"""Numbers that a user gives."""

import re

import numpy as np
import pytest

from hcvision.data.arguments import check_number, check_numbers, check_range

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "span", "message"),
    [
        (0, {"least": 1, "whole": True}, "x must be at least 1, got 0"),
        (True, {"least": 1, "whole": True}, "x must be a whole number, got True"),
        (2.0, {"whole": True}, "x must be a whole number, got 2.0"),
        ("3", {}, "x must be a number, got '3'"),
        (None, {}, "x must be a number, got None"),
        (NAN, {}, "x must be finite, got nan"),
        (INFINITY, {"least": 0}, "x must be at least 0, got inf"),
        (0, {"above": 0}, "x must be above 0, got 0"),
        (1, {"above": 0, "below": 1}, "x must be above 0 and below 1, got 1"),
        (0, {"above": 0, "most": 1}, "x must be above 0 and at most 1, got 0"),
        (10**400, {"least": 0, "most": 1, "whole": True}, f"x must be at least 0 and at most 1, got {10**400}"),
        (1.5, {"least": 0, "most": 1}, "x must be at least 0 and at most 1, got 1.5"),
        (NAN, {"least": 0, "most": 1}, "x must be at least 0 and at most 1, got nan"),
    ],
)
def test_wrong_numbers(value, span, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_number("x", value, **span)


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.int64(1)])
def test_right_numbers(value):
    check_number("x", value, 0, 1)
    check_range("x", (0, value), least=0, most=1)


@pytest.mark.parametrize("values", [0.5, "0.5", None, (0.5,), (0.1, 0.2, 0.3), (0.2, 0.1), (0.1, NAN), (True, 1)])
def test_wrong_ranges(values):
    with pytest.raises(ValueError, match="x must be"):
        check_range("x", values)


@pytest.mark.parametrize("values", [(), "1", 1.0, [1.0, 0], [1.0, NAN], [1.0, "2"]])
def test_wrong_lists(values):
    with pytest.raises(ValueError, match="x must be"):
        check_numbers("x", values, above=0)
