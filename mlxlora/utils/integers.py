"""Integer arithmetic."""


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up; b > 0.

    >>> ceil_div(7, 3), ceil_div(6, 3), ceil_div(0, 3)
    (3, 2, 0)
    """
    return -(-a // b)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`.

    >>> round_up(33, 32), round_up(64, 32)
    (64, 64)
    """
    return ceil_div(number, multiple) * multiple
