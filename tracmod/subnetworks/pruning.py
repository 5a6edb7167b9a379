"""Pruning: from head importance to the subnetwork of a language, over thresholds and seeds.

Shape suffixes: L layers, H heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel

from tracmod.config import Combine
from tracmod.models.architecture import attention_layers
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.subnetworks.importance import head_importance, masked_accuracy, without_least


@dataclass(frozen=True)
class PruneResult:
    """A subnetwork and how it was found.

    Attributes:
        mask: the smallest mask reached whose score is at or above `threshold * full_score`.
        score: accuracy under `mask`.
        full_score: accuracy with every head.
        threshold: share of the full score to keep.
        course: one entry per mask tried, the full one first: `heads` kept, `score`, `mask` (L, H),
            and `importance` (L, H) under that mask, by which the next was made (None at the last).
            It goes on to the first mask below the lowest threshold asked for.
    """

    mask: HeadMask
    score: float
    full_score: float
    threshold: float
    course: list[dict[str, Any]]

    def at(self, threshold: float) -> PruneResult:
        """The subnetwork of another threshold, on the same course.

        Raises:
            ValueError: a threshold outside (0, 1], or one that the course ended before.
        """
        _check_share("threshold", threshold)
        wanted = threshold * self.full_score - 1e-9  # exactly at it is not lost to rounding
        below = [row["score"] < wanted for row in self.course]
        if not any(below) and self.course[-1]["heads"] > 1:
            raise ValueError(
                f"prune: expected a threshold that the course reaches, got {threshold}: it ended "
                f"at {self.course[-1]['heads']} heads; prune with this threshold"
            )
        last = self.course[below.index(True) - 1 if any(below) else -1]
        return PruneResult(
            HeadMask(last["mask"]), last["score"], self.full_score, threshold, self.course
        )

    @property
    def pruned(self) -> bool:
        """False where the first step already fell below the threshold: every head is kept."""
        return self.mask.size < self.mask.array.size

    def save(self, path: str | Path, language: str, seeds: Sequence[int], **fields: Any) -> None:
        """Write `subnetworks/<language>.json` of a run folder; `fields` beside the result's own."""
        self.mask.save(
            path,
            language=language,
            score=self.score,
            full_score=self.full_score,
            threshold=self.threshold,
            seeds=list(seeds),
            **fields,
            course=self.course,
        )

    @classmethod
    def load(cls, path: str | Path) -> PruneResult:
        """Read what `save` wrote.

        Raises:
            ValueError: no such file, no mask in it, or no course.
        """
        mask = HeadMask.load(path)
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
        names = ("score", "full_score", "threshold", "course")
        missing = [name for name in names if name not in tree]
        if missing:
            raise ValueError(f"{path}: expected a pruned subnetwork, {missing[0]} is missing")
        return cls(mask, *(tree[name] for name in names))


def prune(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    *,
    threshold: float = 0.95,
    step: float = 0.10,
    lowest: float | None = None,
    batch_tokens: int = 8192,
    description: str = "prune",
) -> PruneResult:
    """Mask heads, least important first, while the score stays at or above the threshold.

    Each round computes `head_importance` under the current mask, masks the
    `max(1, round(step * L * H))` least important of the heads left (equal importance: the lower
    layer, then the lower head first) and measures accuracy under the new mask. The first mask
    below `threshold` times the full score ends it, or a mask of one head; the last mask before it
    is the result. Importance and score are of the same examples.

    Args:
        model: on any device; not changed.
        examples: one language's, as `encode` returns them.
        threshold: share of the full score to keep, in (0, 1].
        step: share of all heads masked per round, in (0, 1].
        lowest: go on until below this share, so that `PruneResult.at` has every threshold from
            here up; the result is the same. None: the threshold.
        batch_tokens: largest batch, in tokens.
        description: of the progress bar.

    Raises:
        ValueError: threshold, lowest or step outside (0, 1], or no examples.

    Source: Michel et al. 2019 (arXiv 1905.10650), section 4; Prasanna et al. 2020
        (arXiv 2005.00561), section 3, for the recomputation in every round.
    """
    _check_share("threshold", threshold)
    _check_share("step", step)
    end = min(threshold, threshold if lowest is None else lowest)
    _check_share("lowest", end)
    layers = attention_layers(model)
    mask = HeadMask.full(len(layers), layers[0].num_heads)
    count = max(1, round(step * mask.array.size))
    full_score = masked_accuracy(model, examples, mask, batch_tokens)
    course = [_tried(mask, full_score)]
    with tqdm(total=mask.size, desc=description, unit="head", disable=None) as bar:
        # A score of exactly the threshold must not be lost to rounding of the product.
        while mask.size > 1 and course[-1]["score"] >= end * full_score - 1e-9:
            importance_LH = head_importance(model, examples, mask, batch_tokens=batch_tokens)
            course[-1]["importance"] = importance_LH.tolist()
            smaller = without_least(mask, importance_LH, min(count, mask.size - 1))
            course.append(_tried(smaller, masked_accuracy(model, examples, smaller, batch_tokens)))
            bar.update(mask.size - smaller.size)
            mask = smaller
    return PruneResult(mask, full_score, full_score, threshold, course).at(threshold)


def _tried(mask: HeadMask, score: float) -> dict[str, Any]:
    return {"heads": mask.size, "score": score, "mask": mask.array.tolist(), "importance": None}


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"prune: expected a {name} in (0, 1], got {value}")


def combine_masks(masks: Sequence[HeadMask], combine: Combine) -> HeadMask:
    """One mask of those that several seeds gave.

    Args:
        masks: of one shape, at least one.
        combine: `first`; heads kept by any (`union`), by more than half (`majority`) or by all of
            them (`intersection`, which may keep none).

    Raises:
        ValueError: no masks, or of several shapes.
    """
    shapes = {mask.array.shape for mask in masks}
    if len(shapes) != 1:
        raise ValueError(f"combined head masks: expected one shape, got {sorted(shapes)}")
    votes_LH = np.sum([mask.array for mask in masks], axis=0, dtype=np.int64)
    match combine:
        case "first":
            return masks[0]
        case "union":
            return HeadMask(votes_LH > 0)
        case "majority":
            return HeadMask(2 * votes_LH > len(masks))
        case "intersection":
            return HeadMask(votes_LH == len(masks))
