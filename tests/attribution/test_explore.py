"""`tracmod explore`: the page shows the answers of `tm.Attributor`, to its own requests only."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import sys
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from html_page import Page
from own_model import save_model, write_examples
from tiny_study import tiny_config

import tracmod as tm
from tracmod.cli import main
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder

pytest.importorskip("gradio")
from tracmod.attribution import explore

TEXT, TEXT_B = "Der Hund schläft.", "Ein Tier schläft."
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with collected features."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("explore") / "run"
    config = tiny_config(finetune={"epochs": 1}, views={"random": 0, "other": []})
    run_stages(
        RunFolder(folder, config), ["data", "finetune", "prune", "sparse-finetune", "collect"]
    )
    return folder


@pytest.fixture(scope="module")
def explorer(run: Path) -> explore.Explorer:
    return explore.Explorer(run)


@pytest.fixture(scope="module")
def attribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `tracmod attribute`: 13 training examples, k = 4."""
    folder = tmp_path_factory.mktemp("own")
    save_model(folder / "model")
    arguments = ["attribute", "--model", folder / "model", "--train",
                 write_examples(folder / "train.tsv", 13), "--query",
                 write_examples(folder / "query.tsv", 5), "--out", folder / "out", "-k", 4,
                 "--projection-dim", 64]  # fmt: skip
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return folder / "out"


def check_rows(rows: list[dict], expected: list[dict]) -> None:
    """Rows of two answers are the same; their scores are so within 1e-5."""
    scores = [row["score"] for row in rows]
    assert scores == pytest.approx([row["score"] for row in expected], rel=1e-5)
    pairs = zip(rows, expected, strict=True)
    assert all(row == other | {"score": row["score"]} for row, other in pairs)


@pytest.mark.parametrize("model", ["full", "sparse"])
def test_every_view_shows_the_answer_of_its_attributor(run, explorer, model):
    answers = list(explorer.explain(TEXT, TEXT_B, "de", "neutral", model))
    titles = [answer["title"].split()[-1] for answer in answers]
    assert titles == ["heads", "de", "en", "es"]
    assert [answer["own"] for answer in answers] == [False, True, False, False]
    views = [("full", None), ("subnetwork", "de"), ("subnetwork", "en"), ("subnetwork", "es")]
    for answer, (view, mask) in zip(answers, views, strict=True):
        expected = tm.Attributor(run, model, view, mask).query(TEXT, TEXT_B, "neutral", k=5)
        assert answer["prediction"] == expected["prediction"]
        assert answer["probabilities"] == pytest.approx(expected["probabilities"])
        for side, shares in (("proponents", "shares"), ("opponents", "opponent_shares")):
            check_rows(answer[side], expected[side])
            languages = [row["language"] for row in expected[side]]
            counts = {name: languages.count(name) for name in ("en", "de", "es")}
            assert answer[shares] == {name: count / 5 for name, count in counts.items()}


def test_views_have_different_scores_and_share_the_models_in_memory(explorer):
    answers = list(explorer.explain(TEXT, TEXT_B, "de"))
    scores = {tuple(row["score"] for row in answer["proponents"]) for answer in answers}
    assert len(scores) > 1
    views = explorer._views("full")
    assert views is explorer._views("full")
    assert len({id(attributor.source.models) for _, _, attributor in views}) == 1
    assert len({id(attributor.train_stores) for _, _, attributor in views}) == 4


def test_without_a_label_every_view_explains_the_full_models_prediction(run, explorer):
    answers = list(explorer.explain(TEXT, TEXT_B, "es"))
    predicted = tm.Attributor(run).query(TEXT, TEXT_B)["prediction"]
    assert {answer["label"] for answer in answers} == {predicted}


