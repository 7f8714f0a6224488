"""Dividing work: neighbouring ranges of nearly equal size that leave nothing out and count nothing twice."""

from __future__ import annotations


def partition(count: int, index: int, shares: int) -> range:
    """Return share `index` of `count` items divided into `shares` neighbouring ranges.

        partition(10, 0, 3), partition(10, 1, 3), partition(10, 2, 3)      # range(0, 3), range(3, 6), range(6, 10)

    The sizes of the shares differ by at most one.
    """
    return range(count * index // shares, count * (index + 1) // shares)
