"""The fidelity certificate: its numbers, its warning about bad projections, its repeatability."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from made_checkpoints import save_checkpoints, write_examples
from scipy.stats import spearmanr
from tiny_study import files_of, tiny_config

import tracmod as tm
from tracmod.attribution.query import Attributor
from tracmod.cli import main
from tracmod.models.checkpoints import load_checkpoints
from tracmod.models.inputs import encode
from tracmod.models.loading import load_model
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder
from tracmod.tasks.files import read_model_files
from tracmod.validation import fidelity
from tracmod.validation.fidelity import DIMS, Terms, certify, choose_dim, draw_sample, failure

STATISTICS = ("spearman", "pearson", "top_k_overlap", "rmse", "share_error_mean",
              "share_error_largest")  # fmt: skip
WRITTEN = ("influence/fidelity.parquet", "analysis/fidelity.json")


def by_hand(exact, projected, query_languages, train_languages, k):
    """Compute every statistic in plain loops."""
    exact, projected = np.asarray(exact, np.float64), np.asarray(projected, np.float64)
    rows = list(zip(exact, projected, strict=True))
    cells = {}
    overlaps = []
    for (a, b), language in zip(rows, query_languages, strict=True):
        for sign in (1, -1):
            tops = [np.argsort(-sign * scores, kind="stable")[:k].tolist() for scores in (a, b)]
            overlaps.append(len(set(tops[0]) & set(tops[1])) / k)
            for train in set(train_languages):
                shares = [np.mean([train_languages[n] == train for n in top]) for top in tops]
                cells.setdefault((language, sign, train), []).append(shares[1] - shares[0])
    errors = [abs(np.mean(differences)) for differences in cells.values()]
    return {
        "spearman": np.mean([spearmanr(a, b).statistic for a, b in rows]),
        "pearson": np.mean([np.corrcoef(a, b)[0, 1] for a, b in rows]),
        "top_k_overlap": np.mean(overlaps),
        "rmse": np.sqrt(np.mean((exact - projected) ** 2)),
        "share_error_mean": np.mean(errors),
        "share_error_largest": np.max(errors),
    }


def check(certificate, expected):
    for name in STATISTICS:
        statistic = certificate[name]
        assert statistic["value"] == pytest.approx(expected[name], rel=1e-4, abs=1e-9), name
        assert statistic["low"] <= statistic["value"] <= statistic["high"], name


def config(least_spearman):
    return tiny_config(
        collect={"projection_dim": 1024},
        influence={"k": 5, "certify": {"least_spearman": least_spearman}},
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished study."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("fidelity") / "run"
    run_stages(RunFolder(folder, config(least_spearman=0.9)))
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two checkpoints and example files, for attributions."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("attribution")
    save_checkpoints(folder)
    write_examples(folder / "train.tsv", 40)
    write_examples(folder / "query.tsv", 5)
    return folder


@pytest.fixture
def own(inputs, tmp_path):
    shutil.copytree(inputs, tmp_path / "own")
    return tmp_path / "own"


def command(folder, *options):
    """Run `tracmod attribute` in a folder of `inputs`."""
    checkpoints = [f"--checkpoint={folder / name}" for name in ("checkpoint-1", "checkpoint-2")]
    arguments = ["attribute", "--model", folder / "model", *checkpoints, "--train",
                 folder / "train.tsv", "--query", folder / "query.tsv", "--out",
                 folder / "out", *options]  # fmt: skip
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# --- its numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["full", "sparse"])
def test_the_certificate_of_a_study_agrees_with_a_computation_by_hand(done, model):
    """From the checkpoints, the data and the stored features alone."""
    tables = {
        split: pq.read_table(done / "data" / f"{split}.parquet") for split in ("train", "test")
    }
    written = pq.read_table(done / WRITTEN[0]).to_pandas()
    written = written[written.model == model]
    ids = {split: tables[split].column("id").to_pylist() for split in tables}
    rows = {
        split: [ids[split].index(name) for name in dict.fromkeys(written[f"{split}_id"])]
        for split in ids
    }
    exact = projected = 0
    for checkpoint in load_checkpoints(done / f"models/{model}/checkpoint-{e}" for e in (1, 2)):
        network, tokenizer = load_model(checkpoint.path)
        encoded = {s: encode(tokenizer, tables[s].take(rows[s]), 48) for s in ids}
        rate = checkpoint.learning_rate
        exact += rate * tm.exact_influence(
            network, encoded["train"], encoded["test"], normalize="cosine"
        )
        features = {s: tm.collect_features(network, encoded[s], tm.Projection(1024)) for s in ids}
        projected += rate * tm.influence_scores(
            features["test"], features["train"], normalize="cosine"
        )
    shape = exact.shape
    np.testing.assert_allclose(written.exact.to_numpy().reshape(shape), exact, atol=1e-8)
    np.testing.assert_allclose(written.projected.to_numpy().reshape(shape), projected, atol=1e-8)
    languages = {s: [tables[s]["language"][row].as_py() for row in rows[s]] for s in ids}
    certificate = json.loads((done / WRITTEN[1]).read_text())[model]
    k = round(5 * shape[1] / 36)
    assert (certificate["queries"], certificate["train"], certificate["k"]) == (*shape, k)
    stored = [written[name].to_numpy().reshape(shape) for name in ("exact", "projected")]
    check(certificate, by_hand(*stored, languages["test"], languages["train"], k))
    assert json.loads((done / "run.json").read_text())["fidelity"][model] == certificate


def test_the_certificate_of_an_attribution_is_under_its_head_mask(own):
    tm.HeadMask.from_array([[1, 0, 1], [0, 1, 1]]).save(own / "mask.json")
    result = command(own, "--projection-dim", 96, "--head-mask", own / "mask.json", "-k", 12)
    assert result.exit_code == 0, result.output
    record = json.loads((own / "out/run.json").read_text())
    names = record["label_names"]
    query, train = read_model_files([own / "query.tsv", own / "train.tsv"], names)
    sample = draw_sample(query["language"].to_pylist(), len(train), len(train) + len(query), 0)
    query, train = query.take(sample.queries), train.take(sample.trains)
    mask, exact, projected = tm.HeadMask.load(own / "mask.json"), 0, 0
    for name, rate in (("checkpoint-1", 0.5), ("checkpoint-2", 0.25)):
        model, tokenizer = load_model(own / name)
        max_length = record["arguments"]["max_length"] or 40
        encoded = [encode(tokenizer, table, max_length, num_labels=3) for table in (query, train)]
        exact += rate * tm.exact_influence(model, encoded[1], encoded[0], head_mask=mask,
                                           normalize="cosine")  # fmt: skip
        rows = [tm.collect_features(model, examples, tm.Projection(96), head_mask=mask)
                for examples in encoded]  # fmt: skip
        projected += rate * tm.influence_scores(*rows, normalize="cosine")
    certificate = json.loads((own / "out/fidelity.json").read_text())
    assert certificate == record["fidelity"]
    assert (certificate["queries"], certificate["train"]) == (8, 40)
    assert certificate["k"] == 4
    check(certificate, by_hand(exact, projected, query["language"].to_pylist(),
                               train["language"].to_pylist(), 4))  # fmt: skip


def test_equal_scores_are_certified_and_opposite_ones_are_not():
    exact = torch.randn(12, 60, generator=torch.Generator().manual_seed(1))
    languages = ["en", "de", "es"] * 4, ["en", "de", "es"] * 20
    same = certify(exact, exact.clone(), *languages, Terms(100, 600))
    assert same["passed"]
    assert same["k"] == 10
    ones, zeros = ("spearman", "pearson", "top_k_overlap"), STATISTICS[3:]
    for name in (*ones, *zeros):
        ends = [same[name][end] for end in ("low", "value", "high")]
        assert ends == pytest.approx([1 if name in ones else 0] * 3)
    opposite = certify(exact, -exact, *languages, Terms(100, 600))
    assert not opposite["passed"]
    assert opposite["spearman"]["value"] == pytest.approx(-1)
    assert opposite["top_k_overlap"]["value"] == 0


def test_constant_scores_agree_only_with_constant_scores():
    """A query without a gradient: its scores are 0 in both ways."""
    exact = torch.randn(3, 20, generator=torch.Generator().manual_seed(2))
    exact[1:] = 0
    projected = exact.clone()
    projected[2] = torch.arange(20.0)
    certificate = certify(exact, projected, ["en"] * 3, ["en", "de"] * 10, Terms(5, 20))
    assert certificate["spearman"]["value"] == pytest.approx(2 / 3)
    assert certificate["pearson"]["value"] == pytest.approx(2 / 3)


def test_the_interval_covers_the_mean_over_all_queries():
    """Of 200 draws of 20 queries, near 95% of the intervals hold the mean over all queries."""
    draw = torch.Generator().manual_seed(3)
    exact = torch.randn(4000, 40, generator=draw)
    projected = exact + torch.rand(4000, 1, generator=draw) * torch.randn(4000, 40, generator=draw)
    languages = ["en"] * 20, ["en", "de"] * 20
    whole = certify(exact, projected, ["en"] * 4000, languages[1], Terms(5, 40, bootstrap=10))
    covered = 0
    for start in range(0, 4000, 20):
        part = slice(start, start + 20)
        terms = Terms(5, 40, bootstrap=200, seed=start)
        interval = certify(exact[part], projected[part], *languages, terms)["spearman"]
        covered += interval["low"] <= whole["spearman"]["value"] <= interval["high"]
    assert 0.86 <= covered / 200 <= 0.99


# --- the sample -----------------------------------------------------------------------------


def test_the_sample_has_as_many_queries_of_each_language_and_repeats_by_seed():
    languages = ["en"] * 90 + ["de"] * 9 + ["es"] * 3
    sample = draw_sample(languages, 5000, 100_000, seed=4)
    drawn = [languages[row] for row in sample.queries]
    counts = [drawn.count(language) for language in ("en", "de", "es")]
    assert counts in ([9, 8, 3], [8, 9, 3])
    assert len(sample.trains) == len(set(sample.trains)) == 200
    assert sample.trains == sorted(sample.trains)
    assert sample == draw_sample(languages, 5000, 100_000, seed=4)
    assert sample != draw_sample(languages, 5000, 100_000, seed=5)


@pytest.mark.parametrize(
    ("passes", "size"), [(100_000, (20, 200)), (4400, (10, 100)), (100, (8, 40)), (8800, (20, 200))]
)
def test_a_small_run_has_a_small_sample(passes, size):
    sample = draw_sample(["en"] * 50, 300, passes, seed=0)
    assert (len(sample.queries), len(sample.trains)) == size


def test_a_sample_without_a_budget_is_not_reduced():
    sample = draw_sample(["en"] * 50, 300, None, 0, 30, 250)
    assert (len(sample.queries), len(sample.trains)) == (30, 250)


def test_a_sample_is_no_larger_than_the_data():
    sample = draw_sample(["en"] * 2, 3, 100_000, seed=0)
    assert (sample.queries, sample.trains) == ([0, 1], [0, 1, 2])


# --- its warning about bad projections -------------------------------------------------------


def test_a_tiny_projection_gets_a_warning(own):
    result = command(own, "--projection-dim", 2)
    assert result.exit_code == 0, result.output
    warning = r"WARNING: fidelity of these features.*\b0\.95\b.*projection_dim"
    assert re.search(warning, result.stderr)
    record = json.loads((own / "out/run.json").read_text())
    assert record["fidelity"]["passed"] is False
    assert record["fidelity"]["spearman"]["value"] < 0.9


def test_a_large_projection_gets_no_warning(own):
    result = command(own, "--projection-dim", 8192)
    assert "WARNING" not in result.stderr
    assert json.loads((own / "out/run.json").read_text())["fidelity"]["passed"] is True


def test_a_study_below_the_threshold_warns_on_stderr_in_run_json_and_in_the_report(
    done, tmp_path, capsys
):
    assert "Fidelity too low" not in (done / "report/index.html").read_text()
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    run_stages(RunFolder(folder, config(least_spearman=1)))
    stderr = capsys.readouterr().err
    for model in ("full", "sparse"):
        assert f"WARNING: fidelity of the {model} model" in stderr
        assert json.loads((folder / "run.json").read_text())["fidelity"][model]["passed"] is False
    html = (folder / "report/index.html").read_text()
    assert html.count('<p class="alarm" role="alert">Fidelity too low: ') == 2
    assert 'id="fidelity"' in html
    before, after = (json.loads((run / WRITTEN[1]).read_text()) for run in (done, folder))
    assert before["full"]["spearman"] == after["full"]["spearman"]


def test_a_certificate_that_is_passed_has_no_warning(done):
    for certificate in json.loads((done / WRITTEN[1]).read_text()).values():
        assert (failure(certificate, "it") == "") == certificate["passed"]


# --- its repeatability ------------------------------------------------------------------------


def stop_at(monkeypatch, number):
    """`exact_influence` raises at its n-th call; the list of calls."""
    real, calls = fidelity.exact_influence, []

    def counted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(fidelity, "exact_influence", counted)
    return calls


def test_a_study_interrupted_in_the_certificate_resumes_to_the_same(done, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    calls = stop_at(monkeypatch, 4)
    run = RunFolder(folder)
    with pytest.raises(KeyboardInterrupt):
        run_stages(run, ["influence"], again="influence")
    assert len(calls) == 4  # full's two checkpoints, sparse's first, and the one that is stopped
    run_stages(RunFolder(folder), ["influence", "analyze", "report"], again="influence")
    assert len(calls) == 5
    assert files_of(folder, *WRITTEN) == files_of(done, *WRITTEN)
    assert not (folder / "influence/progress").exists()


def test_a_run_that_takes_over_an_analysis_has_its_certificate_in_run_json(done, tmp_path):
    run = RunFolder(tmp_path / "run", config(least_spearman=0.9))
    run_stages(run, donors=[RunFolder(done)])
    assert run.record["stages"]["analyze"]["taken_from"] == "run"
    assert run.record["fidelity"] == json.loads((done / WRITTEN[1]).read_text())


def test_a_run_scored_before_there_were_certificates_has_none(done, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    (folder / WRITTEN[0]).unlink()
    run_stages(RunFolder(folder), ["analyze", "report"], again="analyze")
    run_stages(RunFolder(folder), ["report"], again="report")
    assert not (folder / WRITTEN[1]).exists()
    assert "fidelity" not in json.loads((folder / "run.json").read_text())
    assert 'id="fidelity"' not in (folder / "report/index.html").read_text()


def test_damaged_saved_scores_are_computed_again(done, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    stop_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        run_stages(RunFolder(folder), ["influence"], again="influence")
    saved = sorted((folder / "influence/progress").glob("certificate-*"))
    assert len(saved) == 3
    data = bytearray(saved[0].read_bytes())
    data[-3] ^= 1
    saved[0].write_bytes(data)
    saved[1].write_bytes(b"")
    run_stages(RunFolder(folder), ["influence", "analyze"], again="influence")
    assert files_of(folder, *WRITTEN) == files_of(done, *WRITTEN)


def test_a_repeated_and_an_interrupted_attribution_write_the_same(own, monkeypatch):
    assert command(own, "--projection-dim", 96).exit_code == 0
    first = (own / "out/fidelity.json").read_bytes()
    assert command(own, "--projection-dim", 96).exit_code == 0
    assert (own / "out/fidelity.json").read_bytes() == first
    shutil.rmtree(own / "out")
    calls = stop_at(monkeypatch, 2)
    assert command(own, "--projection-dim", 96).exit_code == 130
    assert command(own, "--projection-dim", 96).exit_code == 0
    assert len(calls) == 3  # the first checkpoint's is not made twice
    assert (own / "out/fidelity.json").read_bytes() == first
    assert not (own / "out/progress").exists()


# --- the size of the projection, chosen by the certificate ------------------------------------


def test_the_smallest_projection_with_a_small_enough_error_is_chosen():
    exact = torch.randn(20, 100, generator=torch.Generator().manual_seed(5))
    dims = []

    def scores_at(dim):
        dims.append(dim)
        noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(dim))
        return exact + noise * (512 / dim) ** 2

    def certified(scores):
        return certify(exact, scores, ["en", "de"] * 10, ["en", "de"] * 50, Terms(10, 100))

    choice = choose_dim(scores_at, certified, 0.03)
    highs = [certificate["share_error_mean"]["high"] for certificate in choice["tried"]]
    assert choice["enough"]
    assert choice["projection_dim"] == dims[-1] == DIMS[len(dims) - 1]
    assert 512 < dims[-1] < 16384
    assert highs[-1] < 0.03 <= min(highs[:-1])
    assert choose_dim(scores_at, certified, 0.03) == choice


AUTO = ("--projection-dim", "auto", "--share-error", 0.05, "-k", 12)


def test_an_attribution_chooses_its_projection_once(own, monkeypatch):
    result = command(own, *AUTO)
    assert result.exit_code == 0, result.output
    record = json.loads((own / "out/run.json").read_text())
    choice = record["projection_choice"]
    dim = choice["projection_dim"]
    assert choice["enough"]
    assert re.search(rf"projection_dim {dim}\b.* 0\.05 ", result.stderr)
    assert record["arguments"]["projection_dim"] == dim
    stores = [tm.FeatureStore.open(path.parent) for path in own.glob("out/**/manifest.json")]
    assert {store.dim for store in stores} == {dim}
    # So few examples are the sample, all of them: the errors are those of the stored features.
    query, train = read_model_files([own / "query.tsv", own / "train.tsv"], record["label_names"])
    exact = projected = 0
    for number, rate in ((1, 0.5), (2, 0.25)):
        model, tokenizer = load_model(own / f"checkpoint-{number}")
        encoded = [encode(tokenizer, table, 40, num_labels=3) for table in (train, query)]
        exact += rate * tm.exact_influence(model, *encoded, normalize="cosine")
        features = [
            tm.FeatureStore.open(own / f"out/features/checkpoint-{number}/{split}").read()
            for split in ("query", "train")
        ]
        projected += rate * tm.influence_scores(*features, normalize="cosine")
    languages = [table["language"].to_pylist() for table in (query, train)]
    expected = by_hand(exact, projected, *languages, 12)
    for name in ("share_error_mean", "spearman"):
        assert choice["tried"][-1][name]["value"] == pytest.approx(expected[name], rel=1e-4)
    assert len(Attributor(own / "out").train_stores) == 2
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "DIMS", (32,))  # a new choice would be another
        assert command(own, *AUTO).exit_code == 0
    assert json.loads((own / "out/run.json").read_text())["projection_choice"] == choice
    refused = command(own, *AUTO[:2], "--share-error", 0.01)
    assert refused.exit_code == 2
    assert re.search(r"share_error.*0\.01.*0\.05", refused.output)
    refused = command(own, *AUTO, "--normalize", "none")
    assert refused.exit_code == 2
    assert re.search(r"normalize.*null", refused.output)


def test_an_interrupted_choice_is_the_same_when_it_is_repeated(own, monkeypatch):
    import tracmod.attribution.fidelity as module

    assert command(own, *AUTO).exit_code == 0
    first = files_of(own / "out", "*.json", "*.parquet")
    shutil.rmtree(own / "out")
    real, calls = module.collect_features, []

    def counted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(module, "collect_features", counted)
    exact = stop_at(monkeypatch, 1000)
    assert command(own, *AUTO).exit_code == 130
    assert not (own / "out/projection.json").exists()
    assert command(own, *AUTO).exit_code == 0
    assert len(exact) == 2 + 2  # of both samples at both checkpoints, each made once
    second = files_of(own / "out", "*.json", "*.parquet")
    assert second.keys() == first.keys()
    assert {name for name in first if first[name] != second[name]} <= {"run.json"}  # its seconds


def test_a_bound_that_no_projection_meets_is_reported(own, monkeypatch):
    monkeypatch.setattr(fidelity, "DIMS", (2, 4))
    result = command(own, "--projection-dim", "auto", "--share-error", 0.0001)
    assert result.exit_code == 0, result.output
    assert re.search(r"projection_dim 4\b.* 0\.0001 ", result.stderr)
    assert json.loads((own / "out/run.json").read_text())["projection_choice"]["enough"] is False


def test_another_word_than_auto_is_refused(own):
    result = command(own, "--projection-dim", "large")
    assert result.exit_code == 2
    assert re.search(r"projection-dim.*auto.*'large'", result.output)
