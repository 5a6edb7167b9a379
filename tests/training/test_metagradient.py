"""The metagradient against finite differences of whole trainings in float64."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_examples, tiny_model, tiny_tokenizer
from torch import Tensor

from tracmod.models.adapters import add_lora
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.training import metagradient as metagradient_module
from tracmod.training.batch_mean import WeightedMean
from tracmod.training.fine_tune import TrainingSettings, fine_tune
from tracmod.training.metagradient import (
    Metagradient,
    Quantity,
    differentiate,
    evaluate,
)
from tracmod.training.replay import Replay, open_replay

NUM_TRAIN = 11
SETTINGS = TrainingSettings(
    epochs=2, batch_size=4, learning_rate=1e-2, weight_decay=0.1, warmup=0.3, seed=5,
    max_grad_norm=100.0,
)  # fmt: skip
CLIPPED = replace(SETTINGS, max_grad_norm=0.4)
MASKS = {"en": HeadMask([[1, 0], [0, 1]]), "de": HeadMask([[1, 1], [1, 0]])}
EXAMPLES = tiny_examples(NUM_TRAIN, longest=6)
LANGUAGES = ["de" if row % 3 == 0 else "en" for row in range(NUM_TRAIN)]
DEV = {name: tiny_examples(3, seed=seed) for name, seed in (("en", 20), ("de", 21))}
QUANTITIES = [
    Quantity("en", tiny_examples(3, seed=10)),
    Quantity("de", tiny_examples(3, seed=11), [MASKS["de"], MASKS["en"], MASKS["de"]]),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def new_model(attention: str = "sdpa", lora: bool = False, **options: Any) -> Any:
    model = tiny_model(**{"family": "xlm-roberta", "hidden": 8, "heads": 2, "scale": 2.0} | options)
    model.set_attn_implementation(attention)
    return add_lora(model, "base", rank=2, alpha=8) if lora else model


class Trained:
    """A finished fine-tuning, and its derivatives in two ways."""

    def __init__(
        self, tokenizer: Any, folder: Path, settings: TrainingSettings, *, masks: Any = None,
        denominator: Any = "fixed", **model: Any,
    ) -> None:  # fmt: skip
        self.folder, self.denominator, self._model = folder, denominator, model
        dev = DEV if settings.reestimate_every else None
        self._common = (tokenizer, EXAMPLES, LANGUAGES, folder / "model", settings)
        self._options = {"masks": masks, "dev": dev}
        fine_tune(new_model(**model), *self._common, **self._options)

    def replay(self, **options: Any) -> Any:
        return open_replay(new_model(**self._model), *self._common, **self._options, **options)

    def differentiate(self, **options: Any) -> Metagradient:
        with self.replay() as replay:
            return differentiate(
                replay, QUANTITIES, self.folder / "work", denominator=self.denominator, **options
            )

    def losses(self, weights_N: Tensor) -> Tensor:
        """Train with weights, and return the quantities."""
        batch_mean = WeightedMean(weights_N, self.denominator)
        with self.replay(batch_mean=batch_mean) as replay:
            take_all_steps(replay)
            return evaluate(replay, QUANTITIES)

    def finite_difference(
        self, direction_N: Tensor, h: float = 1e-6, at: Tensor | float = 0.0
    ) -> Tensor:
        """Return the (K,) derivatives along a direction, with an error of the order of h^4."""
        plus, minus, plus2, minus2 = (
            self.losses(at + step * h * direction_N) for step in (1, -1, 2, -2)
        )
        return (8 * (plus - minus) - (plus2 - minus2)) / (12 * h)


def take_all_steps(replay: Replay) -> None:
    replay.restart()
    for step in range(replay.total_steps):
        replay.advance(step)


CASES: dict[str, tuple[TrainingSettings, dict[str, Any]]] = {
    "decay-and-warm-up": (SETTINGS, {}),
    "no-decay-no-warm-up": (replace(SETTINGS, weight_decay=0.0, warmup=0.0), {}),
    "clipped": (CLIPPED, {}),
    "weighted-denominator": (CLIPPED, {"denominator": "weighted"}),
    "dropout": (CLIPPED, {"dropout": 0.2}),
    "no-dropout": (replace(CLIPPED, dropout=False), {"dropout": 0.2}),
    "epsilon": (replace(CLIPPED, adam_epsilon=1e-3), {"masks": MASKS}),
    "eager-attention": (SETTINGS, {"attention": "eager", "dropout": 0.2}),
    "uniform-sampling": (replace(SETTINGS, sampling="uniform"), {}),
    "four-epochs-frozen-embeddings": (
        replace(SETTINGS, epochs=4, batch_size=6, train_embeddings=False),
        {"family": "bert"},
    ),
    "upper-layer": (replace(CLIPPED, train_layers=1), {"dropout": 0.2}),
    "sparse-upper-layer": (replace(CLIPPED, train_layers=1), {"masks": MASKS}),
    "lora": (CLIPPED, {"lora": True, "dropout": 0.2}),
    "sparse-lora": (CLIPPED, {"lora": True, "masks": MASKS}),
    "distilbert": (CLIPPED, {"family": "distilbert"}),
    "electra": (SETTINGS, {"family": "electra"}),
    "regression": (SETTINGS, {"num_labels": 1}),
    "sparse": (replace(SETTINGS, epochs=3), {"masks": MASKS}),
    "sparse-clipped-uniform-dropout": (
        replace(CLIPPED, sampling="uniform"),
        {"masks": MASKS, "denominator": "weighted", "dropout": 0.1},
    ),
    "sparse-classifier": (replace(SETTINGS, shared="classifier"), {"masks": MASKS}),
    "sparse-frozen": (replace(CLIPPED, shared="frozen"), {"masks": MASKS}),
}


@pytest.mark.parametrize("name", CASES)
def test_derivatives_agree_with_finite_differences(name, tokenizer, tmp_path):
    settings, options = CASES[name]
    trained = Trained(tokenizer, tmp_path, settings, **options)
    result = trained.differentiate()
    generator = torch.Generator().manual_seed(0)
    direction_N = torch.randn(NUM_TRAIN, generator=generator, dtype=torch.float64)
    expected_K = trained.finite_difference(direction_N)
    assert expected_K.abs().min() > 1e-7
    torch.testing.assert_close(result.derivatives_KN @ direction_N, expected_K, rtol=1e-4, atol=0)
    assert result.gradient_difference < 1e-12
    assert result.verified == list(range(1, settings.epochs + 1))
    torch.testing.assert_close(
        result.values_K, trained.losses(torch.zeros(NUM_TRAIN)), rtol=1e-12, atol=0
    )


def test_dynamic_masks_are_those_of_the_training(tokenizer, tmp_path):
    """The masks of an epoch do not depend on the weights of the examples, as long as none changes.

    They are read from the folder of the training, so finite differences keep them too.
    """
    settings = replace(SETTINGS, epochs=3, reestimate_every=1)
    trained = Trained(tokenizer, tmp_path, settings, masks=MASKS)
    direction_N = torch.linspace(-1, 1, NUM_TRAIN, dtype=torch.float64)
    torch.testing.assert_close(
        trained.differentiate().derivatives_KN @ direction_N,
        trained.finite_difference(direction_N),
        rtol=1e-4,
        atol=0,
    )


# --- states, budgets and interruptions ------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A sparse fine-tuning of 12 steps, with dropout."""
    settings = replace(CLIPPED, epochs=4)
    return Trained(tokenizer, tmp_path_factory.mktemp("run"), settings, masks=MASKS, dropout=0.1)


