"""Selections of parameters by patterns and by functions: the same gradients in every pass."""

from __future__ import annotations

import copy
import json
import warnings
from fnmatch import fnmatchcase

import pytest
import torch
from click.testing import CliRunner
from encoders import ragged_examples, tiny_encoder
from own_model import save_model, write_examples
from torch import nn

import tracmod as tm
from tracmod.attribution.attribute import attribute
from tracmod.attribution.options import AttributionOptions
from tracmod.cli import main
from tracmod.features.store import FeatureStore
from tracmod.gradients.capture import FrozenParametersWarning, select_layers
from tracmod.subnetworks.head_mask import masked
from tracmod.validation.gradients import autograd_gradients, check_gradients

EXAMPLES = ragged_examples(7)
# A selection -> whether the full name of a parameter of BERT is in it, written out by itself.
SELECTIONS = {
    ("*.query", "*.value"): lambda name: ".query." in name or ".value." in name,
    ("bert.encoder.layer.1",): lambda name: name.startswith("bert.encoder.layer.1."),
    ("*.LayerNorm.bias", "*.key.weight"): lambda name: name.endswith(
        ("LayerNorm.bias", "key.weight")
    ),
    ("classifier", "bert.embeddings.word_embeddings.weight"): lambda name: (
        name.startswith("classifier") or "word_embeddings" in name
    ),
    ("*.layer.[0-1].output.dense",): lambda name: (
        name.endswith(("output.dense.weight", "output.dense.bias")) and "attention" not in name
        and "pooler" not in name
    ),
    ("*",): lambda name: True,
}  # fmt: skip


def linear(model):
    """A function that selects all parameters of linear layers."""
    modules = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return lambda name: name.rpartition(".")[0] in modules


def gradients(model, names, mask=None):
    """Return (N, P) gradients of float64 autograd, of these parameters only."""
    double = copy.deepcopy(model).double()
    with masked(double, mask):
        return torch.stack(
            [
                torch.cat([g.flatten() for g in autograd_gradients(double, one, names).values()])
                for one in EXAMPLES
            ]
        )


def assert_equal_to_autograd(model, parameters, names, mask=None):
    gradients_NP = gradients(model, names, mask)
    products_NN = gradients_NP @ gradients_NP.T
    scale = products_NN.abs().max()
    exact = tm.exact_influence(model, EXAMPLES, EXAMPLES, parameters, mask)
    assert (exact - products_NN).abs().max() < 1e-5 * scale
    features = tm.collect_features(model, EXAMPLES, tm.Projection(20_000), parameters, mask)
    scores = tm.influence_scores(features, features)
    assert (scores - products_NN).abs().max() < 0.1 * scale
    # With a slot for every layer there is a number for every parameter, and no projection error.
    if not any("embeddings" in name for name in names):
        whole = tm.Projection(40_000, layers="concatenate")
        features = tm.collect_features(model, EXAMPLES, whole, parameters, mask)
        scores = tm.influence_scores(features, features)
        assert (scores - products_NN).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("patterns", SELECTIONS, ids=" ".join)
@pytest.mark.parametrize("is_masked", [False, True])
def test_gradients_are_those_of_the_selected_parameters(patterns, is_masked):
    model = tiny_encoder("bert")
    mask = tm.HeadMask.from_array([[1, 0, 1], [0, 1, 1]]) if is_masked else None
    names = [name for name, _ in model.named_parameters() if SELECTIONS[patterns](name)]
    assert_equal_to_autograd(model, list(patterns), names, mask)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_function_selects_all_linear_layers(family):
    model = tiny_encoder(family)
    selection = linear(model)
    names = [name for name, _ in model.named_parameters() if selection(name)]
    kinds = {layer.kind for layer in select_layers(model, selection)}
    assert kinds == {"linear"}
    assert_equal_to_autograd(model, selection, names)


def test_metrics_blocks_and_checks_take_selections():
    model, patterns = tiny_encoder("bert"), ["*.attention", "classifier"]
    names = [n for n, _ in model.named_parameters() if "attention" in n or "classifier" in n]
    gradients_NP = gradients(model, names)
    assert all(error.passed for error in check_gradients(model, EXAMPLES, patterns))
    sides = {"en": EXAMPLES}
    table = tm.block_influence(model, sides, sides, parameters=patterns)
    mean_product = float(gradients_NP.mean(dim=0).square().sum())
    assert sum(table["influence"].to_pylist()) == pytest.approx(mean_product, rel=1e-4)
    moments = {name: torch.rand(p.shape) + 0.1 for name, p in model.named_parameters()}
    adam = tm.adam_preconditioner(model, moments, patterns)
    scores = tm.exact_influence(model, EXAMPLES, EXAMPLES, patterns, preconditioner=adam)
    metric_P = torch.cat([1 / (moments[name].double().sqrt() + 1e-8).flatten() for name in names])
    expected_NN = (gradients_NP * metric_P) @ gradients_NP.T
    assert (scores - expected_NN).abs().max() < 1e-4 * expected_NN.abs().max()
    fitted = tm.fit_ekfac(model, EXAMPLES, patterns, labels="given")
    with pytest.raises(ValueError, match="other parameters"):
        tm.exact_influence(model, EXAMPLES, EXAMPLES, "encoder", preconditioner=fitted)


