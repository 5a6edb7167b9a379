"""TracInCallback: the rates it records under all kinds of training, and influence over them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from own_model import LABELS, own_model, own_tokenizer, write_examples
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import tracmod as tm
from tracmod.attribution.attribute import given_checkpoints
from tracmod.cli import main
from tracmod.models.checkpoints import checkpoint_folders, load_checkpoints, load_second_moment
from tracmod.models.inputs import collate, encode, pad_token_id
from tracmod.models.loading import load_classifier, load_model
from tracmod.tasks.files import read_model_files

TRAIN, QUERY, BATCH, PEAK = 28, 6, 4, 0.01
STEPS = TRAIN // BATCH  # per epoch
# Most trainings here have no tokenizer; pytest.warns still sees the warning.
pytestmark = pytest.mark.filterwarnings("ignore:the checkpoints have no tokenizer")


def examples_of(name, count):
    """Return the examples that `write_examples` writes, encoded."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_examples(Path(folder) / f"{name}.tsv", count)
        (table,) = read_model_files([path], LABELS)
    return encode(own_tokenizer(), table, 40)


@pytest.fixture
def files(tmp_path):
    """The options --train and --query with the examples of `examples_of`."""
    train = write_examples(tmp_path / "train.tsv", TRAIN)
    return "--train", train, "--query", write_examples(tmp_path / "query.tsv", QUERY)


def make_trainer(out, *callbacks, **arguments):
    """Build a Trainer of two epochs of seven steps whose rate falls linearly from PEAK to 0."""
    model = own_model()
    settings = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": BATCH,
        "learning_rate": PEAK,
        "save_strategy": "epoch",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
    } | arguments
    return Trainer(
        model,
        TrainingArguments(str(out), **settings),
        train_dataset=examples_of("train", TRAIN),
        eval_dataset=examples_of("query", QUERY),
        data_collator=lambda rows: collate(rows, pad_token_id(model), torch.device("cpu")),
        callbacks=list(callbacks),
    )


def mean_rate(first, end, total=2 * STEPS):
    """Return the mean rate of the steps [first, end)."""
    return sum(PEAK * (1 - step / total) for step in range(first, end)) / (end - first)


def recorded(out):
    """Return the learning rate by step from every checkpoint's tracmod.json."""
    trees = [json.loads(path.read_text()) for path in Path(out).glob("checkpoint-*/tracmod.json")]
    return {tree["step"]: tree["learning_rate"] for tree in sorted(trees, key=lambda t: t["step"])}


