"""Write the tables of RESULTS.md, and a picture of them, from the JSON files of the benchmarks.

    python bench/report.py

Every file bench/results/*.json becomes text and a table between the markers of its part in
RESULTS.md (`<!-- begin job -->` to `<!-- end job -->`), so that no figure is copied by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
# Load average before a benchmark above which its times are marked as disturbed by other programs.
BUSY = 0.5
METHODS = {
    "naive": "naive TracIn",
    "hooks": "batched plain torch, hooks",
    "exact": "tracmod, exact",
    "rademacher": "tracmod, rademacher",
    "sjlt": "tracmod, sjlt",
    "rademacher-bfloat16": "tracmod, rademacher, bfloat16 pass",
}


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return the lines of a Markdown table.

    Floats are written with three digits, integers with thousands separators, None as an empty cell.
    """
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(_text(cell) for cell in row) + " |" for row in rows]


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, int):
        return f"{cell:,}"
    if not isinstance(cell, float):
        return str(cell)
    if abs(cell) >= 100:
        return f"{cell:,.0f}"
    return f"{cell:.3g}" if abs(cell) >= 0.001 else f"{cell:.1e}"


def _label(name: str) -> str:
    """Return the name of a method for readers; in the JSON files tracmod is `ours`."""
    return name.replace("ours", "tracmod")


def environment_text(result: dict[str, Any]) -> str:
    """Return the device, versions and commit with which a result was measured."""
    e = result["environment"]
    threads = f", {e['threads']} thread{'s' * (e['threads'] != 1)}"
    versions = f"torch {e['torch']}, transformers {e['transformers']}"
    on_cpu = e["device_type"] == "cpu"
    return f"{e['device']}{threads * on_cpu}, {versions}, commit {e['commit']}."


def section(result: dict[str, Any]) -> list[str]:
    """Return the lines for one result: what was measured and where, and its table."""
    return PARTS[result["part"]](result)


def collect_section(result: dict[str, Any]) -> list[str]:
    seconds, floor = result["seconds"], result["seconds"]["floor float32"]
    share_of_bfloat16_floor = result["share_of_bfloat16_floor"]
    count = result["examples"]
    rows = [
        [name, s, count / s, s / floor, share_of_bfloat16_floor.get(name)]
        for name, s in seconds.items()
    ]
    head = ["Pass", "Seconds", "Examples/s", "Time (x float32 floor)", "Time (x bfloat16 floor)"]
    heads = ", ".join(
        f"{name.removeprefix('heads ')} of the heads {share:.2f}"
        for name, share in result["heads_share_of_full"].items()
    )
    lines = [
        f"**{result['shape']}**, {count:,} examples of 16 to 128 tokens, K = {result['dim']:,}: "
        + environment_text(result),
        "",
        *table(head, rows),
        "",
        f"Time relative to the full model when heads are masked: {heads}. Scores from a bfloat16 "
        f"pass have a Spearman correlation of {result['bfloat16_agreement']['spearman']:.4f} with "
        f"those from a float32 pass. Largest error of a float32 row: "
        f"{result['errors']['rademacher float32']:.0e} of its norm.",
    ]
    if "naive" in result:
        naive = result["naive"]
        best = min(naive["naive_seconds_per_example"].values())
        lines += [
            "",
            f"The gradient of naive TracIn alone takes {best * 1e3:.2f} ms per example (the better "
            f"of float32 and bfloat16). The features of tracmod, with scores of "
            f"{naive['queries']:,} queries, take {naive['ours_seconds_per_example'] * 1e3:.4f} ms. "
            f"Speed-up over naive: {naive['times_naive']:.0f}.",
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
        f"{result['k']} strongest examples of each sign, sums by language, K = {result['dim']:,}: "
        f"{environment_text(result)} Peak memory is that of the whole process, of which imports "
        f"take {base:,.0f} MiB.",
        "",
        *table(
            ["Method", "Gradients (s)", "Examples/s", "Scoring (s)", "Total (s)",
             "Speed-up over naive", "Peak memory (MiB)", "Peak memory (x naive)", "Spearman",
             "Top-10 overlap", "RMSE"],
            rows,
        ),
    ]  # fmt: skip


