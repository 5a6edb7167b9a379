"""Change of test languages' means when a model is trained without some examples, with intervals.

A mean change errs twice: its test examples are some of many, and each training ended where its
seed's order and dropout led it. The bootstrap tells the first, of many test examples. Of seeds
there are too few to draw again (two drawn of two miss most of what they vary), but many trainings,
each on its own examples, vary alike: their variance is pooled, and Student's t added to the draws.

Shape legend: S sets of training examples, R trainings (seeds) on each, Q test examples, L test
languages, B draws of the bootstrap (the first is what was observed).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tracmod.validation.lds import Draws, weighted_mean

# Test language -> the sets without examples whose mean is compared with the baseline.
Compared = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Changes:
    """Changes against the baseline, the training on all examples with the same seed.

    Of the mean `m_sr` (L,) over each test language's examples, after training on set s with seed r,
    the residuals `e_sr = m_sr - mean_r m_sr - mean_s m_sr + mean_sr m_sr` hold what the trainings
    differ in by chance, but for what all those of one seed share, which cancels in a change. Their
    covariance `sum_sr e_sr e_sr^T / df`, `df = (S - 1) (R - 1)`, is taken to be that of every
    training, the baseline too. A change is `sum_s w_s . mean_r m_sr`, its variance
    `sum_s w_s^T covariance w_s / R`: the baseline, which all changes share, counts in each.
    Chance that each test example has for itself is in the bootstrap as well, so that intervals are
    a little wide where there is much of it.

    Attributes:
        values: set -> (R, Q).
        same: set -> name of its training: sets without the same examples are trained once.
        baseline: the set of all examples.
        places: test language -> its test examples, of Q.
        means: set -> (L,) mean over seeds.
        covariance_LL: as above; 0 where df is.
        df: degrees of freedom; 0: one seed.
        draws: over test examples.
        t_B: Student's t with df degrees, the first 0; all 0 where df is.
    """

    values: Mapping[str, np.ndarray]
    same: Mapping[str, str]
    baseline: str
    places: Mapping[str, np.ndarray]
    means: Mapping[str, np.ndarray]
    covariance_LL: np.ndarray
    df: int
    draws: Draws
    t_B: np.ndarray

    @staticmethod
    def of(
        values: Mapping[str, np.ndarray],
        same: Mapping[str, str],
        baseline: str,
        places: Mapping[str, np.ndarray],
        draws: Draws,
        seed: int,
    ) -> Changes:
        """Pool over the sets of `same`; `seed` is that of the draws of t."""
        means_RL = {
            name: np.stack([values[name][:, own_Q].mean(axis=1) for own_Q in places.values()], 1)
            for name in same
        }
        m_SRL = np.stack([means_RL[name] for name in dict.fromkeys(same.values())])
        e_SRL = m_SRL - m_SRL.mean(axis=1, keepdims=True)
        e_SRL -= e_SRL.mean(axis=0)
        sets, seeds, _ = e_SRL.shape
        df = (sets - 1) * (seeds - 1)
        e_TL = e_SRL.reshape(sets * seeds, -1)
        t_B = np.zeros(len(draws.tests_BQ))
        if df:
            t_B[1:] = np.random.default_rng([seed, 4]).standard_t(df, size=len(t_B) - 1)
        means = {name: own_RL.mean(axis=0) for name, own_RL in means_RL.items()}
        covariance_LL = e_TL.T @ e_TL / max(1, df)
        return Changes(values, same, baseline, places, means, covariance_LL, df, draws, t_B)

    def intervals(
        self, compared: Compared
    ) -> Iterator[tuple[str | None, Mapping[str, float | None]]]:
        """`value`, `low`, `high` of the mean over languages (None), then of each language.

        With one seed nothing tells what is chance: low and high are None.
        """
        drawn = {language: self._drawn(language, compared[language]) for language in self.places}
        for language in (None, *self.places):
            of = list(self.places) if language is None else [language]
            values_B = np.mean([drawn[one] for one in of], axis=0)
            if self.df == 0:
                yield language, {"value": float(values_B[0]), "low": None, "high": None}
                continue
            error = self.variance({one: compared[one] for one in of}) ** 0.5
            yield language, self.draws.interval(values_B + error * self.t_B)

    def _drawn(self, language: str, sets: Sequence[str]) -> np.ndarray:
        """(B,) mean changes of a language, over the test examples drawn."""
        own_Q = self.places[language]
        after_RQ = np.mean([self.values[name] for name in sets], axis=0)
        change_Q = (after_RQ - self.values[self.baseline]).mean(axis=0)
        return weighted_mean(change_Q[None, own_Q], self.draws.tests_BQ[:, own_Q])

    def variance(self, compared: Compared) -> float:
        """Of the change, mean over the languages compared, by chance in the trainings.

        Where each language has several sets (drawn at random, the same for all languages), the
        variance between these counts if it is larger than chance in trainings gives.
        """
        parts = [(language, name) for language, sets in compared.items() for name in sets]
        after = self._variance(parts)
        draws = {name for _, name in parts} if len(parts) > len(compared) else set()
        if len(draws) > 1:
            columns = [list(self.places).index(language) for language in compared]
            means = [self.means[name][columns].mean() for name in sorted(draws)]
            after = max(after, float(np.var(means, ddof=1)) / len(draws))
        return after + self._variance([(language, self.baseline) for language in compared])

    def _variance(self, parts: Sequence[tuple[str, str]]) -> float:
        """Of the mean over (language, set) of the set's mean loss on the language."""
        weights: dict[str, np.ndarray] = {}
        for language, name in parts:
            w_L = weights.setdefault(self.same[name], np.zeros(len(self.places)))
            w_L[list(self.places).index(language)] += 1 / len(parts)
        seeds = len(self.values[self.baseline])
        return float(sum(w_L @ self.covariance_LL @ w_L for w_L in weights.values())) / seeds