def test_listed_languages_filter_the_list_and_not_the_shares(run, explorer):
    unfiltered = next(explorer.explain(TEXT, TEXT_B, "de", "neutral"))
    filtered = next(explorer.explain(TEXT, TEXT_B, "de", "neutral", listed_languages=["es"]))
    expected = tm.Attributor(run).query(TEXT, TEXT_B, "neutral", 10, ["es"])
    assert filtered["shares"] == unfiltered["shares"]
    check_rows(filtered["proponents"], expected["proponents"])
    assert len(expected["proponents"]) == 10


def test_probabilities_are_the_softmax_of_the_masked_models_logits(run):
    attributor = tm.Attributor(run, "full", "subnetwork", "de")
    answer = attributor.query(TEXT, TEXT_B)
    model, tokenizer = attributor.source.models[-1]
    with torch.no_grad(), attributor.source.masks[-1].apply(model):
        logits = model(**tokenizer(TEXT, TEXT_B, return_tensors="pt")).logits[0]
    assert list(answer["probabilities"].values()) == pytest.approx(
        logits.softmax(0).tolist(), rel=1e-4
    )
    assert max(answer["probabilities"], key=answer["probabilities"].get) == answer["prediction"]


def test_examples_are_test_examples_of_every_language(run, explorer):
    rows = pq.read_table(run / "data" / "test.parquet").to_pylist()
    test_examples = {
        (row["text_a"], row["text_b"] or "", row["language"], explorer.labels[row["label"]])
        for row in rows
    }
    assert {tuple(example) for example in explorer.examples} <= test_examples
    assert {example[2] for example in explorer.examples} == {"en", "de", "es"}
    assert explorer.has_pairs
    assert explorer.unit == "cosine × learning rate"


def texts_of(page: Page, tag: str) -> list[str]:
    return [text for own_tag, text in page.texts if own_tag == tag]


def test_the_page_shows_the_answers_after_each_view(explorer):
    inputs = (TEXT, TEXT_B, "de", explore.PREDICTED_LABEL, "full", [])
    pages = [Page(text) for text in explore.rendered(explorer, *inputs)]
    waiting = [[text.rpartition(" ")[2] for text in texts_of(page, "em")] for page in pages]
    assert waiting == [["3."], ["2."], ["1."], []]
    done = [dict(page.tags[0][1])["data-done"] for page in pages]
    assert done == ["no", "no", "no", "yes"]
    answers = list(explorer.explain(TEXT, TEXT_B, "de"))
    page = pages[-1]
    assert texts_of(page, "strong") == [answers[0]["label"]]
    ids = [attrs["data-id"] for tag, attrs in page.tags if tag == "li"]
    assert ids == [
        row["id"]
        for answer in answers
        for side in ("proponents", "opponents")
        for row in answer[side]
    ]
    for tag, attrs in page.tags:
        assert tag != "p" or "lang" not in attrs or attrs["dir"] == "auto"
    cells = texts_of(page, "td")
    assert cells[:3] == [f"{100 * share:.0f}%" for share in answers[0]["shares"].values()]
    assert cells[3:6] == [f"{p:.3f}" for p in answers[0]["probabilities"].values()]


def test_markup_in_texts_is_escaped(explorer, monkeypatch):
    hostile = "<img src=x onerror=alert(1)> ${value} {{value}}"
    answer = next(explorer.explain(TEXT, TEXT_B, "de"))
    for side in ("proponents", "opponents"):
        answer[side] = [row | {"text_a": hostile, "language": hostile} for row in answer[side]]
    monkeypatch.setattr(explorer, "explain", lambda *_: iter([answer]))
    (text,) = explore.rendered(explorer, TEXT, "", hostile, None, "full", [])
    page = Page(text)
    assert not any(tag in ("img", "script") for tag, _ in page.tags)
    assert ("p", hostile) in page.texts


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((" ", "", "de", None, "full", []), "^text:"),
        ((TEXT, "", "de", "maybe", "full", []), "^label: .*entailment.* got maybe"),
        ((TEXT, "", "de", None, "full", ["fr"]), "^language: .*de, en, es, got fr"),
    ],
)
def test_an_error_is_one_paragraph_of_the_page(explorer, inputs, message):
    *_, last = explore.rendered(explorer, *inputs)
    page = Page(last)
    error = next(text for tag, text in page.texts if tag == "p")
    assert re.search(message, error)
    assert "\n" not in error
    assert ("p", {"class": "error", "role": "alert"}) in page.tags


