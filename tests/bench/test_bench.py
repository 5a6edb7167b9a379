"""The benchmarks: every case is correct, every part runs, and incorrect results are named."""

from __future__ import annotations

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner

import tracmod as tm
from tracmod.bench import (
    bench_index,
    bench_kernels,
    bench_preconditioner,
    bench_scale,
    bench_waiting,
    collect,
    fidelity,
    job,
    models,
    plain,
    predict,
    report,
)
from tracmod.bench.cases import (
    KINDS,
    SLOTS,
    ElementSize,
    ProjectSize,
    Spec,
    cases,
    headline_specs,
    specs,
)
from tracmod.bench.collect import WrongResult
from tracmod.bench.measure import agreement, environment
from tracmod.cli import main
from tracmod.gradients.capture import select_layers

CPU = torch.device("cpu")
SMALL = {
    "name": "bench",
    "task": models.TRAINED["task"]
    | {"languages": ["en", "de"], "train_per_language": 24, "dev_per_language": 6,
       "test_per_language": 6},
    "model": {"layers": 2, "hidden": 32, "heads": 4, "vocabulary": 300, "max_length": 64},
    "finetune": {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    models.make_trained(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def tiny():
    return models.random_model("tiny"), models.random_examples(14)


# --- the ops --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_case_that_is_timed_is_correct(device, dtype):
    torch.manual_seed(0)
    rows = [bench_kernels.check(case, dtype) for case in cases(device, dtype, rows=3)]
    ops = {f"project_gradients {kind}" for kind in (*KINDS, *dict(SLOTS))}
    assert ops | {"gradient_dot", "quantize_rows", "top_k_dot"} <= {row["op"] for row in rows}
    assert not [row for row in rows if not row["right"]]


def test_a_large_batch_is_checked_in_blocks_of_examples(monkeypatch):
    monkeypatch.setattr("tracmod.bench.cases.FORMED_NUMBERS", 1)
    for kind, size in (SLOTS[3], SLOTS[9]):
        case = Spec(f"project_gradients {kind}", size._replace(batch=3)).case(CPU, torch.float32)
        assert bench_kernels.check(case, torch.float32)["right"]


@pytest.mark.parametrize("shape", ["mini", "base"])
def test_the_slots_that_are_timed_are_those_of_a_default_projection(shape):
    with torch.device("meta"):
        layers = select_layers(models.random_model(shape), "all")
    needed = set()
    for dim in (4096, 8192):
        slots = tm.Projection(dim).slots(layers)
        for layer in layers:
            slot, linear = slots[layer.name], layer.kind == "linear"
            width = layer.out_features if layer.kind == "embedding" else layer.in_features
            needed.add((
                slot.kind if linear else layer.kind, width, layer.out_features if linear else 0,
                (slot.k_out, slot.k_in), slot.rows, layer.few_tokens,
            ))  # fmt: skip
    hidden, timed = models.SHAPES[shape]["hidden_size"], set()
    for kind, size in SLOTS:
        if isinstance(size, ElementSize):
            timed.add((kind, size.width, 0, size.k, 0, False))
        else:
            few = size.tokens == 1
            timed |= {(kind, size.size_in, out, size.k, size.rows, few) for out in size.outs}
    own = {case for case in timed if case[1] in (hidden, 4 * hidden)}
    assert own <= needed
    assert {(case[0], case[4:]) for case in own} == {(case[0], case[4:]) for case in needed}
    dims = {case[3] for case in own if case[0] == "sketch"}
    assert dims == {case[3] for case in needed if case[0] == "sketch"}  # both dims


def test_a_table_has_limits_shares_and_the_environment(tmp_path, capsys):
    file = tmp_path / "kernels.json"
    assert bench_kernels.run_bench("cpu", "float32", file, selection="short", seconds=0.01, rows=2)
    result = json.loads(file.read_text())
    assert result["environment"].keys() >= {"device", "threads", "commit", "torch", "build"}
    assert {row["op"].split()[0] for row in result["cases"]} == {
        "project_gradients", "linear", "gradient_dot", "quantize_rows", "top_k_dot",
    }  # fmt: skip
    for row in result["cases"]:
        assert row["share_of_limit"] > 0
        assert row["bound_by"] in ("bytes", "operations")
        assert row["times_plain"] == row["plain_seconds"] / row["native_seconds"]
    assert "Speed-up over plain torch" in "\n".join(report.section(result))
    assert len(capsys.readouterr().out.splitlines()) == len(result["cases"]) + 3


@pytest.mark.parametrize("op", ["project_gradients", "gradient_dot", "quantize_rows", "top_k_dot"])
def test_an_incorrect_op_is_marked_and_timed(monkeypatch, op, capsys):
    right = getattr(tm.kernels, op)

    def wrong(*args, **named):
        result = right(*args, **named)
        if result is None:
            out = named["out"] if "out" in named else args[4]
            out[0, 0] += 1e-3 * out.abs().max()
            return None
        if op == "quantize_rows":
            return result._replace(codes=result.codes.roll(1, dims=1))
        return result._replace(indices=result.indices.roll(1, dims=1))

    monkeypatch.setattr(tm.kernels, op, wrong)
    monkeypatch.setattr(bench_kernels, "write_json", lambda _, result: written.append(result))
    written = []
    assert not bench_kernels.run_bench("cpu", "float32", None, selection="short", seconds=0, rows=2)
    assert len(written) == len(written[-1]["cases"])  # the file is written after every case
    for row in written[-1]["cases"]:
        assert row["right"] == (not row["op"].startswith(op))
        assert row["native_seconds"] > 0
    assert "WRONG" in capsys.readouterr().out
    assert "wrong result" in "\n".join(report.section(written[-1]))


def test_a_case_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    def fails(*args, **named):
        raise ValueError("no such thing")

    monkeypatch.setattr(tm.kernels, "gradient_dot", fails)
    assert not bench_kernels.run_bench("cpu", "float32", None, selection="short", seconds=0, rows=2)
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED: no such thing" in "\n".join(lines)
    assert "top_k_dot" in lines[-1]
    assert "FAILED" not in lines[-1]


def test_the_headline_of_a_gpu_comes_first_and_every_gpu_case_has_a_current_prediction():
    for name, dtype in predict.DTYPES.items():
        listed, headline = specs(True, dtype), headline_specs(dtype)
        assert listed[: len(headline)] == headline
        assert len(set(map(str, listed))) == len(listed)
        assert predict.predictions(name).keys() == {f"{s.op}, {s.size}" for s in listed}
    stored = json.loads(predict.FILE.read_text(encoding="utf-8"))
    assert stored == predict.all_predictions(), "run `python bench/predict.py`"
    for by_name in stored.values():
        assert all(0 < case["limit_seconds"] < case["seconds"] for case in by_name.values())


def test_predictions_stand_beside_what_a_gpu_measured(tmp_path):
    name, case = next(iter(predict.predictions("bfloat16").items()))
    result = {
        "part": "predictions", "predicted": {"bfloat16": {name: case}},
        "measured": {"bfloat16": {name: {"native_seconds": 0.0123, "share_of_limit": 0.45}}},
    }  # fmt: skip
    assert "| 12.3 | 45% |" in report.section(result)[-1]
    result["measured"]["bfloat16"][name]["share_of_limit"] = 0.0045
    assert "| 12.3 | 0.45% |" in report.section(result)[-1]
    result["measured"] = {}
    assert "|  |  |" in report.section(result)[-1]


def test_only_one_op_is_checked_without_times(tmp_path):
    file = tmp_path / "checks.json"
    assert bench_kernels.run_bench("cpu", "bfloat16", file, op="gradient_dot", seconds=None, rows=2)
    result = json.loads(file.read_text())
    assert {row["op"] for row in result["cases"]} == {"gradient_dot"}
    assert not any("native_seconds" in row for row in result["cases"])


def test_the_command_runs_the_short_form(monkeypatch, tmp_path):
    def one_case(gpu, dtype, *, short, rows):
        assert short
        return [Spec("project_gradients sjlt", ProjectSize(2, 3, 8, (8,), (4, 4)))]

    monkeypatch.setattr(bench_kernels, "specs", one_case)
    file = tmp_path / "bench.json"
    done = CliRunner().invoke(main, ["bench", "--dtype", "bfloat16", "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "of limit" in done.output
    assert json.loads(file.read_text())["dtype"] == "bfloat16"
    monkeypatch.setattr(bench_kernels, "FLOOR", -1.0)
    done = CliRunner().invoke(main, ["bench"])
    assert done.exit_code == 1
    assert "a result is wrong" in done.output


# --- baselines ------------------------------------------------------------------------------


def test_naive_tracin_agrees_with_exact_influence(tiny):
    model, examples = tiny
    naive = plain.naive_scores(model, examples[4:], examples[:4], CPU)
    exact = tm.exact_influence(model, examples[4:], examples[:4], normalize="cosine")
    torch.testing.assert_close(naive.scores_QN, exact, rtol=0, atol=1e-4)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("form", [{"dim": 500}, {"grid": 8}])
def test_hooked_features_are_correct_in_expectation(tiny, form):
    model, examples = tiny
    batches = plain.ready_batches(model, examples[:5], 256, CPU)
    linear = "dim" not in form  # grids of single layers leave LayerNorm out
    gradients = torch.stack([
        torch.cat([g.flatten() for name, g in one.items() if not (linear and "LayerNorm" in name)])
        for one in collect.whole_gradients(model, examples[:5])
    ])  # fmt: skip
    draws = []
    for seed in range(60):
        features = plain.HookedFeatures(model, seed=seed, **form).features(batches)
        draws.append((features @ features.T).double())
    draws = torch.stack(draws)
    standard_error = draws.std(dim=0) / len(draws) ** 0.5
    assert (
        (draws.mean(dim=0) - gradients @ gradients.T).abs() <= 4.5 * standard_error + 1e-5
    ).all()


def test_hooked_features_have_the_exact_output_layer(tiny):
    model, examples = tiny
    hooks = plain.HookedFeatures(model, dim=500)
    features = hooks.features(plain.ready_batches(model, examples[:3], 256, CPU))
    for row, gradients in zip(features, collect.whole_gradients(model, examples[:3]), strict=True):
        names = [f"classifier.out_proj.{name}" for name in ("weight", "bias")]
        weight, bias = (gradients[name] for name in names)
        exact = torch.cat([weight, bias[:, None]], dim=1).flatten()
        torch.testing.assert_close(row[: len(exact)].double(), exact, rtol=1e-4, atol=1e-6)


def test_the_floor_reaches_the_embeddings(tiny, monkeypatch):
    model, examples = tiny
    seen, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, leaf: seen.extend(grad(loss, leaf)))
    batches = plain.ready_batches(model, examples, 512, CPU)
    for dtype in (None, torch.bfloat16):
        plain.floor_pass(model, batches, dtype)
    assert len(seen) == 2 * len(batches)
    assert all(gradient.shape[-1] == 32 and gradient.abs().sum() > 0 for gradient in seen)


# --- the parts ------------------------------------------------------------------------------


def test_collection_compared_with_the_floor():
    result = collect.run_collect("tiny", CPU, 14, naive=3, seconds=0.01, rounds=2)
    assert max(result["errors"][name] for name in result["errors"] if "bfloat16" not in name) < 1e-5
    assert set(result["heads_share_of_full"]) == {"heads 25%", "heads 50%", "heads 75%"}
    assert result["share_of_bfloat16_floor"].keys() >= {"sjlt bfloat16", "floor bfloat16 model"}
    assert result["naive"]["times_naive"] > 0
    assert "| floor float32 |" in "\n".join(report.section(result))


def test_incorrect_features_are_named_and_timed(monkeypatch):
    right = tm.collect_features

    def wrong(model, examples, projection, **named):
        features = right(model, examples, projection, **named)
        features[-1, :200] += 0.01 * features.abs().max()
        return features

    monkeypatch.setattr(tm, "collect_features", wrong)
    saved = []
    result = collect.run_collect(
        "tiny", CPU, 14, seconds=0.01, rounds=2, save=lambda result: saved.append(dict(result))
    )
    assert any(text.startswith("rademacher float32: features off") for text in result["wrong"])
    assert result["seconds"]["rademacher float32"] > 0
    assert len(saved) > len(result["seconds"])  # saved after every measurement
    assert "seconds" not in saved[0]


def test_an_ignored_head_mask_is_detected(monkeypatch):
    right = tm.collect_features

    def wrong(*args, head_mask=None, **named):
        return right(*args, **named)

    monkeypatch.setattr(tm, "collect_features", wrong)
    result = collect.run_collect("tiny", CPU, 14, seconds=0.01, rounds=2)
    assert [text.split(":")[0] for text in result["wrong"]] == [
        "heads 25%", "heads 50%", "heads 75%",
    ]  # fmt: skip


def test_exact_influence_is_measured_or_extrapolated(monkeypatch):
    result = collect.run_exact("tiny", CPU, 40, 20, bound=3600.0)
    assert not result["extrapolated"]
    assert result["wrong"] == []
    assert "measured" in report.section(result)[0]
    result = collect.run_exact("tiny", CPU, 40, 20, bound=0.0)
    assert result["extrapolated"]
    assert result["seconds"] == 100 * result["tenth_by_tenth_seconds"]
    right = tm.exact_influence
    monkeypatch.setattr(tm, "exact_influence", lambda *a, **n: right(*a, **n) + 1e-3)
    result = collect.run_exact("tiny", CPU, 40, 20)
    assert "a cosine is off" in result["wrong"][0]
    with pytest.raises(collect.WrongResult, match="exact influence"):
        collect.check_exact(models.random_model("tiny"), *[models.random_examples(4)] * 2)


def test_fidelity(trained):
    result = fidelity.run_fidelity(trained, CPU, 20, 6, seeds=2)
    dims = {(row["form"], row["dim"]) for row in result["table"]}
    assert ("ours, accumulate", 16384) in dims
    linear_layers = 2 * 6 + 2
    assert ("plain torch, 16x16 per layer", 256 * linear_layers) in dims
    assert all(row["bytes_per_row"] == 4 * row["dim"] for row in result["table"])
    ours = next(row for row in result["table"] if row["dim"] == 16384)
    assert ours["spearman"] > 0.95
    assert "| tracmod, accumulate | rademacher | 4,096 |" in "\n".join(report.section(result))


def test_indexes_and_compressed_rows(trained):
    kinds = ["flat", "sq8", "ivf", "hnsw"]  # ivfpq needs 256 examples
    result = bench_index.run_index(trained, [64, 128], kinds, tuning=4, seconds=0)
    assert (result["query"], result["k"], len(result["table"])) == (8, 48, 2 * (3 + len(kinds)))
    for row in result["table"]:
        numbers = row["dim"] * result["checkpoints"]
        # All 48 examples are among the 100 strongest, so that an exhaustive search finds them.
        assert row["name"] == "ivf" or min(row["recall"].values()) == 1
        assert numbers <= row["bytes"] <= 4 * numbers + 400
    assert "| 128 | int8 rows | 264 |" in "\n".join(report.section(result))


def test_recall_falls_with_incorrect_rows_and_an_incorrect_index_is_refused(trained, monkeypatch):
    monkeypatch.setattr(bench_index, "K", 5)
    result = bench_index.run_index(trained, [64], ["flat"], tuning=4, seconds=0)
    shares = {row["name"]: row["recall"]["proponents"] for row in result["table"]}
    assert shares["float32 rows"] == 1
    monkeypatch.setattr(bench_index, "_int8", torch.zeros_like)
    worse = bench_index.run_index(trained, [64], [], tuning=4, seconds=0)
    assert worse["table"][2]["recall"]["proponents"] < 0.5 < shares["int8 rows"]
    search = bench_index.InfluenceIndex.search
    monkeypatch.setattr(
        bench_index.InfluenceIndex, "search", lambda self, q, k, **n: search(self, q[::-1], k, **n)
    )
    with pytest.raises(collect.WrongResult, match="the flat index finds only"):
        bench_index.run_index(trained, [64], ["flat"], tuning=4, seconds=0)


def test_the_methods_of_the_job_agree(trained):
    loaded = models.load_trained(trained, 16, 5)
    assert sum(loaded.weights) == pytest.approx(1)
    outcomes = {name: method(loaded, CPU, None) for name, method in job.METHODS.items()}
    exact = outcomes["exact"].scores()
    for name, outcome in outcomes.items():
        scores = outcome.scores()
        job._check_ranking(name, scores, outcome.indices)
        assert outcome.seconds["whole"] >= sum(outcome.seconds.values()) / 2
        assert float((scores - exact).abs().max()) < 0.1, name
    with pytest.raises(collect.WrongResult, match="its ranking"):
        job._check_ranking("naive", exact, outcomes["exact"].indices.roll(1, 0))


def test_naive_on_a_subset_is_marked_as_extrapolated(trained):
    loaded = models.load_trained(trained, 16, 5)
    some, whole = (job.naive(loaded, CPU, subset) for subset in (4, None))
    assert some.extrapolated
    assert not whole.extrapolated
    assert some.columns == [0, 4, 8, 12]
    torch.testing.assert_close(some.scores(), whole.scores()[:, some.columns], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_every_method_of_the_job_runs_in_its_own_process(trained):
    result = job.run_job(
        trained,
        "cpu",
        ["naive", "exact", "sjlt"],
        train=16,
        query=5,
        subsets={"naive": 8, "exact": 4},
    )
    naive, sjlt = result["methods"]["naive"], result["methods"]["sjlt"]
    assert naive["measured_train"] == 8
    assert naive["agreement"]["rmse"] < 1e-4
    assert sjlt["peak_bytes"] > sjlt["base_bytes"] > 0
    assert sjlt["times_naive"] == naive["seconds"]["whole"] / sjlt["seconds"]["whole"]
    assert "extrapolated from 8" in "\n".join(report.section(result))
    missing = trained / "nothing"
    with pytest.raises(collect.WrongResult, match="no trained model"):
        job.run_job(missing, "cpu", ["naive"])


@pytest.mark.slow
def test_the_parts_for_a_gpu_machine_run_without_packages_that_it_may_lack(tmp_path):
    blocked = ["datasets", "faiss", "pydantic", "ray", "plotly", "click"]
    command = ["bench_tracin", "collect", "--shape", "tiny", "--examples", "6", "--seconds", "0"]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); "
            f"import tracmod.bench.bench_kernels; from tracmod.bench.bench_tracin import main; "
            f"sys.argv = {[*command, '--out', str(tmp_path)]!r}; main()",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "collect-tiny-cpu.json").read_text())["shape"] == "tiny"


# --- the page -------------------------------------------------------------------------------


def test_the_page_and_the_picture_are_written_from_json(tmp_path):
    (tmp_path / "results").mkdir()
    result = collect.run_collect("tiny", CPU, 8, seconds=0.01, rounds=2)
    (tmp_path / "results" / "collect.json").write_text(json.dumps(result))
    page = tmp_path / "RESULTS.md"
    page.write_text((report.FOLDER / "RESULTS.md").read_text(encoding="utf-8"), encoding="utf-8")
    report.write(tmp_path)
    once = page.read_text(encoding="utf-8")
    assert f"commit {result['environment']['commit']}" in once
    assert once.count("Not measured yet.") == len(report.PARTS) - 2  # this one and predictions
    svg = ElementTree.fromstring((tmp_path / "results" / "speed.svg").read_text())
    assert len(svg.findall("{*}rect")) == 1 + 7
    report.write(tmp_path)
    assert page.read_text(encoding="utf-8") == once
    with pytest.raises(ValueError, match="markers for job"):
        report.fill(once.replace("<!-- end job -->", ""), [])


def test_agreement_of_equal_and_opposite_scores():
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    assert agreement(scores, scores)["spearman"] == pytest.approx(1)
    assert agreement(scores, scores)["top10"] == 1
    assert agreement(-scores, scores)["spearman"] == pytest.approx(-1)
    assert agreement(-scores, scores)["top10"] == 0
    assert agreement(scores + 0.1, scores)["rmse"] == pytest.approx(0.1)


def test_an_incorrect_ranking_of_random_rows_is_detected():
    scores_QN = torch.randn(3, 300, dtype=torch.float64)
    sums_QG = torch.zeros(3, bench_scale.GROUPS, dtype=torch.float64)
    sums_QG.index_add_(1, bench_scale.groups_of(300), scores_QN)
    ranking = {"group_sums": sums_QG}
    for side, sign in (("", 1), ("opponent_", -1)):
        best = (sign * scores_QN).topk(bench_scale.K)
        ranking |= {f"{side}scores": sign * best.values, f"{side}indices": best.indices}
    bench_scale.check("right", ranking, scores_QN)
    for name in ranking:
        wrong = dict(ranking)
        wrong[name] = ranking[name].flip(1)
        with pytest.raises(collect.WrongResult, match=r"wrong: .* off by"):
            bench_scale.check("wrong", wrong, scores_QN)


def test_the_preconditioner_benchmark_checks_before_it_times(tmp_path, monkeypatch):
    options = ["--shape", "tiny", "--examples", "12", "--seconds", "0", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench_preconditioner", *options])
    bench_preconditioner.main()
    result = json.loads((tmp_path / "preconditioner-tiny-cpu.json").read_text())
    assert set(result["seconds"]) == {"plain", "adam", "ekfac"}
    shown = "\n".join(report.section(result))
    assert "| ekfac |" in shown
    monkeypatch.setattr(bench_preconditioner, "EXACT_ERROR", 0.0)
    with pytest.raises(collect.WrongResult, match=r"adam: exact scores"):
        bench_preconditioner.main()


@pytest.mark.slow
def test_the_scale_benchmark_runs_with_few_rows(tmp_path, monkeypatch):
    for options in (
        ["search", "--rows", "3000", "--dim", "64", "--queries", "9", "--rounds", "1"],
        ["store", "--examples", "8", "--shards", "9", "--gigabytes", "0.01"],
    ):
        folders = ["--folder", str(tmp_path), "--out", str(tmp_path)]
        monkeypatch.setattr("sys.argv", ["bench_scale", *options, *folders])
        bench_scale.main()
    results = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("scale-*.json"))]
    assert [result["part"] for result in results] == ["scale-search", "scale-store"]
    assert set(results[0]["methods"]) == set(bench_scale.METHODS)
    sizes = results[0]["bytes_per_example"]
    assert sizes["int8"] < 0.4 * sizes["float32"]
    shown = ["\n".join(report.section(result)) for result in results]
    assert "| tracmod int8 |" in shown[0]
    assert "Opening a store of 9 shards" in shown[1]


# --- waiting --------------------------------------------------------------------------------


def test_the_section_of_waiting_compares_with_the_default_and_with_sleeping():
    policies = ("sleep at once", bench_waiting.CHOSEN, "OpenMP's default")
    times = [dict(zip(policies, [[0.04, 0.05], [0.02, 0.04], wall], strict=True)) for wall in
             ([0.02, 0.04], [0.4, 0.5])]  # fmt: skip
    result = {
        "part": "waiting", "functions": ["ranking"], "load_before": 3.0,
        "quiet": {"ranking": times[0]}, "busy": {"ranking": times[1]},
        "environment": environment(CPU),
    }  # fmt: skip
    shown = "\n".join(report.section(result))
    assert "| ranking | tracmod's choice | 20 | 1 | 40 | 20 | 0.5 | 40 |" in shown
    assert "| ranking | OpenMP's default | 20 | 1 | 40 | 400 | 10 | 500 |" in shown
    assert "not quiet" in shown


@pytest.mark.slow
def test_waiting_is_measured_after_the_results_are_compared(monkeypatch):
    policies = ("sleep at once", bench_waiting.CHOSEN)
    monkeypatch.setattr(
        bench_waiting, "POLICIES", {name: bench_waiting.POLICIES[name] for name in policies}
    )
    result = bench_waiting.measure(threads=1, seconds=0.1)
    for half in ("quiet", "busy"):
        for function in result["functions"]:
            assert set(result[half][function]) == set(policies)
            assert all(min(times) > 0 for times in result[half][function].values())
    monkeypatch.setattr(bench_waiting, "TOLERANCE", -1.0)
    with pytest.raises(WrongResult, match="sleep at once"):
        bench_waiting.measure(threads=1, seconds=0.1)
