"""The local page of `tracmod explore`: influence on a typed sentence under every subnetwork."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from tracmod.attribution.query import Attributor
from tracmod.report.wording.labels import MODEL_NAMES, VIEW_NAMES, influence_unit, power_of_ten
from tracmod.tasks.token_files import tagged_text

try:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it when it is imported
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
except ModuleNotFoundError as error:
    raise ValueError("tracmod explore needs Gradio: pip install 'tracmod[explore]'") from error

PREDICTED_LABEL = "predicted label"
LISTED = 10  # training examples listed for each sign
EXAMPLES_PER_LANGUAGE = 2  # test examples to click on
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERY_ADDRESS = ("0.0.0.0", "::")
# The only paths that the page and Gradio's clients post to. Gradio would also accept uploads.
ALLOWED_POSTS = tuple(
    f"/gradio_api/{name}" for name in ("queue/join", "call/", "run/", "cancel", "reset")
)


class Explorer:
    """Influence on a sentence under the full model and under each language's subnetwork.

    Attributes:
        folder: The run folder, or the folder of an attribution.
        models: The models to choose from: `full` and `sparse` for a run, `full` for an attribution.
        masks: The languages with a subnetwork; empty for an attribution.
        languages: The languages of the test examples.
        train_languages: The languages of the training examples.
        labels: The names of the classes; empty for other models, whose labels are names or
            numbers.
        has_pairs: Whether examples have a second text.
        unit: The unit of the scores.
        k: The number of strongest training examples whose languages are counted.
        examples: Some test examples to choose from: text_a, text_b, language, label.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a run folder or a folder of `tracmod attribute`.

        Raises:
            ValueError: As for `Attributor`.
        """
        self.folder = Path(folder)
        self._full = Attributor(folder)
        self._views = cache(self._open_views)
        source = self._full.source
        self.models = list(source.model_names)
        self.masks = [mask for view, mask in self._full.views if view == "subnetwork"]
        weights = "uniform" if set(source.weights or [1.0]) == {1.0} else "learning_rate"
        self.unit = influence_unit({"normalize": source.normalize, "weights": weights})
        self.train_languages = list(dict.fromkeys(source.train.column("language").to_pylist()))
        self.labels = source.label_names if source.loss_kind == "cross_entropy" else []
        self.has_pairs = any(source.train.column("text_b").to_pylist())
        self.k = min(source.k, len(source.train))
        queries = source.queries.to_pylist()
        self.languages = list(dict.fromkeys(row["language"] for row in queries))
        self.examples = self._choose_examples(queries)

    def _choose_examples(self, rows: Sequence[dict[str, Any]]) -> list[list[str]]:
        """Choose the first examples of each language that have different labels."""
        chosen: dict[str, dict[str, list[str]]] = {name: {} for name in self.languages}
        for row in rows:
            by_label = chosen[row["language"]]
            if "tokens" in row and row["text_a"].split() != row["tokens"]:
                continue  # a word with a space in it, which cannot be typed
            label = self._full.label_of(row)
            if len(by_label) < EXAMPLES_PER_LANGUAGE and label not in by_label:
                by_label[label] = [row["text_a"], row["text_b"] or "", row["language"], label]
        return [example for by_label in chosen.values() for example in by_label.values()]

    def _open_views(self, model: str) -> list[tuple[str, str | None, Attributor]]:
        """Return (title, language of the mask, attributor) of each view; computed once per model.

        The attributors share the checkpoints in memory.
        """
        full = self._full if model == "full" else Attributor(self.folder, model)
        subnetworks = [
            (f"subnetwork {mask}", mask, full.under("subnetwork", mask)) for mask in self.masks
        ]
        return [(VIEW_NAMES["full"], None, full), *subnetworks]

    def explain(
        self,
        text_a: str,
        text_b: str | None,
        language: str,
        label: str | None = None,
        model: str = "full",
        listed_languages: Sequence[str] = (),
    ) -> Iterator[dict[str, Any]]:
        """Yield the influence on an example under each view, as soon as it is computed.

        The full model comes first, then the subnetwork of the example's language, then the others.

        Args:
            text_a, text_b: The texts.
            language: Their language.
            label: The label whose loss is explained; None for the full model's prediction, which
                is then explained in every view.
            model: `full` or `sparse`.
            listed_languages: The languages of the training examples that are listed; empty for all.
                Shares are always counted over all languages.

        Returns:
            A dict per view: `title`, `own` (whether it is the subnetwork of `language`), `label`,
            `prediction` and `probabilities`; `shares` and `opponent_shares`, the share of each
            training language among the `k` strongest; `proponents` and `opponents`, the first
            LISTED rows as `Attributor.query` returns them.

        Raises:
            ValueError: The text is empty, or as for `Attributor.query`.
        """
        if not text_a.strip():
            raise ValueError("text: expected a sentence, got an empty text")
        views = sorted(
            self._views(model), key=lambda view: (view[1] is not None, view[1] != language)
        )
        for title, mask_language, attributor in views:
            answer = attributor.query(text_a, text_b or None, label, self.k, language=language)
            label = answer["label"]
            listed = answer
            if listed_languages:
                listed = attributor.query(
                    text_a,
                    text_b or None,
                    label,
                    LISTED,
                    list(listed_languages),
                    language=language,
                )
            yield {
                "title": title,
                "own": mask_language == language,
                **{key: answer[key] for key in ("label", "prediction", "probabilities")},
                "shares": self._shares(answer["proponents"]),
                "opponent_shares": self._shares(answer["opponents"]),
                "proponents": [_with_tags(row) for row in listed["proponents"][:LISTED]],
                "opponents": [_with_tags(row) for row in listed["opponents"][:LISTED]],
            }

    def _shares(self, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return the share of each training language among rows of an answer."""
        languages = [row["language"] for row in rows]
        return {name: languages.count(name) / len(rows) for name in self.train_languages}


