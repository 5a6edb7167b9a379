"""Views: under which head masks influence is computed, of one set of subnetworks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tracmod.config import ViewsConfig
from tracmod.subnetworks.head_mask import HeadMask


@dataclass(frozen=True)
class View:
    """Under which head masks influence is computed.

    Attributes:
        name: `full`, `subnetwork`, `subnetwork-own`, `subnetwork-test`, `random-<i>`,
            `random-own-<i>`, `other-<language>`, `union-<a>+<b>` or `intersection-<a>+<b>`.
        masks: one entry per pass: (language, mask). With a language, only its test examples are
            attributed under the mask; with None, all are.
        train: training gradients under the same mask (`same`), each under its own language's
            (`own`), or under none (`full`). Views other than `same` have no features of their own:
            they put together those of `source` and `full`.
        source: the view whose masks these are.
    """

    name: str
    masks: list[tuple[str | None, HeadMask | None]]
    train: Literal["same", "own", "full"] = "same"
    source: str = "subnetwork"

    @property
    def collected(self) -> bool:
        """Whether the view has features of its own."""
        return self.train == "same"


def views_of(config: ViewsConfig, subnetworks: Mapping[str, HeadMask], seed: int) -> list[View]:
    """The views that the config asks for, in the order they are computed.

    Args:
        config: which.
        subnetworks: each language's mask.
        seed: of the random masks, which have each subnetwork's size.
    """
    views = [View("full", [(None, None)])]
    if config.subnetwork:
        views.append(View("subnetwork", list(subnetworks.items())))
    if config.subnetwork_own:
        views.append(View("subnetwork-own", list(subnetworks.items()), "own"))
    if config.subnetwork_test:
        views.append(View("subnetwork-test", list(subnetworks.items()), "full"))
    for draw in range(config.random):
        masks = [
            (language, _random_like(mask, seed, draw, place))
            for place, (language, mask) in enumerate(subnetworks.items())
        ]
        views.append(View(f"random-{draw}", list(masks)))
        if config.subnetwork_own:
            # What is due to examples of one language sharing a mask, whatever the mask.
            views.append(View(f"random-own-{draw}", list(masks), "own", f"random-{draw}"))
    views += [View(f"other-{name}", [(None, subnetworks[name])]) for name in config.other]
    for a, b in config.union:
        either = subnetworks[a].array | subnetworks[b].array
        views.append(View(f"union-{a}+{b}", [(None, HeadMask(either))]))
    for a, b in config.intersection:
        both = subnetworks[a].array & subnetworks[b].array
        views.append(View(f"intersection-{a}+{b}", [(None, HeadMask(both))]))
    return views


def _random_like(mask: HeadMask, seed: int, draw: int, place: int) -> HeadMask:
    layers, heads = mask.array.shape
    entropy = np.random.SeedSequence([seed, draw, place]).generate_state(1)[0]
    return HeadMask.random(layers, heads, mask.size, seed=int(entropy))
