"""Exact scores from one-example autograd in float64, which every library is compared with.

Shape suffixes: B examples of a block, N training examples, P numbers of a parameter, Q query
examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracmod.bench.peers.shared import Examples, columns, linear_names

BLOCK_NUMBERS = 2**26  # numbers of gradients that a block of training examples may have


def exact_scores(model: Any, query: Examples, train: Examples) -> dict[str, Tensor]:
    """Compute dot products and cosines of whole gradients.

    Gradients are computed in float64 and kept rounded to float32, because those of all queries do
    not fit into memory otherwise; every product and sum is in float64.

    Returns:
        `dot` and `cosine`, (Q, N) float64, of the linear layers' weights and biases; `dot_encoder`
        and `cosine_encoder`, with LayerNorm outside the embeddings added, which is what tracmod
        attributes unless it is asked for other parameters.
    """
    model = model.double().requires_grad_(False)
    groups = dict.fromkeys(linear_names(model), "linear")
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and ".embeddings." not in name:
            groups[name] = "norm"
    parameters = {
        f"{name}.{part}": group for name, group in groups.items() for part in ("weight", "bias")
    }
    chosen = [model.get_parameter(name).requires_grad_(True) for name in parameters]
    size = max(1, BLOCK_NUMBERS // sum(parameter.numel() for parameter in chosen))

    def gradients(examples: Examples) -> list[Tensor]:
        blocks = [torch.empty(len(examples), p.numel(), dtype=torch.float32) for p in chosen]
        for row, example in enumerate(examples):
            ids, mask, labels = columns([example])
            loss = F.cross_entropy(model(ids, mask).logits, labels)
            for block, part in zip(blocks, torch.autograd.grad(loss, chosen), strict=True):
                block[row] = part.flatten()
        return blocks

    queries = gradients(query)
    products: dict[str, list[Tensor]] = {"linear": [], "norm": []}
    squares: dict[str, list[Tensor]] = {"linear": [], "norm": []}
    for block in _blocks(train, size):
        sums = {group: torch.zeros(len(query), len(block)).double() for group in products}
        norms = {group: torch.zeros(len(block)).double() for group in products}
        pairs = zip(queries, gradients(block), parameters.values(), strict=True)
        for query_QP, train_BP, group in pairs:
            wide_BP = train_BP.double()
            sums[group] += query_QP.double() @ wide_BP.T
            norms[group] += wide_BP.square().sum(1)
        for group in products:
            products[group].append(sums[group])
            squares[group].append(norms[group])
    result: dict[str, Tensor] = {}
    dot_QN = torch.zeros(len(query), len(train)).double()
    square_Q, square_N = torch.zeros(len(query)).double(), torch.zeros(len(train)).double()
    for group, suffix in (("linear", ""), ("norm", "_encoder")):
        dot_QN = dot_QN + torch.cat(products[group], dim=1)
        square_N = square_N + torch.cat(squares[group])
        for query_QP, name in zip(queries, parameters.values(), strict=True):
            if name == group:
                square_Q = square_Q + query_QP.double().square().sum(1)
        result[f"dot{suffix}"] = dot_QN
        result[f"cosine{suffix}"] = dot_QN / (square_Q[:, None] * square_N).sqrt()
    return result


def _blocks(examples: Examples, size: int) -> Iterator[Examples]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
