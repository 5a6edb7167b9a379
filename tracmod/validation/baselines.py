"""Scores without gradients to compare influence with: BM25, embedding similarity and random.

Shape suffixes: Q test examples, N training examples, B examples of a batch, S tokens, D hidden
size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import bm25s
import numpy as np
import torch
from torch import Tensor

from tracmod.models.inputs import collate, pad_token_id, plan_batches
from tracmod.models.modes import frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# All words of any script count, single letters and frequent words included. In scripts without
# spaces a run of letters is one word.
_WORD = r"(?u)\b\w+\b"


def bm25_scores(queries: Sequence[str], trains: Sequence[str]) -> np.ndarray:
    """Compute BM25 of every training text for every test text (bm25s, k1 = 1.5, b = 0.75).

    Args:
        queries: the Q test texts.
        trains: the N training texts.

    Returns:
        (Q, N) float32, 0 where two texts have no word in common.

    Source: Robertson and Zaragoza 2009.
    """
    words_Q, words_N = (
        bm25s.tokenize(
            list(texts), token_pattern=_WORD, stopwords=[], return_ids=False, show_progress=False
        )
        for texts in (queries, trains)
    )
    scores_QN = np.zeros((len(queries), len(trains)), dtype=np.float32)
    if not any(words_N):
        return scores_QN
    ranker = bm25s.BM25()
    ranker.index(words_N, show_progress=False)
    for row, words in enumerate(words_Q):
        if words:
            scores_QN[row] = ranker.get_scores(words)
    return scores_QN


def embedding_scores(
    model: PreTrainedModel,
    queries: Sequence[Mapping[str, Any]],
    trains: Sequence[Mapping[str, Any]],
) -> np.ndarray:
    """Compute cosines of mean embeddings, the means of the last hidden states over the tokens.

    Args:
        model: the model, on any device; dropout is off.
        queries, trains: Q and N examples, as `encode` returns them.

    Returns:
        (Q, N) float32.
    """
    query_QD, train_ND = (
        torch.nn.functional.normalize(_mean_hidden(model, examples))
        for examples in (queries, trains)
    )
    return (query_QD @ train_ND.T).numpy()


def _mean_hidden(
    model: PreTrainedModel, examples: Sequence[Mapping[str, Any]], batch_tokens: int = 8192
) -> Tensor:
    """Return (N, D) mean hidden states without padding, float32, on the CPU."""
    with frozen(model), torch.no_grad():
        lengths = [len(example["input_ids"]) for example in examples]
        means_ND = torch.empty(len(examples), int(model.config.hidden_size))
        for rows in plan_batches(lengths, batch_tokens):
            batch = collate([examples[row] for row in rows], pad_token_id(model), model.device)
            batch.pop("labels")
            hidden_BSD = model.base_model(**batch).last_hidden_state.float()
            mask_BS1 = batch["attention_mask"][..., None].float()
            means_ND[rows] = ((hidden_BSD * mask_BS1).sum(dim=1) / mask_BS1.sum(dim=1)).cpu()
    return means_ND


def random_scores(num_queries: int, num_train: int, seed: int) -> np.ndarray:
    """Return (Q, N) float32 scores from a normal distribution, as a lower bound for methods."""
    return np.random.default_rng(seed).standard_normal((num_queries, num_train), dtype=np.float32)