def fidelity_section(result: dict[str, Any]) -> list[str]:
    head = ["Features", "Kind", "K", "Bytes per example", "RMSE", "RMSE of the worst seed",
            "Spearman", "Top-10 overlap"]  # fmt: skip
    rows = [
        [_label(row["form"]), row["kind"], row["dim"], row["bytes_per_row"]]
        # Four decimals: correlations near 1 differ in the fourth.
        + [f"{row[key]:.4f}" for key in ("rmse", "rmse_worst", "spearman", "top10")]
        for row in result["table"]
    ]
    return [
        f"{result['query']:,} x {result['train']:,} cosines of the last checkpoint against exact "
        f"cosines (which differ from float64 by at most {result['exact_error']:.0e}), mean over "
        f"{result['seeds']} seeds of the projection: {environment_text(result)}",
        "",
        *table(head, rows),
    ]


def scale_search_section(result: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in result["methods"].items():
        size = result["bytes_per_example"].get(name.removeprefix("ours "))
        rows.append([
            _label(name), row["seconds"], f"{row['speed_of_matmul']:.0%}",
            round(row["peak_bytes"] / 1e6), round(row["base_bytes"] / 1e6),
            round(size) if size and "ours" in name else None, row.get("build_seconds"),
        ])  # fmt: skip
    return [
        f"{result['rows']:,} training rows of {result['dim']:,} random numbers, "
        f"{result['queries']:,} queries, the {result['k']} strongest rows of each sign, "
        f"{result['groups']} groups, a memory budget of {result['memory'] / 1e9:g} GB for tracmod: "
        f"{environment_text(result)} Seconds are those of the best round, peak memory that of the "
        "worst.",
        "",
        *table(
            ["Method", "Seconds", "Speed (share of torch.matmul)", "Peak memory (MB)",
             "After imports (MB)", "Bytes per example", "Build (s)"],
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
        f"{collected['memory']:.2f} s ({writing['added']:+.1%}).",
        f"- Opening a store of {opening['shards']:,} shards: {1e3 * opened['open']:.2f} ms, or "
        f"{1e3 * opened['read']:.2f} ms with reading a first row.",
        f"- Verifying {verifying['bytes'] / 1e9:.1f} GB, in GB/s: "
        + "; ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
        + ".",
        "",
        environment_text(result),
    ]


def index_section(result: dict[str, Any]) -> list[str]:
    def shares(recall: dict[str, float]) -> list[str | None]:
        # Three decimals: recall near 1 differs in the third.
        return [f"{recall[side]:.3f}" if recall else None for side in ("proponents", "opponents")]

    rows = []
    for row in result["table"]:
        probed = f"{row['effort']} of {row['lists']} lists" if row.get("lists") else None
        rows.append([
            row["dim"], row["name"], round(row["bytes"]), row.get("fixed_bytes", 0) / 1e6 or None,
            *shares(row["recall"]), *shares(row.get("rescored", {})), probed,
            row.get("build_seconds"), row.get("milliseconds"),
        ])  # fmt: skip
    busy = result["load_before"] > BUSY
    times = "Other programs were running, so the times are only a rough guide. " if busy else ""
    return [
        f"{result['train']:,} training and {result['query']:,} test examples, "
        f"{result['checkpoints']} checkpoints, cosine, the k = {result['k']} strongest of each "
        f"sign by float32 rows. Indexes were tuned for a recall of {result['recall_asked']}; "
        f"{result['candidates']} k candidates of each sign are rescored. {times}"
        f"{environment_text(result)}",
        "",
        *table(
            ["K", "Rows or index", "Bytes per example", "Fixed size (MB)", "Recall: proponents",
             "Recall: opponents", "Rescored: proponents", "Rescored: opponents", "Lists probed",
             "Build (s)", "Query (ms)"],
            rows,
        ),
    ]  # fmt: skip


def engine_table(result: dict[str, Any]) -> list[str]:
    efficiency = result["efficiency"]
    rows = [
        [name, seconds, f"{efficiency[name]:.0%}" if name in efficiency else None]
        for name, seconds in result["seconds"].items()
    ]
    return table(["Engine", "Seconds", "Parallel efficiency with two workers"], rows)


def engine_section(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{result['shards']:,} shards of 256 examples, {result['train']:,} training examples per "
        f"language, one thread per worker: {environment_text(result)} Time of Ray with one worker, "
        f"relative to the local engine: {result['ray_adds']:+.1%}.",
        "",
        *engine_table(result),
    ]
    if "attribution" in result:
        lines += [
            "",
            "A whole `tracmod attribute` of the same examples and two checkpoints:",
            "",
            *engine_table(result["attribution"]),
        ]
    return lines


def waiting_section(result: dict[str, Any]) -> list[str]:
    rows = []
    for function in result["functions"]:
        quiet, busy = result["quiet"][function], result["busy"][function]
        for policy in quiet:
            (wall, cpu), (busy_wall, busy_cpu) = quiet[policy], busy[policy]
            rows.append([
                function, policy, 1e3 * wall, wall / quiet["OpenMP's default"][0], 1e3 * cpu,
                1e3 * busy_wall, busy_wall / busy["sleep at once"][0], 1e3 * busy_cpu,
            ])  # fmt: skip
    disturbed = (
        f" The load of other programs was {result['load_before']:.1f} when it began: `quiet` "
        f"was not quiet."
        if result["load_before"] > BUSY
        else ""
    )
    return [
        f"{environment_text(result)}{disturbed}",
        "",
        *table(
            ["Work", "Policy", "Quiet (ms)", "Quiet (x default)", "Quiet, CPU (ms)", "Busy (ms)",
             "Busy (x sleep at once)", "Busy, CPU (ms)"],
            rows,
        ),
    ]  # fmt: skip


def preconditioner_section(result: dict[str, Any]) -> list[str]:
    seconds, count = result["seconds"], result["examples"]
    rows = [
        [name, s, count / s, s / seconds["plain"], result["checked"].get(name, {}).get("rmse")]
        for name, s in seconds.items()
    ]
    head = ["Preconditioner", "Seconds", "Examples/s", "Time (x plain)", "RMSE of a cosine"]
    return [
        f"**{result['shape']}**, {count:,} examples of 16 to 128 tokens, K = {result['dim']:,}; "
        f"fitting EK-FAC on them takes {result['fit_seconds']:.1f} s. {environment_text(result)}",
        "",
        *table(head, rows),
    ]


def exact_section(result: dict[str, Any]) -> list[str]:
    how = "extrapolated from a tenth of each side" if result["extrapolated"] else "measured"
    return [
        f"**{result['shape']}**, {result['train']:,} training x {result['query']:,} test examples, "
        f"one checkpoint: {result['seconds']:.1f} s ({how}); largest error of a cosine against "
        f"float64 {result['error']:.0e}. {environment_text(result)}"
    ]


def peers_section(result: dict[str, Any]) -> list[str]:
    rows = []
    for row in result["methods"].values():
        missing = _missing(row)
        if missing:
            rows.append([missing, *[None] * 10])
            continue
        near = row.get("fidelity", {})
        dot, cosine = near.get("dot", {}), near.get("cosine", {})
        rows.append([
            _versioned(row), row.get("numbers"), row.get("times_floor"), row.get("times_lean"),
            row["peak_bytes"] / 2**20, *_decimals(dot, "top10", "spearman"),
            *_decimals(cosine, "top10", "rmse", "spearman"), row.get("script_lines"),
        ])  # fmt: skip
    measured = [row for row in result["methods"].values() if "cpu_seconds" in row]
    loads = [row["load_before"] for row in measured if "load_before" in row]
    count = result["train"] + result["query"]
    floors = "; ".join(
        f"{row['label']} {1e3 * row['cpu_seconds'] / count:.1f} ms an example, in batches of "
        f"{row['batch_size']}"
        for row in measured
        if "batch_size" in row
    )
    return [
        f"**{result['model']}**, {result['train']:,} training and {result['query']:,} query "
        f"examples of {result['tokens_per_example']:.0f} tokens on average, best of "
        f"{result['rounds']} rounds; {floors}. Load average before a measurement: "
        f"{min(loads):.1f} to {max(loads):.1f}. {environment_text(result)}",
        "",
        *table(
            ["Method", "Numbers per example", "Time (x plain floor)", "Time (x lean floor)",
             "Peak memory (MiB)", "Dot: top-10", "Dot: Spearman", "Cosine: top-10", "Cosine: RMSE",
             "Cosine: Spearman", "Lines of script"],
            rows,
        ),
    ]  # fmt: skip


def peers_job_section(result: dict[str, Any]) -> list[str]:
    rows = []
    for row in result["methods"].values():
        missing = _missing(row)
        if missing:
            rows.append([missing, *[None] * 4])
            continue
        peak = row["peak_bytes"] / 2**20 if "peak_bytes" in row else None
        rows.append([
            row["label"], row["process_cpu_seconds"], peak, row.get("script_lines"),
            f"{row['load_before']:.1f}",
        ])  # fmt: skip
    return [
        f"{result['train']:,} training and {result['query']:,} query examples, "
        f"{result['checkpoints']} checkpoints of the trained model: {environment_text(result)}",
        "",
        *table(
            ["Method", "CPU time (s)", "Peak memory (MiB)", "Lines of script", "Load before"], rows
        ),
    ]


def _missing(row: dict[str, Any]) -> str | None:
    """Return the name of a method that has no measurement, with the reason."""
    if row.get("absent"):
        return f"{row['label']}: not installed"
    return f"{row['label']}: failed, {row['failed']}" if "failed" in row else None


def _versioned(row: dict[str, Any]) -> str:
    """Return the name of a method with the version of its library and a star if measured again."""
    own = row["package"] in ("tracmod", "torch")
    name = row["label"] if own else f"{row['label']} ({row['package']} {row['version']})"
    return f"{name} \\*" if row.get("measured_again") else name


def _decimals(near: dict[str, float], *names: str) -> list[str | None]:
    return [f"{near[name]:.3f}" if near else None for name in names]


def kernels_section(result: dict[str, Any]) -> list[str]:
    limits = result["limits"]
    rows = []
    for row in result["cases"]:
        if "native_seconds" not in row:
            note = row.get("failed", None if row["right"] else "wrong result")
            rows.append([row["op"], row["shape"], *[None] * 7, note])
            continue
        notes = [f"{k}: {v:.2f}" for k, v in row.items() if k.endswith("matmul_share")]
        if not row["right"]:
            notes.append(f"wrong result: off by {row['error']:.0e}, allowed {row['allowed']:.0e}")
        rows.append([
            row["op"], row["shape"], row["plain_seconds"] * 1e3, row["native_seconds"] * 1e3,
            f"{row['times_plain']:.2f}", row["gbytes_per_second"], row["tflops"],
            f"{row['share_of_limit']:.0%} {row['bound_by']}",
            f"{row['inputs_share_of_copy']:.0%}", "; ".join(notes) or None,
        ])  # fmt: skip
    return [
        f"**{result['dtype']}**: {environment_text(result)} Limits: copy "
        f"{limits['bytes_per_second'] / 1e9:,.0f} GB/s, matrix product "
        f"{limits['flops_per_second'] / 1e12:.3g} TFLOP/s.",
        "",
        *table(
            ["Op", "Size", "Plain torch (ms)", "tracmod (ms)", "Speed-up over plain torch", "GB/s",
             "TFLOP/s", "Share of the limit", "Inputs (share of copy)", "Note"],
            rows,
        ),
    ]  # fmt: skip


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"


def predictions_section(result: dict[str, Any]) -> list[str]:
    """Compare predictions with what was measured; columns of measurements are empty without any."""
    lines = []
    for dtype, cases in result["predicted"].items():
        rows = []
        for name, case in cases.items():
            row = result["measured"].get(dtype, {}).get(name, {})
            seconds, share = row.get("native_seconds"), row.get("share_of_limit")
            rows.append([
                name, case["bytes"] / 1e6, case["operations"] / 1e9, case["bound_by"],
                case["seconds"] * 1e3, _percent(case["share_of_limit"]),
                None if seconds is None else seconds * 1e3,
                None if share is None else _percent(share), case["reason"],
            ])  # fmt: skip
        lines += [
            f"**{dtype}**",
            "",
            *table(
                ["Op and size", "MB", "Gflop", "Limit", "Predicted (ms)", "Predicted share",
                 "Measured (ms)", "Measured share", "What the prediction rests on"],
                rows,
            ),
            "",
        ]  # fmt: skip
    return lines[:-1]


# In the order of the page.
def families_section(result: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            "yes" if row["lean"] else "no",
            row["ratio"]["float32"],
            row["ratio"]["bfloat16"],
            row["seconds"]["collect bfloat16"] / row["seconds"]["floor float32"],
        ]
        for name, row in result["models"].items()
    ]
    head = ["Model", "Lean", "float32 (x its floor)", "bfloat16 (x its floor)",
            "bfloat16 (x float32 floor)"]  # fmt: skip
    return [
        f"K = 4,096, load average before it {result['load']:.1f}. " + environment_text(result),
        "",
        *table(head, rows),
    ]


PARTS = {
    "peers": peers_section,
    "peers-job": peers_job_section,
    "collect": collect_section,
    "job": job_section,
    "fidelity": fidelity_section,
    "scale-search": scale_search_section,
    "scale-store": scale_store_section,
    "index": index_section,
    "engine": engine_section,
    "waiting": waiting_section,
    "preconditioner": preconditioner_section,
    "families": families_section,
    "exact": exact_section,
    "kernels": kernels_section,
    "predictions": predictions_section,
}


# --- the page and the picture ---------------------------------------------------------------


def fill(page: str, results: Sequence[dict[str, Any]]) -> str:
    """Return the page with the text of every part between its markers.

    Raises:
        ValueError: the page lacks the markers of a part, or has them twice.
    """
    for part in PARTS:
        sections = [section(result) for result in results if result["part"] == part]
        text = "\n\n".join("\n".join(lines) for lines in sections) or "Not measured yet."
        pattern = rf"(<!-- begin {part} -->\n).*?(<!-- end {part} -->)"
        page, count = re.subn(pattern, lambda m, t=text: f"{m[1]}{t}\n{m[2]}", page, flags=re.S)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"RESULTS.md: expected one pair of markers for {part}, got {count}")
    return page


