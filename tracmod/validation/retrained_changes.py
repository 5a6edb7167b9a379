"""Change of a test language's mean loss when a model is retrained without some examples.

A mean change has two sources of error. Its test examples are a sample, and every training ends
where the order and dropout of its seed lead it. The bootstrap over test examples accounts for the
first. Seeds are too few to be resampled (two draws from two seeds miss most of their variance), but
there are many trainings on different sets of examples, and chance acts alike in all of them. So
their variance is pooled over the sets, and Student's t with that variance is added to the draws.

Shape suffixes: S sets of training examples, R trainings (seeds) on each, Q test examples, L test
languages, B draws of the bootstrap (the first is the observation), T = S R trainings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tracmod.validation.lds import Draws, weighted_mean

# Test language -> the sets whose mean is compared with the baseline.
Compared = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Changes:
    """Changes against the baseline, the training on all examples with the same seed.

    Let `m_sr` (L,) be the mean over the examples of each test language after training on set s with
    seed r. The residuals `e_sr = m_sr - mean_r m_sr - mean_s m_sr + mean_sr m_sr` contain the
    chance differences between trainings, except for those that all trainings with one seed share,
    which cancel in a change. Their covariance `sum_sr e_sr e_sr^T / df` with `df = (S - 1) (R - 1)`
    is taken as that of every training, including the baseline. A change is
    `sum_s w_s . mean_r m_sr`, and its variance is `sum_s w_s^T covariance w_s / R`; the baseline,
    which all changes share, counts in each of them. Chance that acts on single test examples is in
    the bootstrap as well, so intervals are slightly too wide where there is much of it.

    Attributes:
        values: set -> (R, Q) losses, or correctness, by seed.
        same: set -> name of its training; sets that leave out the same examples share one.
        baseline: name of the set with all examples.
        rows_of: test language -> indices of its test examples.
        means: set -> (L,) mean over seeds.
        covariance_LL: covariance of chance in a training, as above; 0 if df is 0.
        df: degrees of freedom; 0 with a single seed.
        draws: draws of test examples.
        t_B: draws of Student's t with df degrees of freedom, the first 0; all 0 if df is 0.
    """

    values: Mapping[str, np.ndarray]
    same: Mapping[str, str]
    baseline: str
    rows_of: Mapping[str, np.ndarray]
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
        rows_of: Mapping[str, np.ndarray],
        draws: Draws,
        seed: int,
    ) -> Changes:
        """Pool the variance over the sets of `same`; `seed` is the seed of the draws of t."""
        means_RL = {
            name: np.stack([values[name][:, own_Q].mean(axis=1) for own_Q in rows_of.values()], 1)
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
        return Changes(values, same, baseline, rows_of, means, covariance_LL, df, draws, t_B)

    def intervals(
        self, compared: Compared
    ) -> Iterator[tuple[str | None, Mapping[str, float | None]]]:
        """Yield value, low and high of the mean over languages (None), then of each language.

        With a single seed the size of chance is unknown, and low and high are None.
        """
        drawn = {language: self._drawn(language, compared[language]) for language in self.rows_of}
        for language in (None, *self.rows_of):
            members = list(self.rows_of) if language is None else [language]
            values_B = np.mean([drawn[member] for member in members], axis=0)
            if self.df == 0:
                yield language, {"value": float(values_B[0]), "low": None, "high": None}
                continue
            error = self.variance({member: compared[member] for member in members}) ** 0.5
            yield language, self.draws.interval(values_B + error * self.t_B)

    def _drawn(self, language: str, sets: Sequence[str]) -> np.ndarray:
        """Return the (B,) mean changes of a language over the drawn test examples."""
        own_Q = self.rows_of[language]
        after_RQ = np.mean([self.values[name] for name in sets], axis=0)
        change_Q = (after_RQ - self.values[self.baseline]).mean(axis=0)
        return weighted_mean(change_Q[None, own_Q], self.draws.tests_BQ[:, own_Q])

    def variance(self, compared: Compared) -> float:
        """Return the variance by chance of the mean change over the compared languages.

        If the languages have several random sets in common, the variance between these is used
        where it is larger than the variance that chance in trainings explains.
        """
        parts = [(language, name) for language, sets in compared.items() for name in sets]
        after = self._variance(parts)
        draws = {name for _, name in parts} if len(parts) > len(compared) else set()
        if len(draws) > 1:
            columns = [list(self.rows_of).index(language) for language in compared]
            means = [self.means[name][columns].mean() for name in sorted(draws)]
            after = max(after, float(np.var(means, ddof=1)) / len(draws))
        return after + self._variance([(language, self.baseline) for language in compared])

    def _variance(self, parts: Sequence[tuple[str, str]]) -> float:
        """Return the variance of the mean over (language, set) of the loss after training."""
        weights: dict[str, np.ndarray] = {}
        for language, name in parts:
            w_L = weights.setdefault(self.same[name], np.zeros(len(self.rows_of)))
            w_L[list(self.rows_of).index(language)] += 1 / len(parts)
        seeds = len(self.values[self.baseline])
        return float(sum(w_L @ self.covariance_LL @ w_L for w_L in weights.values())) / seeds
