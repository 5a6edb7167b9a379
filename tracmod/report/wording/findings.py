"""The plain-language summary: what was found, how sure, what not to conclude. From the numbers."""

from __future__ import annotations

from typing import Any

from tracmod.report.wording.labels import (
    LEVEL,
    MODEL_NAMES,
    VIEW_NAMES,
    is_clear,
    number,
    p_value,
    percent,
    percent_interval,
    points_interval,
)

Row = dict[str, Any]
CONTROLS = {
    "label_distance": "different label balance",
    "seed_similarity": "agreement from seed to seed",
}


def findings(summary: Row) -> list[str]:
    """What was found, a sentence or two each, most important first."""
    found = [_accuracy(summary), _reliance(summary), same_group(summary)]
    found += [_subnetworks(summary, "full"), _sparse(summary), _subnetworks(summary, "sparse")]
    found += [seeds(summary), _similarity(summary), _distances(summary)]
    return [text for text in found if text]


def tiles(summary: Row) -> list[Row]:
    """Share of the own language among proponents: the headline numbers of up to four views."""
    shown = []
    for model in ("full", "sparse"):
        for view in ("full", "subnetwork"):
            entry = _find(summary["in_language"], model=model, view=view)
            if entry:
                share = entry["share_positive"]
                interval = f"{100 * share['low']:.1f} to {100 * share['high']:.1f}%"
                name = f"{MODEL_NAMES[model]}, {VIEW_NAMES[view]}"
                shown.append({"name": name, "value": percent(share["value"]), "low_high": interval})
    return shown


def how_sure(summary: Row) -> list[str]:
    """What the intervals cover and what they do not."""
    settings = summary["settings"]
    tests = sum(summary["num_test"].values())
    texts = [
        f"Numbers in parentheses are {percent(settings['confidence'], 0)} intervals: "
        f"{settings['bootstrap']:,} bootstrap resamples of {tests:,} test examples (translations "
        "of one item are drawn together). They say how the result would vary with other test "
        "examples; they do not cover another training run, another seed, or other training data."
    ]
    if summary["k"] and summary["k"] < summary.get("asked_k", 0):
        texts.append(
            f"Shares were to be counted over {summary['asked_k']:,} training examples; there are "
            f"{summary['k']:,}, so all of them are counted and every share is the null share."
        )
    if summary["changes"]:
        texts.append(
            f"A change is called one where its interval leaves out 0 and its p, adjusted for "
            f"{len(summary['changes'])} comparisons (false discovery rate), is at most {LEVEL}. p "
            "is from permutations: the two sides of a comparison are exchanged at random, all "
            "translations of one item together. d is the mean change over its standard deviation, "
            "across such items."
        )
        tested = summary["changes"][0]["tested"]
        if tested["exact"]:
            texts.append(
                f"The test examples are of only {tested['clusters']} parallel items: before it is "
                f"adjusted, the smallest p of a change is {2 / tested['permutations']:.3f}."
            )
    pairs = [test for test in summary["similarity_influence"] if test["p_value"] is not None]
    if pairs and pairs[0]["exact"]:
        texts.append(
            f"With {len(summary['subnetworks'])} languages there are only "
            f"{pairs[0]['permutations']:,} orders of the languages, so the smallest p that the "
            f"Mantel test can give is {1 / pairs[0]['permutations']:.1g}."
        )
    draws = [entry["draws"] for entry in summary["in_language"] if entry["view"] == "random"]
    if draws:
        masks = "one draw" if draws[0] == 1 else f"{draws[0]} draws"
        texts.append(
            f"The random baseline is {masks} of random masks of each subnetwork's size; the "
            "intervals do not cover the choice of these masks."
        )
    return texts


def fidelity(certificates: dict[str, Row]) -> str:
    """How well projected scores stand for exact ones, the worse of the models."""
    first = min(certificates.values(), key=lambda one: one["spearman"]["value"])
    errors = [one["share_error_mean"] for one in certificates.values()]
    rank, error = first["spearman"], max(errors, key=lambda one: one["value"])
    return (
        f"Of {first['queries']:,} test and {first['train']:,} training examples drawn at random, "
        f"scores were computed exactly too, without a projection: scores from features rank the "
        f"training examples as exact ones do to a Spearman correlation of "
        f"{number(rank['value'], 3)} ({number(rank['low'], 3)} to {number(rank['high'], 3)}), and "
        f"the sample's language shares differ by {number(100 * error['value'], 1)} points "
        f"({number(100 * error['low'], 1)} to {number(100 * error['high'], 1)}) on average; those "
        "of the whole run, over more test examples, by less."
    )