def bar_groups(results: Sequence[dict[str, Any]]) -> list[tuple[str, list[tuple[str, float]]]]:
    """Return the groups of the picture's bars: a title, and (label, number) for each bar."""
    groups = []
    for result in results:
        device = result["environment"]["device_type"].replace("cuda", "GPU").replace("cpu", "CPU")
        if result["part"] == "job" and "naive" in result["methods"]:
            bars = [(METHODS[n], row["times_naive"]) for n, row in result["methods"].items()]
            title = f"Whole job on a {device}: speed-up over naive TracIn (longer is faster)"
            groups.append((title, bars))
        if result["part"] == "collect":
            floor = result["seconds"]["floor float32"]
            bars = [(n, s / floor) for n, s in result["seconds"].items() if "heads" not in n]
            title = f"Collection, {result['shape']} model on a {device}: time"
            groups.append((f"{title} (x plain float32 floor; shorter is faster)", bars))
    return groups


def picture(results: Sequence[dict[str, Any]]) -> str:
    """Draw horizontal bars as SVG; each group has its own scale."""
    y, parts = 8, []
    for title, bars in bar_groups(results):
        y += 22
        parts.append(f'<text x="10" y="{y}" font-weight="bold">{escape(title)}</text>')
        longest = max(value for _, value in bars)
        for label, value in bars:
            y += 20
            colour = "#888" if label.startswith(("floor", "naive", "batched")) else "#2a6fbb"
            width = 420 * value / longest
            parts.append(
                f'<text x="250" y="{y}" text-anchor="end">{escape(label)}</text>'
                f'<rect x="260" y="{y - 12}" width="{width:.1f}" height="15" fill="{colour}"/>'
                f'<text x="{266 + width:.1f}" y="{y}">{value:.3g}</text>'
            )
        y += 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{y + 10}" '
        f'font-family="sans-serif" font-size="13">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def write(folder: Path) -> None:
    """Write RESULTS.md and results/speed.svg of a benchmark folder from its results/*.json."""
    files = sorted((folder / "results").glob("*.json"))
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    measured: dict[str, dict[str, Any]] = {}
    for result in results:
        if result["part"] == "kernels" and result["environment"]["device_type"] == "cuda":
            rows = {f"{row['op']}, {row['shape']}": row for row in result["cases"]}
            measured.setdefault(result["dtype"], {}).update(rows)
    predicted = json.loads((FOLDER / "predictions.json").read_text(encoding="utf-8"))
    predictions = {"part": "predictions", "predicted": predicted, "measured": measured}
    page = folder / "RESULTS.md"
    page.write_text(
        fill(page.read_text(encoding="utf-8"), [*results, predictions]), encoding="utf-8"
    )
    (folder / "results" / "speed.svg").write_text(picture(results), encoding="utf-8")


if __name__ == "__main__":
    write(FOLDER)