def test_an_attribution_has_one_view(attribution):
    explorer = explore.Explorer(attribution)
    assert (explorer.models, explorer.masks, explorer.k) == (["full"], [], 4)
    assert explorer.unit == "cosine, summed over checkpoints"
    assert not explorer.has_pairs
    (answer,) = explorer.explain("the cat sleeps", None, "en")
    expected = tm.Attributor(attribution).query("the cat sleeps", k=4)
    check_rows(answer["proponents"], expected["proponents"])
    with pytest.raises(ValueError, match="views"):
        tm.Attributor(attribution).under("subnetwork", "de")


def test_a_folder_or_port_that_cannot_be_served_is_named(attribution, tmp_path):
    def error_of(*arguments) -> str:
        result = CliRunner().invoke(main, ["explore", *map(str, arguments)])
        assert result.exit_code == 2, result.output
        return result.output

    assert str(tmp_path) in error_of(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        error = error_of(attribution, "--port", port)
        assert f"127.0.0.1:{port}" in error
        assert "--port" in error


def test_without_gradio_the_command_names_the_extra_to_install(attribution, monkeypatch):
    for name in ("gradio", "starlette"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "tracmod.attribution.explore")
    result = CliRunner().invoke(main, ["explore", str(attribution)])
    assert result.exit_code == 2
    assert "pip install 'tracmod[explore]'" in result.output


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def request(address, port, method, path, body=None, **headers):
    """Return status and text of a response; `Host` is the address's own unless it is given."""
    with closing(http.client.HTTPConnection(address, port, timeout=30)) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode()


def test_an_address_that_is_not_loopback_prints_a_warning(attribution, capsys):
    port = free_port()
    server = explore.serve(attribution, "0.0.0.0", port, block=False)
    try:
        assert re.search("WARNING: 0.0.0.0 .*loopback", capsys.readouterr().err)
        assert server.share_url is None
        headers = {"Host": "study.example", "Origin": "http://study.example"}
        assert request("127.0.0.1", port, "GET", "/config", **headers)[0] == 200
        headers["Origin"] = "http://evil.example"
        assert request("127.0.0.1", port, "GET", "/config", **headers)[0] == 403
    finally:
        server.close()


@pytest.fixture(scope="module")
def port(attribution):
    """The port on which the page of an attribution is served."""
    port = free_port()
    server = explore.serve(attribution, port=port, block=False)
    yield port
    server.close()


QUESTION = json.dumps({"data": ["the cat sleeps", "", "en", None, "full", []]})
JSON = {"Content-Type": "application/json"}
UPLOAD = (
    '--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n'
    "Content-Type: text/plain\r\n\r\nsome text\r\n--x--\r\n"
)


@pytest.mark.parametrize("name", ["127.0.0.1:{}", "localhost:{}", "[::1]:{}", "localhost"])
def test_requests_under_the_names_of_loopback_are_answered(port, name):
    headers = {"Host": name.format(port), "Origin": f"http://{name.format(port)}"}
    status, text = request("127.0.0.1", port, "GET", "/config", **headers)
    assert status == 200
    assert "the cat" in text
    status, text = request("127.0.0.1", port, "POST", "/gradio_api/call/ask", QUESTION,
                           **JSON, **headers)  # fmt: skip
    assert status == 200
    event = json.loads(text)["event_id"]
    _, text = request("127.0.0.1", port, "GET", f"/gradio_api/call/ask/{event}", **headers)
    assert "event: complete" in text


@pytest.mark.parametrize("name", ["evil.example", "evil.example:{}", "localhost.evil.example", ""])
@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/call/ask"])
def test_a_foreign_name_that_resolves_to_this_machine_is_refused(port, name, path):
    method = "POST" if "call" in path else "GET"
    headers = {"Host": name.format(port), "Origin": f"http://{name.format(port)}"}
    status, text = request("127.0.0.1", port, method, path, QUESTION, **JSON, **headers)
    assert (status, text) == (400, "Invalid host header")


@pytest.mark.parametrize("origin", ["http://evil.example", "http://localhost:1", "null", "http://"])
@pytest.mark.parametrize("path", ["/config", "/gradio_api/call/ask", "/gradio_api/queue/join"])
def test_requests_of_another_page_are_refused(port, origin, path):
    method = "GET" if path == "/config" else "POST"
    status, text = request("127.0.0.1", port, method, path, QUESTION, Origin=origin, **JSON)
    assert status == 403
    assert text.startswith("Origin:")
    assert text.endswith(f"got {origin}")


@pytest.mark.parametrize("path", ["upload", "upload/", "upload?upload_id=1", "process_recording"])
def test_files_cannot_be_uploaded(port, path):
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    for headers in (form, form | {"Origin": f"http://127.0.0.1:{port}"}):
        status, _ = request("127.0.0.1", port, "POST", f"/gradio_api/{path}", UPLOAD, **headers)
        assert status == 403


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_the_page_can_be_served_over_ipv6(attribution, host, capsys):
    port = free_port()
    server = explore.serve(attribution, host, port, block=False)
    try:
        assert f"at http://[::1]:{port}/" in capsys.readouterr().err
        assert request("::1", port, "GET", "/config")[0] == 200
        assert request("::1", port, "GET", "/config", Host="evil.example")[0] == 400
    finally:
        server.close()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_sentence_typed_in_a_browser_is_answered_without_other_hosts(run, capsys):
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright")
    port = free_port()
    server = explore.serve(run, port=port, block=False)
    assert "WARNING" not in capsys.readouterr().err
    requested, errors = [], []
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            page = browser.new_page()
            page.set_default_timeout(120_000)
            page.on("request", lambda request: requested.append(request.url))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on(
                "console", lambda message: message.type == "error" and errors.append(message.text)
            )
            page.goto(f"http://127.0.0.1:{port}")
            page.locator("#examples td", has_text="Der").first.click()
            page.locator("#language input").wait_for()
            page.wait_for_function("document.querySelector('#text-a textarea').value !== ''")
            assert page.locator("#language input").input_value() == "de"
            page.fill("#text-a textarea", TEXT)
            page.fill("#text-b textarea", TEXT_B)
            page.click("#ask")
            page.wait_for_selector('.answer[data-done="yes"]')
            label = page.locator(".answer strong").first.inner_text()
            for view, title in ((("full", None), "all heads"),
                                (("subnetwork", "de"), "subnetwork de")):  # fmt: skip
                answer = tm.Attributor(run, "full", *view).query(TEXT, TEXT_B, label, k=5)
                for side in ("proponents", "opponents"):
                    rows = page.locator(f'[data-view="{title}"] .{side} li')
                    ids = [rows.nth(i).get_attribute("data-id") for i in range(rows.count())]
                    assert ids == [row["id"] for row in answer[side]]
                    text = rows.first.locator("p").first
                    assert text.inner_text() == answer[side][0]["text_a"]
                    assert text.get_attribute("dir") == "auto"
            page.fill("#text-a textarea", " ")
            page.click("#ask")
            page.wait_for_selector(".answer .error")
            assert page.locator(".answer .error").inner_text().startswith("text:")
            browser.close()
    finally:
        server.close()
    assert errors == []
    assert requested
    own = (f"http://127.0.0.1:{port}/", "data:", "blob:")
    assert [url for url in requested if not url.startswith(own)] == []