def cautions(summary: Row, task: Row) -> list[str]:
    """What not to conclude."""
    texts = [
        "Influence is a first-order estimate along the saved checkpoints. It does not say what "
        "would happen if the examples were removed and the model trained again.",
        "A share tells where the strongest training examples are, not how much they matter "
        "together; the mean influence looks at all of them.",
        "A change under a subnetwork speaks for language-specific parts of the model only as far "
        "as it goes beyond random masks of the same size, which remove as many heads.",
    ]
    if _find(summary["in_language"], view="subnetwork-own"):
        texts.append(
            "Where each example is seen through its own language's subnetwork, two examples of one "
            "language share a mask and two of different languages do not: that alone makes their "
            "gradients more alike, whatever the model has learnt. Compare with a random mask for "
            "each language."
        )
    if task.get("name") in ("grammar", "planted"):
        texts.append(
            "The sentences of this run were written by the embedded grammar: it shows that the "
            "method works and how to read it, and says nothing about real text."
        )
    return texts


def _accuracy(summary: Row) -> str:
    accuracy = summary["accuracy"]
    view = _find(accuracy["views"], model="full", view="full")
    if not view:
        return ""
    by_value = sorted(view["languages"].items(), key=lambda item: item[1]["value"])
    weak = [name for name, share in by_value if share["low"] <= accuracy["chance"]]
    learnt = (
        f"In {listed(weak)} the fine-tuned model is not clearly better than chance"
        if weak
        else "The fine-tuned model is better than chance in every language"
    )
    text = (
        f"{learnt}. It is right on {_range(by_value)} of the test examples, by language; "
        f"chance is {percent(accuracy['chance'])}."
    )
    sparse = _find(accuracy["views"], model="sparse", view="full")
    if sparse:
        pairs = sorted(sparse["languages"].items(), key=lambda item: item[1]["value"])
        text += f" After sparse fine-tuning it is {_range(pairs)}."
    if weak:
        text += (
            f" In {listed(weak)}, then, influence tells which examples move the loss, but hardly "
            "what the model has learnt."
        )
    return text


def _range(by_value: list[tuple[str, Row]]) -> str:
    (lowest, low), (highest, high) = by_value[0], by_value[-1]
    return f"{percent(low['value'])} ({lowest}) to {percent(high['value'])} ({highest})"


def _reliance(summary: Row) -> str:
    entry = _find(summary["in_language"], model="full", view="full")
    if not entry:
        return ""
    share, null = entry["share_positive"], entry["null_share"]
    if share["low"] > null:
        verdict = "The model relies on a test example's own language more than on the others"
    elif share["high"] < null:
        verdict = "The model relies on a test example's own language less than on the others"
    else:
        verdict = "The model has no clear preference for a test example's own language"
    k = f"{summary['k']} " if summary["k"] else ""
    return (
        f"{verdict}. Of a test example's {k}strongest proponents (training examples that lowered "
        f"its loss), {percent_interval(share)} are in its own language; {percent(null)} would be "
        f"if language played no part. Among the strongest opponents the share is "
        f"{percent_interval(entry['share_negative'])}."
    )


def same_group(summary: Row) -> str:
    """What translations of the test example among the training examples do; "" where none are."""
    found = summary.get("same_group")
    view = _find(found["views"], model="full", view="full") if found else None
    if not found or not view:
        return ""
    text = (
        f"{found['num_with_same_group']:,} of {found['num_test']:,} test examples have training "
        f"examples of their own parallel item (translations). Such an example is the strongest "
        f"proponent of {percent(view['strongest'])} of them (by chance "
        f"{percent(found['strongest_null'])}) and among the {summary['k']} strongest of "
        f"{percent(view['within_k'])} (by chance {percent(found['within_k_null'])})."
    )
    if "share_positive" not in view.get("change", {}):
        return text
    change = view["change"]
    return (
        f"{text} Leaving them out {_moves(change, 'the share of the own language')}, from "
        f"{percent(view['with']['share_positive']['value'])} to "
        f"{percent(view['without']['share_positive']['value'])} (null "
        f"{percent(view['with']['null_share'])} and {percent(view['without']['null_share'])})."
    )


def seeds(summary: Row) -> str:
    """How alike one language's subnetworks are from seed to seed, beside those of two languages."""
    baseline = summary.get("seed_baseline")
    if not baseline or baseline["between"]["jaccard"] is None:
        return ""
    within, between = baseline["within"], baseline["between"]
    alike = within["jaccard"] > between["jaccard"]
    verdict = (
        "Subnetworks of one language are more alike than those of two"
        if alike
        else "Subnetworks of one language are no more alike than those of two, so that these masks "
        "say nothing of language"
    )
    return (
        f"{verdict}. Those of one language from two seeds agree by a Jaccard similarity of "
        f"{number(within['jaccard'])} on average (beyond chance "
        f"{number(within['corrected_jaccard'])}), those of two languages by "
        f"{number(between['jaccard'])} ({number(between['corrected_jaccard'])})"
        f"{': only the difference speaks for language' if alike else ''}."
    )