def test_frozen_parameters_of_a_selection_are_left_out_with_a_warning():
    model = tiny_encoder("bert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer.1" in name)
    names = [f"bert.encoder.layer.1.attention.self.query.{part}" for part in ("weight", "bias")]
    with pytest.warns(FrozenParametersWarning, match=r"^2 frozen parameters.*layer.0.*query"):
        scores = tm.exact_influence(model, EXAMPLES, EXAMPLES, ["*.query"])
    products_NN = gradients(model, names) @ gradients(model, names).T
    assert (scores - products_NN).abs().max() < 1e-5 * products_NN.abs().max()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tm.exact_influence(model, EXAMPLES, EXAMPLES, ["*.layer.1.*.query"])
        included = tm.exact_influence(model, EXAMPLES, EXAMPLES, ["*.query"], include_frozen=True)
    names = [name for name, _ in model.named_parameters() if ".query." in name]
    products_NN = gradients(model, names) @ gradients(model, names).T
    assert (included - products_NN).abs().max() < 1e-5 * products_NN.abs().max()
    with (
        pytest.warns(FrozenParametersWarning),
        pytest.raises(ValueError, match=r"'classifier'.*requires_grad=False"),
    ):
        tm.exact_influence(model, EXAMPLES, EXAMPLES, ["classifier"])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (["*.qury"], r"'\*\.qury' matches none.*\.query"),
        (["*.query", "bert.encoder.layer.7"], r"'bert\.encoder\.layer\.7'.*layer\.[01]"),
        (["encodr"], r"'encodr'.*bert\.encoder"),
        ([""], r"expected one of encoder.*\[''\]"),
        ([], r"expected one of encoder.*\[\]"),
        ("*.query", r"expected one of encoder.*'\*\.query'"),
        (lambda name: False, r"function.*none of the 41.*word_embeddings"),
    ],
)  # fmt: skip
def test_a_selection_of_nothing_is_refused(parameters, message):
    model = tiny_encoder("bert")
    for run in (
        lambda: tm.collect_features(model, EXAMPLES, tm.Projection(64), parameters),
        lambda: tm.exact_influence(model, EXAMPLES, EXAMPLES, parameters),
        lambda: tm.fit_ekfac(model, EXAMPLES, parameters),
        lambda: check_gradients(model, EXAMPLES, parameters),
    ):
        with pytest.raises(ValueError, match=r"^parameters: .*" + message):
            run()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection")
    return {
        "model": save_model(folder / "model"),
        "train": write_examples(folder / "train.tsv", 9),
        "query": write_examples(folder / "query.tsv", 3),
    }


def invoke(files, out, *options, code=0):
    arguments = [x for name, path in files.items() for x in (f"--{name}", path)]
    command = ["attribute", *arguments, "--out", out, "-k", 9, "--projection-dim", 512, *options]
    result = CliRunner().invoke(main, [str(argument) for argument in command])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_attributions_record_their_selection_and_are_not_mixed(files, tmp_path):
    out = tmp_path / "out"
    invoke(files, out, "--parameters", "*.value,*.query")
    record = json.loads((out / "run.json").read_text())
    assert record["arguments"]["parameters"] == ["*.value", "*.query"]
    store = FeatureStore.open(out / "features/checkpoint-1/train")
    assert store.identity["parameters"] == ["*.query", "*.value"]
    before = store.read(0, 9).clone()
    invoke(files, out, "--parameters", "*.query,*.value")  # the order does not matter
    assert torch.equal(before, FeatureStore.open(store.path).read(0, 9))
    for other in ("*.query", "attention", "encoder"):
        assert "parameters" in invoke(files, out, "--parameters", other, code=2)
    message = invoke(files, tmp_path / "none", "--parameters", "*.qury", code=2)
    assert message.count("\n") == 1
    assert "'*.qury'" in message
    assert not (tmp_path / "none" / "features").exists()
    assert tm.Attributor(out).query("the cat sleeps", k=2)["proponents"]


def test_a_function_is_recorded_by_the_names_that_it_chooses(files, tmp_path):
    options = {
        **{name: files[name] for name in ("train", "query")},
        "model": str(files["model"]), "projection_dim": 512, "k": 9,
    }  # fmt: skip
    attribute(
        AttributionOptions(**options, out=tmp_path / "f", parameters=lambda n: ".query." in n)
    )
    attribute(AttributionOptions(**options, out=tmp_path / "p", parameters=["*.query"]))
    stores = [FeatureStore.open(tmp_path / x / "features/checkpoint-1/train") for x in "fp"]
    assert torch.equal(stores[0].read(0, 9), stores[1].read(0, 9))
    chosen = stores[0].identity["parameters"]
    assert len(chosen) == 4
    assert all(fnmatchcase(name, "*.query.*") for name in chosen)
    assert tm.Attributor(tmp_path / "f").query("the cat sleeps", k=2)["opponents"]
