"""Writes the tables of RESULTS.md, and a picture, from the JSON of the benchmarks.

    python bench/report.py

Every file of bench/results/*.json becomes a table between the markers of its part in RESULTS.md
(`<!-- begin job -->` to `<!-- end job -->`), so that no figure is copied by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PARTS = (
    "collect",
    "job",
    "fidelity",
    "scale-search",
    "scale-store",
    "index",
    "engine",
    "preconditioner",
    "exact",
    "kernels",
)
BUSY = 0.5  # load average before the benchmark, from which its times are not a quiet machine's
METHODS = {
    "naive": "naive TracIn",
    "hooks": "batched plain torch, hooks",
    "exact": "ours, exact",
    "rademacher": "ours, rademacher",
    "sjlt": "ours, sjlt",
    "rademacher-bfloat16": "ours, rademacher, bfloat16 pass",
}


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table; a float is given three digits, None is left empty."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(_text(cell) for cell in row) + " |" for row in rows]


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    if not isinstance(cell, float):
        return f"{cell:,}" if isinstance(cell, int) else str(cell)
    return (
        f"{cell:,.0f}"
        if abs(cell) >= 100
        else f"{cell:.3g}"
        if abs(cell) >= 0.001
        else f"{cell:.1e}"
    )


def made(result: dict[str, Any]) -> str:
    """Where and with what a table was measured."""
    e = result["environment"]
    threads = f", {e['threads']} threads" if e["device_type"] == "cpu" else ""
    versions = f"torch {e['torch']}, transformers {e['transformers']}"
    return f"{e['device']}{threads}, {versions}, commit {e['commit']}."


def section(result: dict[str, Any]) -> list[str]:
    """A part's text: what was measured and where, and its table."""
    return _SECTIONS[result["part"]](result)


def collect_section(result: dict[str, Any]) -> list[str]:
    seconds, floor = result["seconds"], result["seconds"]["floor float32"]
    low = result["share_of_bfloat16_floor"]
    count = result["examples"]
    rows = [[n, s, count / s, s / floor, low.get(n)] for n, s in seconds.items()]
    lines = [
        f"**{result['shape']}**, {count:,} examples of 16 to 128 tokens, K = {result['dim']:,}: "
        + made(result),
        "",
        *table(["pass", "seconds", "examples/s", "of float32 floor", "of bfloat16 floor"], rows),
        "",
        "Time with a share of the heads kept, of the full model's: "
        + ", ".join(f"{n} {s:.2f}" for n, s in result["heads_share_of_full"].items())
        + f". Scores from a bfloat16 pass: Spearman {result['bfloat16_agreement']['spearman']:.4f} "
        f"with float32's. Largest error of a float32 row: "
        f"{result['errors']['rademacher float32']:.0e} of its norm.",
    ]
    if "naive" in result:
        naive = result["naive"]
        best = min(naive["naive_seconds_per_example"].values())
        lines += [
            "",
            f"Naive TracIn's gradient alone takes {best * 1e3:.2f} ms for an example (the better "
            f"of float32 and bfloat16); ours, features and scores of {naive['queries']:,} queries, "
            f"{naive['ours_seconds_per_example'] * 1e3:.4f} ms: {naive['times_naive']:.0f} times "
            f"naive.",
        ]
    return lines


