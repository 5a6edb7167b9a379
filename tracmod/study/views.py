"""Views: the head masks under which influence is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tracmod.config import ViewsConfig
from tracmod.subnetworks.head_mask import HeadMask


@dataclass(frozen=True)
class View:
    """Head masks under which influence is computed.

    Attributes:
        name: One of `full`, `subnetwork`, `subnetwork-own`, `subnetwork-test`, `random-<i>`,
            `random-own-<i>`, `other-<language>`, `union-<a>+<b>` or `intersection-<a>+<b>`.
        masks: One (language, mask) per pass. With a language, only its test examples are
            attributed under the mask; with None, all are.
        train: The mask of training gradients: the same (`same`), that of each example's own
            language (`own`), or none (`full`). Only views with `same` have features of their own;
            the others combine those of `source` and `full`.
        source: The view whose masks these are.
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
    """Return the views of a config, in the order in which they are computed.

    Args:
        config: The section `views`.
        subnetworks: Language -> its mask.
        seed: The seed of the random masks, each of which has the size of a subnetwork.
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
            (language, _random_like(mask, seed, draw, number))
            for number, (language, mask) in enumerate(subnetworks.items())
        ]
        views.append(View(f"random-{draw}", list(masks)))
        if config.subnetwork_own:
            # The control for `subnetwork-own`: what examples of a language share because they
            # share a mask, whatever the mask.
            views.append(View(f"random-own-{draw}", list(masks), "own", f"random-{draw}"))
    views += [View(f"other-{name}", [(None, subnetworks[name])]) for name in config.other]
    for a, b in config.union:
        either = subnetworks[a].array | subnetworks[b].array
        views.append(View(f"union-{a}+{b}", [(None, HeadMask(either))]))
    for a, b in config.intersection:
        both = subnetworks[a].array & subnetworks[b].array
        views.append(View(f"intersection-{a}+{b}", [(None, HeadMask(both))]))
    return views


def _random_like(mask: HeadMask, seed: int, draw: int, number: int) -> HeadMask:
    layers, heads = mask.array.shape
    entropy = np.random.SeedSequence([seed, draw, number]).generate_state(1)[0]
    return HeadMask.random(layers, heads, mask.size, seed=int(entropy))
