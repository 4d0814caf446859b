"""Ways to be faster that no card has judged yet: each can be left out, to compare or to get around it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Self


@dataclass(frozen=True)
class Levers:
    """What is on, as `--cuda-levers` names it."""

    rotate_write: bool = True  # K and V go into the cache from where Q and K are rotated
    shrink_beside: bool = True  # in captured steps, x A^T is computed beside the base's product
    dependent_launch: bool = False  # a kernel's programs start before the kernel before has ended (Hopper)

    @classmethod
    def of(cls, names: Collection[str]) -> Self:
        """Those named are on, the others off; `all`; `none`. Raises ValueError, with the names there are."""
        known = {field.name.replace("_", "-"): field.name for field in fields(cls)}
        if wrong := sorted(set(names) - known.keys() - {"all", "none"}):
            raise ValueError(f"no such lever: {', '.join(wrong)}; there are all, none, {', '.join(known)}")
        return cls(**{name: "all" in names or shown in names for shown, name in known.items()})


USUAL = Levers()
