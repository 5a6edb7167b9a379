"""The comparison with other libraries: references, floors, checks before times, and its tables."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from tracmod.bench import bench_peers, report
from tracmod.bench.models import random_examples, random_model
from tracmod.bench.peers import data, methods, shared, use_floor, use_torch, use_tracmod, worker
from tracmod.bench.peers.exact import exact_scores

TRAIN, QUERY = random_examples(13, 1), random_examples(5, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its examples, as `prepare` leaves them."""
    folder = tmp_path_factory.mktemp("peers") / "untrained"
    random_model("tiny").save_pretrained(folder / "checkpoint-1")
    (folder / "examples.json").write_text(json.dumps({"train": TRAIN, "query": QUERY}))
    exact = exact_scores(random_model("tiny"), QUERY, TRAIN)
    save_file({name: part.contiguous() for name, part in exact.items()},
              folder / "exact.safetensors")  # fmt: skip
    return folder


@pytest.fixture
def options(folder):
    return {**bench_peers.model_options(folder, "untrained"), "check": True}


def gradient(model, example, kinds):
    """The gradient of the parameters of modules of these kinds outside the embeddings."""
    ids = torch.tensor([example["input_ids"]])
    loss = F.cross_entropy(model(ids).logits, torch.tensor([example["labels"]]))
    chosen = [
        parameter
        for name, module in model.named_modules()
        if isinstance(module, kinds) and ".embeddings." not in name
        for parameter in module.parameters()
    ]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, chosen)])


@pytest.mark.parametrize("suffix", ["", "_encoder"])
def test_exact_scores_are_products_of_whole_gradients(suffix, monkeypatch):
    monkeypatch.setattr("tracmod.bench.peers.exact.BLOCK_NUMBERS", 60_000)  # several blocks
    kinds = (torch.nn.Linear, torch.nn.LayerNorm) if suffix else torch.nn.Linear
    model = random_model("tiny").double()
    rows = [[gradient(model, e, kinds) for e in examples] for examples in (QUERY, TRAIN)]
    query_QP, train_NP = map(torch.stack, rows)
    actual = exact_scores(random_model("tiny"), QUERY, TRAIN)
    dot_QN = query_QP @ train_NP.T
    assert (actual[f"dot{suffix}"] - dot_QN).abs().max() <= 1e-6 * dot_QN.abs().max()
    cosine_QN = F.normalize(query_QP, dim=1) @ F.normalize(train_NP, dim=1).T
    assert (actual[f"cosine{suffix}"] - cosine_QN).abs().max() <= 1e-6


@pytest.mark.parametrize("size", [1, 3, 8])
def test_batches_hold_every_example_once_without_mixing_lengths(size):
    batches = list(shared.batches(TRAIN, size))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(TRAIN)))
    for batch in batches:
        for row, ids, mask, label in zip(*batch, strict=True):
            assert ids[: int(mask.sum())].tolist() == TRAIN[row]["input_ids"]
            assert label == TRAIN[row]["labels"]
    longest = [batch.input_ids.shape[1] for batch in batches]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("size", [1, 4])
def test_the_lean_floor_has_the_gradients_of_the_plain_one(size):
    model, batches = random_model("tiny"), list(shared.batches(TRAIN, size))
    assert use_floor.largest_difference(model, batches) <= 1e-5
    seen = []
    hook = model.roberta.encoder.layer[-1].intermediate.register_forward_hook(
        lambda _, args, output: seen.append(output.shape[1])
    )
    use_floor.floor_pass(model, batches, "lean")
    hook.remove()
    assert set(seen) == {1}  # one position of the last layer


def test_the_lean_floor_notices_a_wrong_mask(monkeypatch):
    monkeypatch.setitem(
        use_floor.FORMS, "lean",
        lambda model, batch: use_floor.lean_logits(
            model, batch._replace(attention_mask=torch.ones_like(batch.attention_mask))
        ),
    )  # fmt: skip
    batches = list(shared.batches(TRAIN, 8))
    assert use_floor.largest_difference(random_model("tiny"), batches) > 1e-3


@pytest.mark.parametrize("name", ["torch-logra", "torch-countsketch", "tracmod-4096"])
def test_features_of_plain_torch_and_tracmod_are_correlated_with_exact_scores(name, options):
    method = methods.METHODS[name]
    assert worker.check(method, options, QUERY, TRAIN) is None