@pytest.mark.parametrize("denominator", ["fixed", "weighted"])
def test_derivatives_at_other_weights_agree_with_finite_differences(
    denominator, tokenizer, tmp_path
):
    trained = Trained(tokenizer, tmp_path, CLIPPED, denominator=denominator, dropout=0.1)
    generator = torch.Generator().manual_seed(3)
    weights_N = torch.rand(NUM_TRAIN, generator=generator, dtype=torch.float64) - 0.6
    with trained.replay(batch_mean=WeightedMean(weights_N, denominator)) as replay:
        result = differentiate(replay, QUANTITIES, tmp_path / "work")
    assert result.verified == []
    direction_N = torch.randn(NUM_TRAIN, generator=generator, dtype=torch.float64)
    expected_K = trained.finite_difference(direction_N, at=weights_N)
    torch.testing.assert_close(result.derivatives_KN @ direction_N, expected_K, rtol=1e-4, atol=0)


def test_the_mean_of_derivatives_along_a_path_is_the_change(tokenizer, tmp_path):
    """By Gauss-Legendre quadrature, which is slow: AdamW's first steps are almost signs."""
    trained = Trained(tokenizer, tmp_path, replace(SETTINGS, learning_rate=1e-3))
    left_out_N = torch.tensor([float(language == "de") for language in LANGUAGES]).double()
    change_K = torch.zeros(len(QUANTITIES), dtype=torch.float64)
    for node, share in zip(*np.polynomial.legendre.leggauss(8), strict=True):
        with trained.replay(batch_mean=WeightedMean(-0.5 * (1 + node) * left_out_N)) as replay:
            result = differentiate(replay, QUANTITIES, trained.folder / "path")
        change_K -= 0.5 * share * (result.derivatives_KN @ left_out_N)
    actual_K = trained.losses(-left_out_N) - trained.losses(0 * left_out_N)
    torch.testing.assert_close(change_K, actual_K, rtol=0.2, atol=0)


