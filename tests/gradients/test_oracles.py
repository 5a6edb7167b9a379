"""Influence on a tiny XLM-R against other implementations: kronfluence and captum."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import SENTENCES, table, tiny_examples, tiny_model, tiny_tokenizer

import tracmod as tm
import tracmod.gradients.ekfac
import tracmod.gradients.verified_pass
import tracmod.influence.exact
from tracmod.attribution.attribute import attribute
from tracmod.attribution.options import AttributionOptions
from tracmod.files.durable import write_parquet
from tracmod.gradients.capture import select_layers
from tracmod.models.inputs import collate, encode, pad_token_id
from tracmod.models.loading import load_classifier

LINEAR_TOLERANCE = 1e-5
WHOLE_MODEL_TOLERANCE = 1e-4
EKFAC_TOLERANCE = 1e-4


def relative_error(actual, truth):
    """Return the largest difference divided by the largest score."""
    return float((actual.double() - truth).abs().max() / truth.abs().max())


def kronfluence_scores(model, train, query, folder, strategy="identity"):
    """Return pairwise scores (Q, N) with the factors of a strategy, and the tracked modules."""
    analyzer = pytest.importorskip("kronfluence.analyzer")
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.module.tracked_module import TrackedModule
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    padding = pad_token_id(model)

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            inputs = {name: part for name, part in batch.items() if name != "labels"}
            logits = model(**inputs).logits
            return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_attention_mask(self, batch):
            return batch["attention_mask"]

    task = Classification()
    prepared = analyzer.prepare_model(model, task)
    tracked = {n for n, module in prepared.named_modules() if isinstance(module, TrackedModule)}
    work = analyzer.Analyzer("oracle", prepared, task, cpu=True, output_dir=str(folder),
                             disable_tqdm=True)  # fmt: skip
    work.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=lambda rows: collate(rows, padding)))
    dtypes = ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
    factors = FactorArguments(
        strategy=strategy, use_empirical_fisher=True,
        **{f"{name}_dtype": torch.float64 for name in dtypes},
    )  # fmt: skip
    work.fit_all_factors("factors", train, per_device_batch_size=5, factor_args=factors)
    double = dict.fromkeys(("per_sample_gradient_dtype", "precondition_dtype", "score_dtype"),
                           torch.float64)  # fmt: skip
    work.compute_pairwise_scores(
        "scores", "factors", query, train, per_device_query_batch_size=4,
        per_device_train_batch_size=5, score_args=ScoreArguments(damping_factor=None, **double),
    )  # fmt: skip
    return work.load_pairwise_scores("scores")["all_modules"], tracked


@pytest.mark.parametrize("longest", [3, 24])  # 3: all as long as each other, so no padding
def test_exact_influence_of_the_linear_layers_is_kronfluences(monkeypatch, tmp_path, longest):
    model = tiny_model("xlm-roberta", dtype=torch.float32)
    train = tiny_examples(17, longest=longest, seed=1)
    query = tiny_examples(6, longest=longest, seed=2)
    linear = [layer for layer in select_layers(model, "all") if layer.kind == "linear"]
    monkeypatch.setattr(tracmod.influence.exact, "select_layers", lambda *_: linear)
    actual = tm.exact_influence(model, train, query, "all")
    truth, tracked = kronfluence_scores(
        tiny_model("xlm-roberta", dtype=torch.float64), train, query, tmp_path
    )
    assert tracked == {layer.name for layer in linear}
    assert truth.dtype == torch.float64
    assert relative_error(actual, truth) <= LINEAR_TOLERANCE


def test_influence_preconditioned_with_ekfac_is_kronfluences(monkeypatch, tmp_path):
    model = tiny_model("xlm-roberta", dtype=torch.float32)
    train, query = tiny_examples(60, seed=1), tiny_examples(6, seed=2)
    linear = [layer for layer in select_layers(model, "all") if layer.kind == "linear"]
    for module in (tracmod.influence.exact, tracmod.gradients.ekfac):
        monkeypatch.setattr(module, "select_layers", lambda *_: linear)
    # kronfluence takes the covariance of the inputs over all tokens; the lean pass leaves out those
    # of the last layer that the loss does not read, so it is switched off. Both add a tenth of a
    # layer's mean eigenvalue as damping.
    monkeypatch.setattr(tracmod.gradients.verified_pass, "lean", lambda *_: nullcontext({}))
    fitted = tm.fit_ekfac(model, train, "all", labels="given")
    actual = tm.exact_influence(model, train, query, "all", preconditioner=fitted)
    truth, _ = kronfluence_scores(
        tiny_model("xlm-roberta", dtype=torch.float64), train, query, tmp_path, "ekfac"
    )
    plain = tm.exact_influence(model, train, query, "all")
    assert relative_error(actual, truth) <= EKFAC_TOLERANCE
    assert relative_error(plain * (truth.abs().max() / plain.abs().max()), truth) > 0.1


class Columns(torch.nn.Module):
    """Wraps a classifier as captum calls models: separate inputs, and logits as output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def captum_scores(checkpoints, train, query):
    """Return TracIn over the checkpoints (Q, N) by captum, for the whole model in float64."""
    influence = pytest.importorskip("captum.influence")
    model = Columns(load_classifier(next(iter(checkpoints))).double().eval())

    def load(model, folder):
        model.model.load_state_dict(load_classifier(folder).double().state_dict())
        return checkpoints[folder]

    def columns(examples):
        batch = collate(examples, pad_token_id(model.model))
        return batch["input_ids"], batch["attention_mask"], batch["labels"]

    tracin = influence.TracInCP(
        model,
        torch.utils.data.DataLoader(train, batch_size=5, collate_fn=columns),
        list(checkpoints),
        load,
        loss_fn=torch.nn.CrossEntropyLoss(reduction="none"),
    )
    return tracin.influence(columns(query))