def invoke(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def by_hand(folders, rates):
    """Compute the (Q, N) sums over checkpoints of rate x <gradient, gradient> with autograd."""
    scores_QN = torch.zeros(QUERY, TRAIN, dtype=torch.float64)
    for folder, rate in zip(folders, rates, strict=True):
        model = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
        weights = [w for name, w in model.named_parameters() if ".embeddings." not in name]

        def gradient(example, model=model, weights=weights):
            row = {name: torch.tensor([example[name]]) for name in ("input_ids", "attention_mask")}
            loss = nn.functional.cross_entropy(
                model(**row).logits, torch.tensor([example["labels"]])
            )
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

        queries = torch.stack([gradient(example) for example in examples_of("query", QUERY)])
        trains = torch.stack([gradient(example) for example in examples_of("train", TRAIN)])
        scores_QN += rate * (queries @ trains.T)
    return scores_QN


def scores_of(out):
    """Read the (Q, N) scores from a top.parquet that has all training examples as proponents."""
    top = pq.read_table(out / "top.parquet").to_pylist()
    scores_QN = torch.full((QUERY, TRAIN), torch.nan, dtype=torch.float64)
    for row in top:
        if row["sign"] == 1:
            query, train = (int(row[name].split("-")[1]) for name in ("test_id", "train_id"))
            scores_QN[query, train] = row["score"]
    return scores_QN


def assert_close(scores_QN, expected_QN):
    floor = 1e-5 * expected_QN.abs().max()
    torch.testing.assert_close(scores_QN, expected_QN, rtol=1e-4, atol=floor)


# --- from training to influence -------------------------------------------------------------


def test_a_trainer_with_the_callback_gives_influence_as_by_hand(files, tmp_path):
    training, out = tmp_path / "training", tmp_path / "out"
    callback = tm.TracInCallback(own_tokenizer(), every="epoch")
    make_trainer(training, callback, save_strategy="no").train()
    invoke("attribute", "--checkpoints", training, *files, "--out", out,
           "--exact", "--normalize", "none", "-k", TRAIN)  # fmt: skip
    rates = [mean_rate(0, STEPS), mean_rate(STEPS, 2 * STEPS)]
    record = json.loads((out / "run.json").read_text())
    assert record["weights"] == pytest.approx(rates)
    assert record["arguments"]["model"] == str(training / f"checkpoint-{2 * STEPS}")
    expected = by_hand(
        [training / f"checkpoint-{STEPS}", training / f"checkpoint-{2 * STEPS}"], rates
    )
    torch.testing.assert_close(
        scores_of(out), expected, rtol=1e-3, atol=1e-4 * expected.abs().max()
    )


def test_a_trainer_without_the_callback_gives_the_rates_it_logged(files, tmp_path):
    training, out = tmp_path / "training", tmp_path / "out"
    trainer = make_trainer(training, logging_steps=1, save_strategy="steps", save_steps=5)
    trainer.train()
    command = ["attribute", "--checkpoints", training, *files, "--out", out,
               "--exact", "--normalize", "none", "-k", TRAIN]  # fmt: skip
    assert re.search(r"checkpoint-14: .*tokenizer", invoke(*command, code=2))
    trainer.save_model(tmp_path / "model")
    own_tokenizer().save_pretrained(tmp_path / "model")
    invoke(*command, "--model", tmp_path / "model")
    rates = [mean_rate(0, 5), mean_rate(5, 10), mean_rate(10, 14)]
    assert json.loads((out / "run.json").read_text())["weights"] == pytest.approx(rates)
    expected = by_hand([training / f"checkpoint-{step}" for step in (5, 10, 14)], rates)
    torch.testing.assert_close(
        scores_of(out), expected, rtol=1e-3, atol=1e-4 * expected.abs().max()
    )


# --- learning rates -------------------------------------------------------------------------


def test_a_checkpoint_has_the_mean_rate_since_the_one_before(tmp_path):
    make_trainer(tmp_path, tm.TracInCallback(), save_strategy="steps", save_steps=3).train()
    spans = [(0, 3), (3, 6), (6, 9), (9, 12), (12, 14)]
    assert recorded(tmp_path) == pytest.approx({end: mean_rate(first, end) for first, end in spans})
    last = json.loads((tmp_path / "checkpoint-14/tracmod.json").read_text())
    assert (last["epoch"], last["step"]) == (2, 14)


def test_steps_are_the_optimizers_with_gradient_accumulation(tmp_path):
    make_trainer(tmp_path, tm.TracInCallback(), gradient_accumulation_steps=3).train()
    # The seven batches of an epoch make three steps of three, three and one batch.
    assert recorded(tmp_path) == pytest.approx({3: mean_rate(0, 3, 6), 6: mean_rate(3, 6, 6)})


class Saves(TrainerCallback):
    """Records the steps after which the Trainer saved."""

    def __init__(self):
        self.steps = []

    def on_save(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def test_the_end_of_an_epoch_that_is_saved_already_is_not_saved_again(tmp_path):
    callback, saves = tm.TracInCallback(every="epoch"), Saves()
    make_trainer(tmp_path, callback, saves, save_strategy="steps", save_steps=STEPS).train()
    assert recorded(tmp_path) == pytest.approx({7: mean_rate(0, 7), 14: mean_rate(7, 14)})
    assert saves.steps == [7, 14]


class SaveAgain(TrainerCallback):
    """Saves at the end of an epoch, although the same step has been saved already."""

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = True


def test_a_checkpoint_saved_twice_after_one_step_keeps_its_rate(tmp_path):
    make_trainer(
        tmp_path, tm.TracInCallback(), SaveAgain(), save_strategy="steps", save_steps=STEPS
    ).train()
    assert recorded(tmp_path) == pytest.approx({7: mean_rate(0, 7), 14: mean_rate(7, 14)})


class Stopped(Exception):
    pass


class StopAt(TrainerCallback):
    """Ends a training after a step, as an error would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stopped


@pytest.mark.parametrize("same_trainer", [True, False])
@pytest.mark.parametrize("restore", [True, False])
def test_a_resumed_training_has_the_rates_and_weights_of_an_uninterrupted_one(
    tmp_path, same_trainer, restore
):
    settings = {
        "save_strategy": "steps",
        "save_steps": 3,
        "restore_callback_states_from_checkpoint": restore,
    }
    make_trainer(tmp_path / "whole", tm.TracInCallback(), **settings).train()
    stop = StopAt(8)
    trainer = make_trainer(tmp_path / "resumed", tm.TracInCallback(), stop, **settings)
    with pytest.raises(Stopped):
        trainer.train()
    assert list(recorded(tmp_path / "resumed")) == [3, 6]
    if same_trainer:
        trainer.remove_callback(stop)
    else:
        trainer = make_trainer(tmp_path / "resumed", tm.TracInCallback(), **settings)
    trainer.train(resume_from_checkpoint=True)
    assert recorded(tmp_path / "resumed") == recorded(tmp_path / "whole")
    assert len(recorded(tmp_path / "whole")) == 5
    for folder in checkpoint_folders(tmp_path / "whole"):
        again = tmp_path / "resumed" / folder.name
        for name in ("model.safetensors", "tracmod.json"):
            assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_of_parameter_groups_with_different_rates_the_first_counts_and_a_warning_is_given(tmp_path):
    trainer = make_trainer(tmp_path, tm.TracInCallback(), logging_steps=1)
    body, head = [], []
    for name, weight in trainer.model.named_parameters():
        (head if name.startswith("classifier") else body).append(weight)
    groups = [{"params": body, "lr": PEAK}, {"params": head, "lr": 10 * PEAK}]
    trainer.optimizer = torch.optim.SGD(groups)
    with pytest.warns(UserWarning, match=r"different learning rates.*first"):
        trainer.train()
    assert recorded(tmp_path) == pytest.approx({7: mean_rate(0, 7), 14: mean_rate(7, 14)})
    for folder in checkpoint_folders(tmp_path):
        (folder / "tracmod.json").unlink()
    logged = load_checkpoints(checkpoint_folders(tmp_path))
    assert [checkpoint.learning_rate for checkpoint in logged] == pytest.approx(
        [mean_rate(0, 7), mean_rate(7, 14)]
    )


def test_the_second_moment_of_two_parameter_groups_has_the_right_names(files, tmp_path):
    """The Trainer's optimizer numbers parameters through its groups, with and without decay."""
    callback = tm.TracInCallback(own_tokenizer(), second_moment=True)
    training, out = tmp_path / "training", tmp_path / "out"
    trainer = make_trainer(training, callback, weight_decay=0.1, max_grad_norm=0.0)
    moments, steps = {}, [0]

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            steps[0] += 1
            for name, parameter in kwargs["model"].named_parameters():
                before = moments.get(name, 0)
                moments[name] = 0.999 * before + 0.001 * parameter.grad.square()

    trainer.add_callback(Watch())
    trainer.train()
    assert [len(group["params"]) > 1 for group in trainer.optimizer.param_groups] == [True, True]
    last = checkpoint_folders(training)[-1]
    second_moment = load_file(last / "second_moment.safetensors")
    assert second_moment.keys() == moments.keys()
    for name, moment in moments.items():
        expected = moment / (1 - 0.999 ** steps[0])
        torch.testing.assert_close(second_moment[name], expected, rtol=1e-4, atol=1e-12, msg=name)
    command = ["attribute", "--checkpoints", training, *files, "--exact", "-k", TRAIN]
    invoke(*command, "--out", out, "--preconditioner", "adam", "--normalize", "none")
    model = load_classifier(last)
    metric = tm.adam_preconditioner(model, second_moment)
    train, query = examples_of("train", TRAIN), examples_of("query", QUERY)
    expected = tm.exact_influence(model, train, query, preconditioner=metric)
    alone = tmp_path / "alone"
    given = ["attribute", "--model", last, *files, "--exact", "-k", TRAIN, "--out", alone]
    invoke(*given, "--preconditioner", "adam", "--normalize", "none")
    assert_close(scores_of(alone), expected.double())
    assert not torch.allclose(scores_of(out), scores_of(alone))


def test_the_epsilon_of_the_trainers_optimizer_is_saved(tmp_path):
    callback = tm.TracInCallback(own_tokenizer(), second_moment=True)
    make_trainer(tmp_path, callback, adam_epsilon=1e-5).train()
    assert load_second_moment(checkpoint_folders(tmp_path)[-1])[1] == 1e-5


def test_groups_of_parameters_with_different_epsilons_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, tm.TracInCallback(second_moment=True))
    first, *others = trainer.model.parameters()
    groups = [{"params": [first], "eps": 1e-6}, {"params": others}]
    trainer.optimizer = torch.optim.AdamW(groups, lr=1e-3)
    with pytest.raises(ValueError, match=r"one eps.*1e-08, 1e-06"):
        trainer.train()


def test_an_optimizer_without_a_second_moment_is_named(tmp_path):
    trainer = make_trainer(tmp_path, tm.TracInCallback(second_moment=True))
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), momentum=0.9)
    with pytest.raises(ValueError, match=r"Adam.*, got .*momentum_buffer"):
        trainer.train()


