"""Prune the attention heads of a model to a language's subnetwork.

A pruning visits smaller and smaller masks, its *course*: the importance of every head is computed,
the least important heads are masked, the score is measured, and again. Importance is computed
anew for every mask, because it is a derivative at the current mask: heads that do the same work
are each unimportant while the other is there, and the last of them is not. A ranking computed once
at the full model would mask them all. The course depends on the threshold only in where it ends,
so one course answers for every threshold above its end (`PruneResult.at`).

Shape suffixes: L layers, H heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tracmod.choices import Combine
from tracmod.files import progress
from tracmod.models.architecture import attention_layers
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.subnetworks.importance import head_importance, mask_least_important, masked_accuracy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A score of exactly threshold * full_score must not fall below it by the rounding of the product.
ROUNDING = 1e-9


@dataclass(frozen=True)
class PruneResult:
    """A subnetwork and the course of the pruning that found it.

    Attributes:
        mask: the last mask of the course before the score fell below `threshold * full_score`.
        score: accuracy under `mask`.
        full_score: accuracy with every head.
        threshold: share of the full score to keep.
        course: one entry per mask visited, the full mask first: `heads` kept, `score`, `mask`
            (L, H) and the `importance` (L, H) computed under it, by which the next mask was chosen
            (None for the last). The course ends with the first mask below the lowest threshold, or
            with one head.
    """

    mask: HeadMask
    score: float
    full_score: float
    threshold: float
    course: list[dict[str, Any]]

    def at(self, threshold: float) -> PruneResult:
        """Return the subnetwork of another threshold, from the same course.

        Raises:
            ValueError: the threshold is outside (0, 1], or the course ended before reaching it.
        """
        _check_share("threshold", threshold)
        lowest_score = threshold * self.full_score - ROUNDING
        below = [entry["score"] < lowest_score for entry in self.course]
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
        """Whether a head was masked: False if the first step already fell below the threshold."""
        return self.mask.size < self.mask.array.size

    def save(self, path: str | Path, language: str, seeds: Sequence[int], **fields: Any) -> None:
        """Write `subnetworks/<language>.json` of a run folder, with further `fields`."""
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
        """Load a result that `save` wrote.

        Raises:
            ValueError: the file does not exist, or has no mask or no course.
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
    layer, then the lower head first) and measures accuracy under the new mask. The course ends with
    the first mask below `threshold` times the full score, or with a mask of one head. The result is
    the last mask before the score fell. Importance and score are computed on the same examples.

    Args:
        model: classifier on any device; not changed.
        examples: one language's examples from `encode`.
        threshold: share of the full score to keep, in (0, 1].
        step: share of all heads masked per round, in (0, 1].
        lowest: if given, continue the course until below this share, so that `PruneResult.at` knows
            every threshold from here up. The result is the same. None: the threshold.
        batch_tokens: largest batch, in tokens.
        description: label of the progress bar.

    Raises:
        ValueError: threshold, lowest or step is outside (0, 1], or there are no examples.

    Source: Michel et al. 2019 (arXiv 1905.10650), section 4; Prasanna et al. 2020
        (arXiv 2005.00561), section 3, for computing the importance anew in every round.
    """
    _check_share("threshold", threshold)
    _check_share("step", step)
    end = min(threshold, threshold if lowest is None else lowest)
    _check_share("lowest", end)
    layers = attention_layers(model)
    mask = HeadMask.full(len(layers), layers[0].num_heads)
    count = max(1, round(step * mask.array.size))
    full_score = masked_accuracy(model, examples, mask, batch_tokens)
    course = [_course_entry(mask, full_score)]
    with progress.bar(description, mask.size, "head") as bar:
        while mask.size > 1 and course[-1]["score"] >= end * full_score - ROUNDING:
            importance_LH = head_importance(model, examples, mask, batch_tokens=batch_tokens)
            course[-1]["importance"] = importance_LH.tolist()
            smaller = mask_least_important(mask, importance_LH, min(count, mask.size - 1))
            score = masked_accuracy(model, examples, smaller, batch_tokens)
            course.append(_course_entry(smaller, score))
            bar.update(mask.size - smaller.size)
            mask = smaller
    return PruneResult(mask, full_score, full_score, threshold, course).at(threshold)


def _course_entry(mask: HeadMask, score: float) -> dict[str, Any]:
    return {"heads": mask.size, "score": score, "mask": mask.array.tolist(), "importance": None}


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"prune: expected a {name} in (0, 1], got {value}")


def combine_masks(masks: Sequence[HeadMask], combine: Combine) -> HeadMask:
    """Combine the masks that several seeds gave into one.

    Args:
        masks: at least one mask, all of one shape.
        combine: `first` returns the first mask; the others keep the heads that any mask keeps
            (`union`), more than half of them (`majority`) or all of them (`intersection`, which may
            keep no head).

    Raises:
        ValueError: there are no masks, or they have several shapes.
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
