"""The benchmark of families: its plain losses are the engine's, and nothing wrong is timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tracmod.bench import bench_families
from tracmod.bench.bench_families import (
    MODELS,
    make_examples,
    make_model,
    run_model,
)
from tracmod.bench.collect import WrongResult
from tracmod.bench.plain import floor_pass, loss_of, ready_batches
from tracmod.models.inputs import as_examples
from tracmod.models.loss import own_loss
from tracmod.models.plain_pass import model_logits

TINY = {name: settings._replace(shape="tiny") for name, settings in MODELS.items()}


@pytest.mark.parametrize("name", ["XLM-R", "XLM-R, tokens", "XLM-R, answers", "DeBERTa-v3"])
def test_plain_losses_are_those_of_the_engine(name, tmp_path):
    settings = TINY[name]
    model = make_model(settings, tmp_path)
    examples = as_examples(make_examples(settings.unit, 9), model=model)
    (batch, *_) = ready_batches(model, examples, 2048, torch.device("cpu"))
    with torch.no_grad():
        expected = own_loss(model)(model_logits(model, batch.inputs), batch.labels).sum()
        torch.testing.assert_close(loss_of(model, batch, unit=settings.unit), expected)
    floor_pass(model, [batch], unit=settings.unit)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "is_lean"),
    [("XLM-R, mean pooling", False), ("XLM-R, answers", False), ("XLM-R, LoRA", True)],
)
def test_a_model_is_timed(name, is_lean):
    if TINY[name].lora:
        pytest.importorskip("peft")
    result = run_model(TINY[name], 6, seconds=0)
    assert result["lean"] == is_lean
    for dtype, ratio in result["ratio"].items():
        seconds = result["seconds"]
        assert ratio == seconds[f"collect {dtype}"] / seconds[f"floor {dtype}"] > 0


def test_wrong_gradients_are_not_timed(monkeypatch):
    check = bench_families.check_gradients

    def wrong(model, examples, parameters):
        errors = check(model, examples, parameters)
        return [replace(error, engine=1.0) for error in errors]

    monkeypatch.setattr(bench_families, "check_gradients", wrong)
    monkeypatch.setattr(bench_families, "take_turns", lambda *_, **__: pytest.fail("was timed"))
    with pytest.raises(WrongResult, match=r"autograd"):
        run_model(TINY["XLM-R"], 6, seconds=0)