def test_checkpoints_without_a_second_moment_are_refused_at_the_start(training, files, tmp_path):
    output = invoke("attribute", "--checkpoints", training, *files, "--out", tmp_path / "out",
                    "--preconditioner", "adam", code=2)  # fmt: skip
    assert "second_moment.safetensors" in output
    assert "TracInCallback(second_moment=True)" in output
    assert not (tmp_path / "out").exists()


def test_with_the_best_model_loaded_at_the_end_every_checkpoint_is_there(tmp_path):
    make_trainer(
        tmp_path, tm.TracInCallback(), load_best_model_at_end=True, eval_strategy="epoch"
    ).train()
    assert recorded(tmp_path) == pytest.approx({7: mean_rate(0, 7), 14: mean_rate(7, 14)})


# --- warnings and errors --------------------------------------------------------------------


def test_a_limit_on_checkpoints_gives_a_warning(tmp_path):
    trainer = make_trainer(tmp_path, tm.TracInCallback(), save_total_limit=1)
    with pytest.warns(UserWarning, match="save_total_limit=1"):
        trainer.train()
    assert recorded(tmp_path) == pytest.approx({14: mean_rate(7, 14)})


def test_the_tokenizer_is_saved_if_the_trainer_saves_none(tmp_path):
    trainer = make_trainer(tmp_path / "none", tm.TracInCallback())
    with pytest.warns(UserWarning, match=r"no tokenizer.*TracInCallback\(tokenizer\)"):
        trainer.train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tokenizer")
        make_trainer(tmp_path / "ours", tm.TracInCallback(own_tokenizer())).train()
    source, given = given_checkpoints(None, (), tmp_path / "ours")
    assert [path.name for path in given] == ["checkpoint-7", "checkpoint-14"]
    assert source == str(given[-1])
    assert load_model(source)[1].get_vocab() == own_tokenizer().get_vocab()