def job_section(result: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in result["methods"].items():
        seconds, near = row["seconds"], row.get("agreement", {})
        label = METHODS[name]
        if row["extrapolated"]:
            label += f" (extrapolated from {row['measured_train']:,} training examples)"
        rows.append([
            label, seconds.get("gradients"), row.get("gradients_per_second"),
            seconds.get("scoring"), seconds["whole"], row.get("times_naive"),
            row["peak_bytes"] / 2**20, row.get("share_of_naive_memory"), near.get("spearman"),
            near.get("top10"), near.get("rmse"),
        ])  # fmt: skip
    base = max(row["base_bytes"] for row in result["methods"].values()) / 2**20
    return [
        f"{result['train']:,} training and {result['query']:,} test examples of "
        f"{result['tokens_per_example']:.0f} tokens, {result['checkpoints']} checkpoints, the "
        f"{result['k']} best and worst, sums by language, K = {result['dim']:,}: {made(result)} "
        f"Peak memory is that of the process, {base:,.0f} MiB of it after imports.",
        "",
        *table(
            ["method", "gradients s", "examples/s", "scoring s", "whole s", "times naive",
             "peak MiB", "of naive's", "Spearman", "top-10 overlap", "RMSE"],
            rows,
        ),
    ]  # fmt: skip


def fidelity_section(result: dict[str, Any]) -> list[str]:
    head = ["row", "kind", "K", "bytes", "RMSE", "worst seed's", "Spearman", "top-10 overlap"]
    keys = ["form", "kind", "dim", "bytes_per_row", "rmse", "rmse_worst", "spearman", "top10"]
    rows = [[_digits(key, row[key]) for key in keys] for row in result["table"]]
    return [
        f"{result['query']:,} x {result['train']:,} cosines of the last checkpoint against exact "
        f"ones (off by at most {result['exact_error']:.0e} from float64), mean of "
        f"{result['seeds']} seeds of the projection: {made(result)}",
        "",
        *table(head, rows),
    ]


def _digits(key: str, value: Any) -> Any:
    """Correlations near 1 differ in the fourth place."""
    return f"{value:.4f}" if key.startswith(("rmse", "spearman", "top10")) else value


def scale_search_section(result: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in result["methods"].items():
        size = result["bytes_per_example"].get(name.removeprefix("ours "))
        rows.append([
            name, row["seconds"], f"{row['speed_of_matmul']:.0%}", round(row["peak_bytes"] / 1e6),
            round(row["base_bytes"] / 1e6), round(size) if size and "ours" in name else None,
            row.get("build_seconds"),
        ])  # fmt: skip
    return [
        f"{result['rows']:,} training rows of {result['dim']:,} made numbers, "
        f"{result['queries']:,} queries, the {result['k']} best and worst, {result['groups']} "
        f"groups, a budget of {result['memory'] / 1e9:g} GB for ours: {made(result)} Best of the "
        "rounds, the largest peak.",
        "",
        *table(
            ["method", "seconds", "speed of torch.matmul", "peak MB", "of it after imports",
             "bytes per example", "build s"],
            rows,
        ),
    ]  # fmt: skip


def scale_store_section(result: dict[str, Any]) -> list[str]:
    writing, opening, verifying = (result[key] for key in ("writing", "opening", "verifying"))
    collected, opened = writing["seconds"], opening["seconds"]
    rates = verifying["gbytes_per_second"]
    return [
        f"- Writing: {writing['examples']:,} examples of 16 to 128 tokens, mini model, K = 4,096: "
        f"collecting into a store took {collected['store']:.2f} s, into memory "
        f"{collected['memory']:.2f} s: {writing['added']:+.1%}.",
        f"- Opening a store of {opening['shards']:,} shards: {1e3 * opened['open']:.2f} ms, with "
        f"a first row read {1e3 * opened['read']:.2f} ms.",
        f"- Verifying {verifying['bytes'] / 1e9:.1f} GB, in GB/s: "
        + "; ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
        + ".",
        "",
        made(result),
    ]


def index_section(result: dict[str, Any]) -> list[str]:
    rows = []
    for row in result["table"]:
        rescored = row.get("rescored", {})
        probed = f"{row['effort']} of {row['lists']} lists" if row.get("lists") else None
        rows.append([
            row["dim"], row["name"], round(row["bytes"]), row.get("fixed_bytes", 0) / 1e6 or None,
            *_shares(row["recall"]), *_shares(rescored), probed, row.get("build_seconds"),
            row.get("milliseconds"),
        ])  # fmt: skip
    busy = result["load_before"] > BUSY
    times = "Times were taken beside other work, and say little. " if busy else ""
    return [
        f"{result['train']:,} training and {result['query']:,} test examples, "
        f"{result['checkpoints']} checkpoints, cosine, the {result['k']} strongest of each sign by "
        f"float32 rows; a recall of {result['recall_asked']} was asked for. {times}"
        f"{made(result)}",
        "",
        *table(
            ["K", "what", "bytes per example", "MB once", "recall, proponents", "opponents",
             f"of {result['candidates']} k, rescored: proponents", "opponents", "probed",
             "build s", "ms per query"],
            rows,
        ),
    ]  # fmt: skip


def _shares(recall: dict[str, float]) -> list[str | None]:
    """Recall near 1 differs in the third place."""
    return [f"{recall[side]:.3f}" if recall else None for side in ("proponents", "opponents")]


def engine_section(result: dict[str, Any]) -> list[str]:
    efficiency = result["efficiency"]
    rows = [
        [name, seconds, f"{efficiency[name]:.0%}" if name in efficiency else None]
        for name, seconds in result["seconds"].items()
    ]
    return [
        f"{result['shards']:,} shards of 256 examples, {result['train']:,} training examples a "
        f"language, every worker with one thread: {made(result)} Ray adds "
        f"{result['ray_adds']:+.1%} with one worker.",
        "",
        *table(["engine", "seconds", "of twice one worker's speed"], rows),
    ]


def preconditioner_section(result: dict[str, Any]) -> list[str]:
    seconds, count = result["seconds"], result["examples"]
    rows = []
    for name, passed in seconds.items():
        close = result["checked"].get(name, {})
        rows.append([name, passed, count / passed, passed / seconds["plain"], close.get("rmse")])
    return [
        f"**{result['shape']}**, {count:,} examples of 16 to 128 tokens, K = {result['dim']:,}; "
        f"fitting EK-FAC on them {result['fit_seconds']:.1f} s. {made(result)}",
        "",
        *table(["metric", "seconds", "examples / s", "times plain", "error of a cosine"], rows),
    ]


def exact_section(result: dict[str, Any]) -> list[str]:
    said = "extrapolated from a tenth by a tenth" if result["extrapolated"] else "measured"
    return [
        f"**{result['shape']}**, {result['train']:,} training x {result['query']:,} test examples, "
        f"one checkpoint: {result['seconds']:.1f} s ({said}); largest error of a cosine against "
        f"float64 {result['error']:.0e}. {made(result)}"
    ]


def kernels_section(result: dict[str, Any]) -> list[str]:
    limits = result["limits"]
    rows = []
    for row in result["cases"]:
        if not row["right"]:
            rows.append([row["op"], row["shape"], *[None] * 7, row.get("failed", "wrong result")])
            continue
        beside = [f"{k}: {v:.2f}" for k, v in row.items() if k.endswith("matmul_share")]
        rows.append([
            row["op"], row["shape"], row["plain_seconds"] * 1e3, row["native_seconds"] * 1e3,
            f"{row['times_plain']:.2f}", row["gbytes_per_second"], row["tflops"],
            f"{row['share_of_limit']:.0%} {row['bound_by']}",
            f"{row['inputs_share_of_copy']:.0%}", "; ".join(beside) or None,
        ])  # fmt: skip
    return [
        f"**{result['dtype']}**: {made(result)} Copy {limits['bytes_per_second'] / 1e9:,.0f} GB/s, "
        f"matrix product {limits['flops_per_second'] / 1e12:.3g} TFLOP/s.",
        "",
        *table(
            ["op", "size", "plain ms", "ours ms", "times plain", "GB/s", "TFLOP/s", "of the limit",
             "inputs, of copy", "note"],
            rows,
        ),
    ]  # fmt: skip


_SECTIONS = {
    "collect": collect_section,
    "job": job_section,
    "fidelity": fidelity_section,
    "scale-search": scale_search_section,
    "scale-store": scale_store_section,
    "index": index_section,
    "engine": engine_section,
    "preconditioner": preconditioner_section,
    "exact": exact_section,
    "kernels": kernels_section,
}


# --- the page and the picture ---------------------------------------------------------------


def fill(page: str, results: Sequence[dict[str, Any]]) -> str:
    """The page with every part's tables between its markers.

    Raises:
        ValueError: a part without markers.
    """
    for part in PARTS:
        found = [section(result) for result in results if result["part"] == part]
        text = "\n\n".join("\n".join(lines) for lines in found) or "Not measured yet."
        pattern = rf"(<!-- begin {part} -->\n).*?(<!-- end {part} -->)"
        page, count = re.subn(pattern, lambda m, t=text: f"{m[1]}{t}\n{m[2]}", page, flags=re.S)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"RESULTS.md: expected one pair of markers for {part}, got {count}")
    return page


def bars(results: Sequence[dict[str, Any]]) -> list[tuple[str, list[tuple[str, float]]]]:
    """The picture's groups: a title, and a label and a number for each bar."""
    groups = []
    for result in results:
        device = result["environment"]["device_type"].replace("cuda", "GPU").replace("cpu", "CPU")
        if result["part"] == "job" and "naive" in result["methods"]:
            rows = [(METHODS[n], row["times_naive"]) for n, row in result["methods"].items()]
            groups.append(
                (f"The whole job on a {device}, times naive TracIn (longer: faster)", rows)
            )
        if result["part"] == "collect":
            floor = result["seconds"]["floor float32"]
            rows = [(n, s / floor) for n, s in result["seconds"].items() if "heads" not in n]
            title = f"Collection, {result['shape']} model on a {device}: time over the plain"
            groups.append((f"{title} float32 floor (shorter: faster)", rows))
    return groups


def picture(results: Sequence[dict[str, Any]]) -> str:
    """Horizontal bars as SVG; each group has its own scale."""
    y, parts = 8, []
    for title, rows in bars(results):
        y += 22
        parts.append(f'<text x="10" y="{y}" font-weight="bold">{escape(title)}</text>')
        longest = max(value for _, value in rows)
        for label, value in rows:
            y += 20
            colour = "#888" if label.startswith(("floor", "naive", "batched")) else "#2a6fbb"
            width = 420 * value / longest
            parts.append(
                f'<text x="230" y="{y}" text-anchor="end">{escape(label)}</text>'
                f'<rect x="240" y="{y - 12}" width="{width:.1f}" height="15" fill="{colour}"/>'
                f'<text x="{246 + width:.1f}" y="{y}">{value:.3g}</text>'
            )
        y += 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="740" height="{y + 10}" '
        f'font-family="sans-serif" font-size="13">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def write(folder: Path) -> None:
    """RESULTS.md and results/speed.svg of a bench folder."""
    files = sorted((folder / "results").glob("*.json"))
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    page = folder / "RESULTS.md"
    page.write_text(fill(page.read_text(encoding="utf-8"), results), encoding="utf-8")
    (folder / "results" / "speed.svg").write_text(picture(results), encoding="utf-8")


if __name__ == "__main__":
    write(FOLDER)