def test_exact_attribution_over_checkpoints_is_captums(tmp_path):
    tokenizer, rates = tiny_tokenizer(), {"one": 3e-4, "two": 1e-4, "three": 5e-5}
    for number, (name, rate) in enumerate(rates.items()):
        model = tiny_model(
            "xlm-roberta", seed=number, dtype=torch.float32, vocabulary=len(tokenizer)
        )
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        state = {"epoch": number + 1, "step": number + 1, "learning_rate": rate}
        (tmp_path / name / "tracmod.json").write_text(json.dumps(state))
    tables = {}
    for split, count in (("train", 12), ("query", 5)):
        texts = [f"{SENTENCES[row % 7]} {SENTENCES[(row * 5 + count) % 7]}" for row in range(count)]
        rows = [(f"{split}-{row}", text, None, row % 3) for row, text in enumerate(texts)]
        tables[split] = table(rows)
        write_parquet(tmp_path / f"{split}.parquet", tables[split])
    attribute(
        AttributionOptions(
            model=str(tmp_path / "one"),
            train=tmp_path / "train.parquet",
            query=tmp_path / "query.parquet",
            out=tmp_path / "out",
            checkpoints=[tmp_path / name for name in rates],
            exact=True,
            normalize=None,
            parameters="all",
            device="cpu",
        )
    )
    top = pq.read_table(tmp_path / "out" / "top.parquet").to_pylist()
    scores = {(row["test_id"], row["train_id"]): row["score"] for row in top if row["sign"] == 1}
    actual = torch.tensor(
        [[scores[f"query-{q}", f"train-{n}"] for n in range(12)] for q in range(5)],
    )
    train, query = (encode(tokenizer, tables[one], 32, num_labels=3) for one in ("train", "query"))
    truth = captum_scores({tmp_path / name: rate for name, rate in rates.items()}, train, query)
    assert truth.dtype == torch.float64
    assert relative_error(actual, truth) <= WHOLE_MODEL_TOLERANCE
