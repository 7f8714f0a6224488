"""Who gets which image: class-balanced, seeded splits in which no image appears twice on both sides.

The order of the draw is that of digests of (seed, the image's path), so it is the same on every platform.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from dho.config import SplitsConfig
from dho.core.errors import DataError
from dho.data.sources import Record

SPLITS = ("labelled", "unlabelled", "val", "test", "captions")


@dataclass
class Draw:
    """The result of a draw."""

    split: dict[int, str] = field(default_factory=dict)
    """Record number -> split; a record in no split is left out."""
    dropped: list[tuple[int, int]] = field(default_factory=list)
    """(record left out, record of another split that is the same image)."""
    duplicates: Counter[str] = field(default_factory=Counter)
    """Split -> images that appear there again."""


def draw(records: list[Record], sha256: dict[int, str], classes: list[str], config: SplitsConfig, on_leak: str) -> Draw:
    """Divide records into splits.

    The splits are filled in the order test, val (those with a list of their own before those that are drawn), labelled,
    captions, unlabelled. An image whose bytes an earlier split holds is a leak: with `on_leak="drop"` the later copy
    (the training side) is left out and, where the split is drawn, another image takes its place.

    Args:
        records: all records of the source.
        sha256: digest of the image bytes of every usable record; records that are missing here were rejected.
        classes: class names, for messages.
        config: sizes and seed.
        on_leak: "error" or "drop".

    Raises:
        DataError: a class has too few images, or two splits share an image while `on_leak` is "error".
    """
    result = Draw()
    holder: dict[str, int] = {}
    usable = sorted(sha256, key=lambda number: _order(config.seed, records[number].path))
    pools: dict[str, list[int]] = defaultdict(list)
    for number in usable:
        pools[records[number].pool].append(number)
    for pool in ("test", "val", "captions"):
        pools[pool].sort()
    free = dict.fromkeys(pools["train"])

    def take(split: str, candidates: Iterable[int], limit: int | None) -> int:
        count = 0
        for number in candidates:
            if limit is not None and count == limit:
                break
            free.pop(number, None)
            other = holder.setdefault(sha256[number], number)
            if other != number and result.split[other] != split:
                result.dropped.append((number, other))
                if on_leak == "error":
                    raise DataError(
                        f"{records[number].path} ({split}) and {records[other].path} ({result.split[other]}) "
                        f"are the same image, SHA-256 {sha256[number][:16]}...; remove one, "
                        "or set data.on_leak: drop to drop the copy on the training side"
                    )
                continue
            result.duplicates[split] += other != number
            result.split[number] = split
            count += 1
        return count

    def by_class() -> dict[int, list[int]]:
        groups: dict[int, list[int]] = {label: [] for label in range(len(classes))}
        for number in free:
            label = records[number].label
            if label is not None:
                groups[label].append(number)
        return groups

    def share(total: int) -> list[int]:
        return [total // len(classes) + (label < total % len(classes)) for label in range(len(classes))]

    def take_balanced(split: str, sizes: list[int], key: str) -> None:
        for (label, candidates), each in zip(by_class().items(), sizes, strict=True):
            if (count := take(split, candidates, each)) < each:
                raise DataError(
                    f"class {classes[label]!r} has {count} labelled images left for {split}; {key} asks for {each}"
                )

    for split in ("test", "val"):
        take(split, pools[split], None)  # before any split is drawn, so that the lists are kept whole
    for split, each in (("test", config.test_per_class), ("val", config.val_per_class)):
        if not pools[split]:
            take_balanced(split, [each] * len(classes), f"data.splits.{split}_per_class")

    if config.shots is not None:
        take_balanced("labelled", [config.shots] * len(classes), "data.splits.shots")
    else:
        fraction = config.labelled_fraction
        for label, candidates in by_class().items():
            limit = None if fraction is None else max(1, round(fraction * len(candidates)))
            if take("labelled", candidates, limit) == 0:
                raise DataError(
                    f"class {classes[label]!r} has no labelled image left for training; "
                    "give it more, or lower data.splits.val_per_class"
                )

    take("captions", pools["captions"], None)
    take_balanced(
        "captions", share(config.captions), f"data.splits.captions {config.captions}, shared equally by the classes,"
    )
    if config.unlabelled is not None and all(records[number].label is not None for number in free):
        for candidates, size in zip(by_class().values(), share(config.unlabelled), strict=True):
            take("unlabelled", candidates, size)
    else:
        take("unlabelled", list(free), config.unlabelled)
    if not any(split == "unlabelled" for split in result.split.values()):
        raise DataError("no image is left for the unlabelled split; add unlabelled images, or lower data.splits.shots")
    return result


def _order(seed: int, path: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=16).digest()