def _with_tags(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of an answer; of a token classifier, with the tags at their words."""
    if "tokens" not in row:
        return row
    return row | {"text_a": tagged_text(row["tokens"], row["label"].split()), "label": ""}


def _file(name: str) -> str:
    return resources.files("tracmod.attribution").joinpath(name).read_text(encoding="utf-8")


def page(explorer: Explorer) -> gr.Blocks:
    """Build the page; `serve` serves it."""
    heading = "# Which training examples support this prediction, and in which languages?\n"
    if explorer.masks:
        heading += (
            "Type a sentence, or click on a test example below. Influence is computed with all "
            "attention heads of the model and in the subnetwork of each language."
        )
    else:
        heading += "Type a sentence, or click on one of the queries below."

    def answer(*inputs: Any) -> Iterator[str]:
        yield from rendered(explorer, *inputs)

    name = explorer.folder.resolve().name
    with gr.Blocks(title=f"tracmod explore: {name}", analytics_enabled=False) as blocks:
        gr.Markdown(heading)
        with gr.Row():
            text_a = gr.Textbox(label="Text", lines=2, elem_id="text-a", scale=3)
            text_b = gr.Textbox(
                label="Second text",
                lines=2,
                elem_id="text-b",
                scale=3,
                visible=explorer.has_pairs,
            )
        with gr.Row():
            language = gr.Dropdown(
                explorer.languages, label="Language of the sentence", elem_id="language"
            )
            label = gr.Dropdown(
                [PREDICTED_LABEL, *explorer.labels],
                value=PREDICTED_LABEL,
                label="Label to explain",
                allow_custom_value=not explorer.labels,
                elem_id="label",
            )
            model = gr.Radio(
                [(MODEL_NAMES[name], name) for name in explorer.models],
                value="full",
                label="Model",
                visible=len(explorer.models) > 1,
            )
            listed = gr.Dropdown(
                explorer.train_languages,
                multiselect=True,
                elem_id="listed",
                label="Languages of the listed training examples (default: all)",
            )
        button = gr.Button("Show training examples", variant="primary", elem_id="ask")
        output = gr.HTML(elem_id="answer")
        gr.Examples(
            explorer.examples,
            [text_a, text_b, language, label],
            elem_id="examples",
            label="Test examples" if explorer.masks else "Queries",
            examples_per_page=max(1, len(explorer.examples)),
            cache_examples=False,
        )
        gr.on(
            [button.click, text_a.submit, text_b.submit],
            answer,
            [text_a, text_b, language, label, model, listed],
            output,
            api_name="ask",
            show_progress="minimal",
        )
    return blocks


def rendered(
    explorer: Explorer,
    text_a: str,
    text_b: str | None,
    language: str,
    label: str | None,
    model: str,
    listed_languages: Sequence[str] | None,
) -> Iterator[str]:
    """Yield the answers so far as HTML, after each view; an error ends them with its message."""
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(_file("explore.html.j2"))
    answers: list[dict[str, Any]] = []
    shown = {
        "answers": answers,
        "k": explorer.k,
        "languages": explorer.train_languages,
        "language": language,
        "unit": explorer.unit,
        "exponent": 0,
    }
    explained = None if label in (None, "", PREDICTED_LABEL) else label
    try:
        for answer in explorer.explain(
            text_a, text_b, language, explained, model, listed_languages or ()
        ):
            answers.append(answer)
            scores = [abs(row["score"]) for answer in answers for row in answer["proponents"]]
            shown["exponent"] = power_of_ten(max(scores))
            waiting = 1 + len(explorer.masks) - len(answers)
            yield template.render(error="", waiting=waiting, **shown)
    except (ValueError, OSError, RuntimeError) as error:
        message = " ".join(str(error).split())  # on one line
        yield template.render(error=message, waiting=0, **shown)


class _OwnPageOnly(BaseHTTPMiddleware):
    """Refuses requests from other web pages, and requests of the page to other hosts.

    A browser names the page that sends a request in `Origin`. Programs send no `Origin` and are
    answered. The Content-Security-Policy keeps the browser from loading anything from elsewhere.
    """

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        origin, host = request.headers.get("origin"), request.headers.get("host")
        if origin is not None and origin.partition("://")[2] != host:
            return PlainTextResponse(f"Origin: expected {host}, got {origin}", status_code=403)
        if request.method == "POST" and not request.url.path.startswith(ALLOWED_POSTS):
            return PlainTextResponse(f"POST {request.url.path} is not allowed", status_code=403)
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = (
            "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
        )
        response.headers["Referrer-Policy"] = "no-referrer"
        return response


def _allowed_hosts(host: str) -> list[str]:
    """Return the values of `Host` that are answered.

    With any other value allowed, a web page whose name is made to resolve to this machine (DNS
    rebinding) could read the examples through a visitor's browser. A server that listens on every
    address is reached under names that this machine does not know, so there all are allowed.
    """
    return ["*"] if host in EVERY_ADDRESS else [_in_url(name) for name in (host, *LOOPBACK)]


def _in_url(host: str) -> str:
    """Return a host as a URL writes it: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def serve(
    folder: str | Path, host: str = "127.0.0.1", port: int = 7860, *, block: bool = True
) -> gr.Blocks:
    """Serve the page until it is interrupted.

    Args:
        folder: A run folder with features, or a folder of `tracmod attribute`.
        host: The address to listen on. If it is not loopback, everyone who reaches it can use the
            page. The page answers to this name and to those of loopback; on 0.0.0.0 and :: to
            every name.
        port: The port to listen on.
        block: Whether to return only when interrupted. If False, call `close()` on the result.

    Raises:
        ValueError: As for `Attributor`, or nothing can listen on this address and port.
    """
    host = host.strip("[]")
    if host not in LOOPBACK:
        print(
            f"tracmod: WARNING: {host} is not loopback: everyone who reaches this address can "
            f"read the examples and use this machine",
            file=sys.stderr,
        )
    _check_address(host, port)  # before the models are loaded
    explorer = Explorer(folder)
    blocks = page(explorer)
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "sans-serif"]
    blocks.queue(default_concurrency_limit=1).launch(
        server_name=_in_url(host),
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Base(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=_file("explore.css"),
        app_kwargs={
            "middleware": [
                Middleware(TrustedHostMiddleware, _allowed_hosts(host), www_redirect=False),
                Middleware(_OwnPageOnly),
            ]
        },
    )
    print(f"tracmod: {explorer.folder} at {blocks.local_url}", file=sys.stderr)
    if block:
        blocks.block_thread()
    return blocks


def _check_address(host: str, port: int) -> None:
    """Raise ValueError if nothing can listen on an address and port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"{_in_url(host)}:{port}: expected an address and port to listen on, got: "
                f"{error.strerror or error}; choose others with --host or --port"
            ) from None