@pytest.fixture(scope="module")
def expected(trained: Trained) -> Metagradient:
    return trained.differentiate()


def assert_equal(result: Metagradient, expected: Metagradient) -> None:
    for name in ("values_K", "derivatives_KN", "adjoint_norms_KT"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
    assert result.gradient_difference == expected.gradient_difference


def budgets(trained: Trained, states_in_memory: int, states_on_disk: int) -> dict[str, int]:
    with trained.replay() as replay:
        state, adjoints = replay.state_bytes, len(QUANTITIES) * replay.state_bytes
    return {
        "memory": adjoints + states_in_memory * state,
        "disk": 2 * adjoints + states_on_disk * state,
    }


@pytest.mark.parametrize(
    ("in_memory", "on_disk", "saved", "replayed"),
    [(13, 1, 0, 12), (5, 2, 2, 12 + 8), (2, 11, 11, 12 + 11), (2, 4, 4, None), (2, 1, 1, None)],
)
def test_derivatives_do_not_depend_on_the_budgets(
    in_memory, on_disk, saved, replayed, trained, expected, monkeypatch
):
    largest = 0
    save_tensors = metagradient_module._save_tensors

    def measured(tensors: Any, file: Path) -> None:
        nonlocal largest
        save_tensors(tensors, file)
        files = (trained.folder / "work").rglob("*.safetensors")
        largest = max(largest, sum(file.stat().st_size for file in files))

    monkeypatch.setattr(metagradient_module, "_save_tensors", measured)
    given = budgets(trained, in_memory, on_disk)
    result = trained.differentiate(save_seconds=0.0, **given)
    assert_equal(result, expected)
    assert result.saved_states == saved
    if replayed is not None:
        assert result.replayed_steps == replayed
    headers = 40_000 * (on_disk + 2 * len(QUANTITIES) + 1)  # names and shapes in the files
    assert largest <= given["disk"] + headers
    assert not (trained.folder / "work").exists()


@pytest.mark.parametrize(("in_memory", "on_disk", "argument"), [(1, 5, "memory"), (5, 0, "disk")])
def test_a_budget_that_is_too_small_is_refused(in_memory, on_disk, argument, trained):
    given = budgets(trained, in_memory, on_disk)
    smallest = budgets(trained, 2, 1)[argument]
    with pytest.raises(ValueError, match=rf"{argument}.*{smallest:,}.*{given[argument]:,}"):
        trained.differentiate(**given)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("function", ["_advance", "_take_back", "_save_tensors"])
def test_an_interrupted_sweep_is_continued_to_the_same_bits(
    function, trained, expected, monkeypatch
):
    """It stops later each time, before and in the middle of whatever it writes."""
    sweep = metagradient_module._Sweep
    owner = metagradient_module if function == "_save_tensors" else sweep
    original = getattr(owner, function)
    left = 0

    def stopping(*arguments: Any) -> Any:
        nonlocal left
        if left == 0:
            raise Stopped
        left -= 1
        return original(*arguments)

    monkeypatch.setattr(owner, function, stopping)
    interruptions, result = 0, None
    for allowed in (1, 3, 6, 9, 14, 1000):
        left = allowed
        try:
            result = trained.differentiate(save_seconds=0.0, **budgets(trained, 4, 2))
            break
        except Stopped:
            interruptions += 1
    assert interruptions >= 3
    assert result is not None
    assert_equal(result, expected)


def test_states_of_another_sweep_are_not_used(trained, expected, monkeypatch):
    def stopping(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(metagradient_module._Sweep, "_load_adjoints", stopping)
        with pytest.raises(Stopped):
            trained.differentiate()
    sweep = trained.folder / "work" / "sweep.json"
    sweep.write_text('"another"')
    save_file({"weight:x": torch.zeros(1)}, trained.folder / "work/states/3.safetensors")
    assert_equal(trained.differentiate(), expected)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_metagradient as tests
from tracmod.training import metagradient

original, left = metagradient._Sweep._take_back, int(sys.argv[2])
def killing(*arguments):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    original(*arguments)
metagradient._Sweep._take_back = killing
trained = tests.Trained(
    tests.tiny_tokenizer(), Path(sys.argv[1]), tests.replace(tests.CLIPPED, epochs=4),
    masks=tests.MASKS, dropout=0.1,
)
trained.differentiate(save_seconds=0.0, **tests.budgets(trained, 4, 2))
"""


@pytest.mark.slow
def test_a_killed_sweep_is_continued_to_the_same_bits(trained, expected):
    folders = f"{Path(__file__).parent}{':'}{Path(__file__).parents[1] / 'support'}"
    for allowed in (2, 7):
        command = [sys.executable, "-c", KILLED, str(trained.folder), str(allowed)]
        environment = {**os.environ, "PYTHONPATH": f"{folders}:{os.environ.get('PYTHONPATH', '')}"}
        process = subprocess.run(command, env=environment, check=False)
        assert process.returncode == -signal.SIGKILL
    assert list((trained.folder / "work").glob("adjoints/*/sums.safetensors"))
    assert_equal(trained.differentiate(**budgets(trained, 4, 2)), expected)


# --- the replay -----------------------------------------------------------------------------


def test_a_training_with_other_checkpoints_is_refused(tokenizer, tmp_path):
    trained = Trained(tokenizer, tmp_path, SETTINGS)
    file = tmp_path / "model/checkpoint-1/model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[3]
    weights[name].view(-1)[2] += 1e-15
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"checkpoint-1.*{name}"):
        trained.differentiate()


def test_another_training_is_refused(tokenizer, tmp_path):
    trained = Trained(tokenizer, tmp_path, SETTINGS)
    with (
        pytest.raises(ValueError, match="another model"),
        open_replay(new_model(seed=1), *trained._common),
    ):
        pass
    (tmp_path / "model/metrics.json").unlink()
    with pytest.raises(ValueError, match="interrupted"):
        trained.differentiate()
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ValueError, match=r"training\.json"):
        trained.differentiate()


def test_float32_agrees_with_float64_and_its_gradients_with_the_training(tokenizer, tmp_path):
    results = []
    for dtype in (torch.float64, torch.float32):
        folder = tmp_path / str(dtype)
        results.append(Trained(tokenizer, folder, SETTINGS, dtype=dtype).differentiate())
    torch.testing.assert_close(
        results[1].derivatives_KN, results[0].derivatives_KN, rtol=0.01, atol=1e-4
    )
    assert 0 < results[1].gradient_difference < 1e-4


def test_a_gradient_that_is_not_that_of_the_training_is_refused(tokenizer, tmp_path, monkeypatch):
    """As on a GPU whose attention draws other dropout masks than the differentiable pass."""
    trained = Trained(tokenizer, tmp_path, SETTINGS, dropout=0.2)

    def other_dropout(self: Replay, step: int) -> Tensor:
        self.model.train()
        return self._training.losses(step + 1, self.batch(step)[0], autocast=False)

    monkeypatch.setattr(Replay, "losses", other_dropout)
    with pytest.raises(ValueError, match=r"step 6.*1%"):
        trained.differentiate()


def test_quantities_are_needed(trained):
    with trained.replay() as replay, pytest.raises(ValueError, match=r"quantities.*none"):
        differentiate(replay, [], trained.folder / "work")