@pytest.mark.parametrize("function", [use_torch.naive, use_tracmod.exact])
def test_exact_methods_are_exact(function):
    exact = exact_scores(random_model("tiny"), QUERY, TRAIN)
    suffix = "_encoder" if function is use_tracmod.exact else ""
    scores = function(random_model("tiny"), QUERY, TRAIN, 4)
    truth = exact[f"dot{suffix}"]
    assert (scores - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize(("name", "message"), [("naive", "off by"), ("torch-logra", "correlation")])
def test_a_method_with_wrong_scores_is_not_timed(name, message, options, tmp_path, monkeypatch):
    method = methods.METHODS[name]
    right = getattr(use_torch, method.function)

    def wrong(model, *examples, **named):
        return right(model, *examples, **named).roll(1, dims=0)

    def wrong_features(model, examples, size):
        rows = list(examples)[1:] + list(examples)[:1]
        return right(model, rows if len(examples) > 4 else examples, size)

    monkeypatch.setattr(
        use_torch, method.function, wrong if method.kind == "exact" else wrong_features
    )
    result = worker.measure({**options, "method": name}, tmp_path)
    assert message in result["failed"]
    assert "cpu_seconds" not in result


def test_a_method_is_checked_timed_and_compared(options, tmp_path):
    result = worker.measure({**options, "method": "tracmod-4096"}, tmp_path)
    assert result["cpu_seconds"] > 0
    assert result["numbers"] == 4096
    assert result["peak_bytes"] >= result["base_bytes"] > 0
    assert (tmp_path / "tracmod-4096.safetensors").exists()
    floor = worker.measure({**options, "method": "lean"}, tmp_path)
    assert floor["batch_size"] in worker.BATCH_SIZES
    assert floor["cpu_seconds"] > 0


def test_rounds_keep_the_best_and_absent_libraries_are_listed(folder, monkeypatch, tmp_path):
    seconds = iter([3.0, 6.0, 2.0, 5.0])

    def measured(part, name, options, work, cache):
        if name == "naive":
            return {"failed": "a score is off by 2e-01 of the largest"}
        rows = {"query": torch.ones(5, 8), "train": torch.ones(13, 8)}
        save_file(rows, work / f"{name}.safetensors")
        return {"version": "1", "cpu_seconds": next(seconds), "peak_bytes": 2**20, "numbers": 8,
                "batch_size": 4, "load_before": 0.1}  # fmt: skip

    monkeypatch.setattr(bench_peers, "run_worker", measured)
    result = bench_peers.run_features(
        folder, "untrained", ["floor", "torch-logra", "naive", "bergson"], rounds=2, cache=tmp_path
    )
    rows = result["methods"]
    assert rows["floor"]["all_cpu_seconds"] == [3.0, 2.0]
    assert rows["torch-logra"]["cpu_seconds"] == 5.0
    assert rows["torch-logra"]["times_floor"] == 2.5
    assert rows["bergson"]["absent"]
    text = "\n".join(report.section(result))
    assert "bergson: not installed" in text
    assert "failed, a score is off by 2e-01" in text
    assert "plain floor" in text


def test_rows_that_are_measured_again_replace_the_earlier_ones():
    earlier = {"rounds": 2, "methods": {"floor": {"cpu_seconds": 1}, "naive": {"failed": "x"},
                                        "captum": {"cpu_seconds": 4}}}  # fmt: skip
    again = {"rounds": 1, "methods": {"naive": {"cpu_seconds": 5}, "floor": {"cpu_seconds": 9}}}
    assert bench_peers.replace_rows(earlier, again) == {
        "rounds": 2,
        "methods": {"floor": {"cpu_seconds": 1}, "captum": {"cpu_seconds": 4},
                    "naive": {"cpu_seconds": 5, "measured_again": True}},
    }  # fmt: skip


def test_a_worker_that_fails_gives_its_last_line(tmp_path):
    failing = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    assert bench_peers.run_process(failing, tmp_path) == {"failed": "no such thing"}
    done = bench_peers.run_process([sys.executable, "-c", "sum(range(10**6))"], tmp_path)
    assert done["process_cpu_seconds"] > 0


def test_the_job_ranks_the_sum_over_checkpoints(folder, tmp_path):
    import pyarrow.parquet as pq

    options = bench_peers.model_options(folder, "untrained")
    options |= {"checkpoints": options["checkpoints"] * 2, "weights": [1.0, 0.5]}
    shared.run_job(options, tmp_path, lambda *args: use_torch.naive(*args, 4))
    rows = pq.read_table(tmp_path / "top.parquet").to_pylist()
    exact = 1.5 * exact_scores(random_model("tiny"), QUERY, TRAIN)["dot"]
    assert len(rows) == exact.numel()
    for row in rows:
        truth = float(exact[row["query"], row["train"]])
        assert row["score"] == pytest.approx(truth, rel=1e-3, abs=1e-5 * float(exact.abs().max()))
    first = [row["train"] for row in rows if row["rank"] == 0]
    assert first == exact.argmax(1).tolist()


def test_lines_of_scripts_leave_out_comments_and_docstrings(tmp_path):
    script = tmp_path / "script.py"
    lines = ['"""Two', 'lines."""', "", "# why", "x = [", "    1,", "]", "", "", "def f():"]
    lines += ['    """Text."""', '    return """not a', '    docstring"""', ""]
    script.write_text("\n".join(lines))
    assert methods.script_lines(script) == 3 + 1 + 2
    for method in methods.METHODS.values():
        assert method.script.exists()


def test_examples_are_joined_within_language_and_label():
    rows = [
        {"id": str(n), "language": "en" if n % 2 else "de", "label": n % 3, "text_a": f"a{n}"}
        for n in range(60)
    ]  # fmt: skip
    texts = list(data.joined(rows))
    sizes = {len(row["text_a"].split()) for row in texts}
    assert sizes == {1, 2, 3, 4}
    for row in texts:
        numbers = [int(part[1:]) for part in row["text_a"].split()]
        assert {n % 3 for n in numbers} == {row["label"]}


def test_the_table_of_jobs_names_what_is_missing():
    rows = {
        "a": {"label": "tracmod attribute", "process_cpu_seconds": 12.0, "load_before": 0.2},
        "b": {"label": "bergson", "absent": True},
        "c": {"label": "captum", "failed": "no such thing"},
    }
    environment = {"device": "x", "threads": 1, "device_type": "cpu", "torch": "2",
                   "transformers": "5", "commit": "0"}  # fmt: skip
    text = "\n".join(report.section({
        "part": "peers-job", "environment": environment, "train": 2, "query": 1, "checkpoints": 3,
        "methods": rows,
    }))  # fmt: skip
    for expected in ("| tracmod attribute | 12", "bergson: not installed", "failed, no such thing"):
        assert expected in text