def _subnetworks(summary: Row, model: str) -> str:
    change = _change(summary, (model, "subnetwork"), (model, "full"))
    if not change:
        return ""
    start = "Computing" if model == "full" else "After sparse fine-tuning, computing"
    text = (
        f"{start} influence through each language's own subnetwork "
        f"{_moves(change, 'the share of the own language')}."
    )
    control = _change(summary, (model, "subnetwork"), (model, "random"))
    if control:
        sure = _direction(control)
        beyond = {
            1: "more than removing as many heads at random gives",
            0: "so the subnetworks cannot be told from as many heads drawn at random",
            -1: "less than removing as many heads at random gives",
        }[sure]
        text += f" Against random masks the difference is {_interval(control)}, {beyond}."
    return text


def _sparse(summary: Row) -> str:
    change = _change(summary, ("sparse", "full"), ("full", "full"))
    if not change:
        return ""
    text = f"Sparse fine-tuning {_moves(change, 'the share of the own language')}, all heads."
    through = _change(summary, ("sparse", "subnetwork"), ("full", "subnetwork"))
    if through:
        sure = "" if _direction(through) else ", not clear"
        text += f" Seen through the own subnetworks it is {_interval(through)}{sure}."
    return text


def _similarity(summary: Row) -> str:
    names = {"model": "full", "view": "full", "measure": "share_positive"}
    test = _find(summary["similarity_influence"], **names)
    if not test or test["p_value"] is None:
        return ""
    if test["p_adjusted"] > LEVEL:
        verdict = (
            "There is no clear relation between how alike two languages' subnetworks are and how "
            "far they draw on each other's training examples"
        )
    else:
        more = "more" if test["correlation"] > 0 else "less"
        verdict = (
            f"Languages with more similar subnetworks draw {more} on each other's training examples"
        )
    text = (
        f"{verdict}. All heads: Spearman {number(test['correlation'])}, Mantel test "
        f"{p_value(test['p_value'])}, adjusted {p_value(test['p_adjusted'])}, {test['pairs']} "
        "pairs of languages."
    )
    partial = _find(summary.get("partial_similarity_influence", []), **names)
    if partial and partial["p_value"] is not None:
        text += (
            f" With {listed([CONTROLS[name] for name in partial['controls']])} taken out: "
            f"{number(partial['correlation'])}, adjusted {p_value(partial['p_adjusted'])}."
        )
    return text


def _distances(summary: Row) -> str:
    names = {"model": "full", "view": "full", "measure": "share_positive"}
    tests = [
        test
        for test in summary.get("distance_influence", [])
        if test["p_value"] is not None and names.items() <= test.items()
    ]
    if not tests:
        return ""
    clear = [test for test in tests if test["p_adjusted"] <= LEVEL]
    if not clear:
        return (
            "How far languages draw on each other's training examples goes clearly with none of "
            f"the distances between them. Tried: {listed([test['metric'] for test in tests])}."
        )
    shown = [
        f"{test['metric']} (Spearman {number(test['correlation'])}, adjusted "
        f"{p_value(test['p_adjusted'])})"
        for test in clear
    ]
    return (
        "How far languages draw on each other's training examples goes with the distance between "
        f"them. It is their {listed(shown)} distance; negative: the nearer, the more."
    )


def _change(summary: Row, new: tuple[str, str], base: tuple[str, str]) -> Row | None:
    return _find(
        summary["changes"], model=new[0], view=new[1], base_model=base[0], base_view=base[1]
    )


def _find(entries: list[Row], **wanted: str) -> Row | None:
    for entry in entries:
        if all(entry[key] == value for key, value in wanted.items()):
            return entry
    return None


def _direction(change: Row) -> int:
    """1 or -1 where the share of the own language clearly rises or falls, else 0."""
    share = change["share_positive"]
    return (1 if share["value"] > 0 else -1) if is_clear(share) else 0


def _moves(change: Row, what: str) -> str:
    verb = {1: f"raises {what}", -1: f"lowers {what}", 0: f"does not clearly change {what}"}
    return f"{verb[_direction(change)]}. The change is {_interval(change)}"


def _interval(change: Row) -> str:
    return points_interval(change["share_positive"])


def listed(names: list[str]) -> str:
    """`en`, `en and de`, `en, de and ru`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