def test_the_trainers_own_tokenizer_is_not_replaced(tmp_path):
    trainer = make_trainer(tmp_path, tm.TracInCallback(own_tokenizer(["other words"])))
    trainer.processing_class = own_tokenizer()
    trainer.train()
    own_tokenizer().save_pretrained(tmp_path / "expected")
    for folder in checkpoint_folders(tmp_path):
        saved = (folder / "tokenizer.json").read_bytes()
        assert saved == (tmp_path / "expected/tokenizer.json").read_bytes()


def test_trainings_that_influence_cannot_use_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"every: .*'day'"):
        tm.TracInCallback(every="day")
    trainer = make_trainer(
        tmp_path, tm.TracInCallback(every="epoch"), save_strategy="best",
        metric_for_best_model="loss", eval_strategy="epoch",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"save_strategy .*got best"):
        trainer.train()
    trainer = make_trainer(tmp_path, tm.TracInCallback())
    trainer.model.roberta.encoder = nn.Identity()
    with pytest.raises(ValueError, match=r"XLMRobertaForSequenceClassification: .*BERT family"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_checkpoint_without_whole_weights_stops_the_training(tmp_path):
    class RemoveWeights(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            (Path(args.output_dir) / f"checkpoint-{state.global_step}/model.safetensors").unlink()

    with pytest.raises(ValueError, match=r"checkpoint-7: .*model\.safetensors"):
        make_trainer(tmp_path, RemoveWeights(), tm.TracInCallback()).train()


WORKER = """
import json, os, sys, warnings
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
import tracmod as tm
import tracmod.training.callback as module
from test_trainer_callback import make_trainer
write, written = module.write_json, []
module.write_json = lambda path, tree: (written.append(path.parent.name), write(path, tree))
with warnings.catch_warnings(record=True) as warned:
    make_trainer(sys.argv[1], tm.TracInCallback(every="epoch"), save_strategy="no").train()
warned = [str(warning.message) for warning in warned if warning.category is UserWarning]
tree = {"written": written, "warned": [text for text in warned if "TracInCallback" in text]}
Path(sys.argv[1], f"rank-{os.environ['RANK']}.json").write_text(json.dumps(tree))
torch.distributed.barrier()  # without it, the exit of one process may abort the other
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_of_two_processes_the_first_alone_writes_and_warns(tmp_path, monkeypatch):
    """DDP over gloo, started as torchrun does; every process requests the checkpoint."""
    worker, out = tmp_path / "worker.py", tmp_path / "out"
    worker.write_text(WORKER)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(worker), str(out), str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["written"] == ["checkpoint-4", "checkpoint-8"]
    assert len(first["warned"]) == 1
    assert second == {"written": [], "warned": []}
    # 28 rows for two processes in batches of four: four steps an epoch.
    assert recorded(out) == pytest.approx({4: mean_rate(0, 4, 8), 8: mean_rate(4, 8, 8)})


# --- the command ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    make_trainer(folder, tm.TracInCallback(own_tokenizer())).train()
    return folder


def test_checkpoints_are_sorted_by_number_and_other_folders_ignored(training, files, tmp_path):
    folder = tmp_path / "many"
    for name in ("checkpoint-100", "checkpoint-9", "checkpoint-20"):
        shutil.copytree(training / "checkpoint-7", folder / name)
    (folder / "checkpoint-3.tmp").mkdir()
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-5").write_text("a file")
    shutil.copy(training / "checkpoint-7/config.json", folder)  # as after trainer.save_model()
    out = tmp_path / "out"
    invoke("attribute", "--checkpoints", folder, *files, "--out", out, "--projection-dim", 256)
    given = json.loads((out / "run.json").read_text())["arguments"]["checkpoints"]
    assert [Path(path).name for path in given] == [
        "checkpoint-9", "checkpoint-20", "checkpoint-100",
    ]  # fmt: skip


def test_the_last_checkpoint_is_the_default_model(training, files, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    dim = ("--projection-dim", 256)
    invoke("attribute", "--checkpoints", training, *files, "--out", one, *dim)
    each = [("--checkpoint", training / f"checkpoint-{step}") for step in (7, 14)]
    model = ("--model", training / "checkpoint-14")
    invoke("attribute", *model, *each[0], *each[1], *files, "--out", two, *dim)
    invoke("attribute", *each[0], *each[1], *files, "--out", two, *dim)
    assert (one / "top.parquet").read_bytes() == (two / "top.parquet").read_bytes()


def test_wrong_combinations_of_options_are_reported_in_one_sentence(training, files, tmp_path):
    (tmp_path / "empty").mkdir()
    command = ["attribute", *files, "--out", tmp_path / "out"]
    both = ["--checkpoints", training, "--checkpoint", training / "checkpoint-7"]
    for given, message in (
        (both, "expected --checkpoint or --checkpoints, got both"),
        ([], "expected --model, --checkpoint or --checkpoints, got none of them"),
        (["--checkpoints", tmp_path / "empty"], "empty: expected checkpoint-<number> folders"),
    ):
        output = invoke(*command, *given, code=2)
        assert message in output
        assert len(output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


# --- frozen parameters ----------------------------------------------------------------------


def frozen_of(out):
    """Return the frozen parameters that every checkpoint records, by step."""
    records = [json.loads(path.read_text()) for path in Path(out).glob("checkpoint-*/tracmod.json")]
    return {record["step"]: set(record.get("frozen_parameters", ())) for record in records}


@pytest.mark.parametrize("how", ["requires_grad", "in no group", "rate 0"])
def test_parameters_that_the_steps_do_not_move_are_recorded(tmp_path, how):
    trainer = make_trainer(tmp_path, tm.TracInCallback())
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    body = [p for name, p in trainer.model.named_parameters() if "classifier" not in name]
    head = [p for name, p in trainer.model.named_parameters() if "classifier" in name]
    if how == "requires_grad":
        for parameter in body:
            parameter.requires_grad_(False)
    elif how == "in no group":
        trainer.optimizer = torch.optim.AdamW(head, lr=PEAK)
    else:
        groups = [{"params": body, "lr": 0.0}, {"params": head, "lr": PEAK}]
        trainer.optimizer = torch.optim.AdamW(groups, lr=PEAK, weight_decay=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    unmoved = {n for n, p in trainer.model.named_parameters() if torch.equal(p, before[n])}
    assert unmoved
    assert frozen_of(tmp_path) == {7: unmoved, 14: unmoved}
    assert recorded(tmp_path) == pytest.approx({7: mean_rate(0, 7), 14: mean_rate(7, 14)})
    (first, second) = load_checkpoints(checkpoint_folders(tmp_path))
    assert set(first.frozen) == set(second.frozen) == unmoved


def test_every_checkpoint_records_the_parameters_of_its_own_steps(tmp_path):
    """Layers may be unfrozen one after the other (ULMFiT)."""

    class Unfreeze(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            kwargs["model"].requires_grad_(True)

    trainer = make_trainer(tmp_path, tm.TracInCallback(), Unfreeze())
    trainer.model.base_model.requires_grad_(False)
    trainer.create_optimizer()
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=PEAK)
    trainer.train()
    base = {name for name, _ in trainer.model.named_parameters() if name.startswith("roberta.")}
    assert frozen_of(tmp_path) == {7: base, 14: set()}


def test_a_training_of_all_parameters_records_none(tmp_path):
    make_trainer(tmp_path, tm.TracInCallback(), warmup_steps=3).train()
    assert frozen_of(tmp_path) == {7: set(), 14: set()}
    steps = [json.loads(p.read_text())["steps"] for p in tmp_path.glob("*/tracmod.json")]
    assert steps == [7, 7]
