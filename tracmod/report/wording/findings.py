"""The summary of a report in sentences: findings, how certain they are, what not to conclude."""

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
    points,
    tested,
)

Row = dict[str, Any]
CONTROLS = {
    "label_distance": "differences in label balance",
    "seed_similarity": "agreement between seeds",
}


def findings(summary: Row) -> list[str]:
    """Return the findings, a few sentences each, the most important first."""
    texts = [_accuracy(summary), _reliance(summary), _training(summary), same_group(summary)]
    texts += [_subnetworks(summary, "full"), _sparse(summary), _subnetworks(summary, "sparse")]
    texts += [seeds(summary), _similarity(summary), _distances(summary)]
    return [text for text in texts if text]


def tiles(summary: Row) -> list[Row]:
    """Return the headline numbers: own-language shares among proponents of up to four views."""
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
    """Return what the intervals and tests cover, and what they do not cover."""
    settings = summary["settings"]
    tests = sum(summary["num_test"].values())
    texts = [
        f"Ranges in parentheses are {percent(settings['confidence'], 0)} intervals from "
        f"{settings['bootstrap']:,} bootstrap resamples of {tests:,} test examples, with "
        "translations of one item drawn together. They show how much a result would vary with "
        "other test examples. They do not cover another training run, another seed, or other "
        "training data."
    ]
    if summary["k"] and summary["k"] < summary.get("asked_k", 0):
        texts.append(
            f"Shares should be counted over {summary['asked_k']:,} training examples, but there "
            f"are only {summary['k']:,}. All of them are counted, so every share equals the null "
            "share."
        )
    if summary["changes"]:
        texts.append(
            "A change is called clear only if its interval excludes 0 and its p-value, adjusted "
            f"for {len(summary['changes'])} comparisons (false discovery rate), is at most {LEVEL}."
            " p-values are from a permutation test: the two sides of a comparison are exchanged at "
            "random, for all translations of one item together. d is the mean change divided by "
            "its standard deviation, across parallel items."
        )
        test = summary["changes"][0]["tested"]
        if test["exact"]:
            texts.append(
                f"The test examples come from only {test['clusters']} parallel items, so the "
                f"smallest possible p-value of a change, before adjustment, is "
                f"{2 / test['permutations']:.3f}."
            )
    pairs = [test for test in summary["similarity_influence"] if test["p_value"] is not None]
    if pairs and pairs[0]["exact"]:
        texts.append(
            f"With {len(summary['subnetworks'])} languages there are only "
            f"{pairs[0]['permutations']:,} orders of the languages, so the smallest p-value that "
            f"the Mantel test can give is {1 / pairs[0]['permutations']:.1g}."
        )
    draws = [entry["draws"] for entry in summary["in_language"] if entry["view"] == "random"]
    if draws:
        masks = "one draw" if draws[0] == 1 else f"{draws[0]} draws"
        texts.append(
            f"The random baseline is {masks} of random masks of each subnetwork's size. The "
            "intervals do not cover the choice of these masks."
        )
    return texts


def fidelity(certificates: dict[str, Row]) -> str:
    """Return how well projected scores agree with exact ones, for the worse of the models."""
    worst = min(certificates.values(), key=lambda certificate: certificate["spearman"]["value"])
    errors = [certificate["share_error_mean"] for certificate in certificates.values()]
    rank, error = worst["spearman"], max(errors, key=lambda error: error["value"])
    return (
        f"For {worst['queries']:,} test and {worst['train']:,} training examples drawn at random, "
        f"scores were also computed exactly, without a projection. Projected scores rank the "
        f"training examples like exact scores, with a Spearman correlation of "
        f"{number(rank['value'], 3)} ({number(rank['low'], 3)} to {number(rank['high'], 3)}). "
        f"The language shares of the sample differ by {number(100 * error['value'], 1)} points "
        f"({number(100 * error['low'], 1)} to {number(100 * error['high'], 1)}) on average. Those "
        "of the whole run, over more test examples, differ by less."
    )


def cautions(summary: Row, task: Row) -> list[str]:
    """Return what not to conclude."""
    texts = [
        "Influence is a first-order estimate along the saved checkpoints. It does not show what "
        "would happen if the examples were removed and the model trained again.",
        "A share shows where the strongest training examples are, not how much they matter "
        "together. The mean influence takes all training examples into account.",
        "A change under a subnetwork is evidence of language-specific parts of the model only as "
        "far as it exceeds the change under random masks of the same size, which remove as many "
        "heads.",
    ]
    if _find(summary["in_language"], view="subnetwork-own"):
        texts.append(
            "Where each example is seen through the subnetwork of its own language, two examples "
            "of one language share a mask and two examples of different languages do not. This "
            "alone makes gradients of one language more alike, whatever the model has learned. "
            "Compare with a random mask for each language."
        )
    if task.get("name") in ("grammar", "planted", "entities"):
        texts.append(
            "The sentences of this run were written by the built-in grammar. They show that the "
            "method works and how to read its results, but say nothing about real text."
        )
    return texts


def _accuracy(summary: Row) -> str:
    accuracy = summary["accuracy"]
    view = _find(accuracy["views"], model="full", view="full")
    if not view:
        return ""
    weak = [name for name, share in _by_value(view) if share["low"] <= accuracy["chance"]]
    verdict = (
        f"In {listed(weak)}, the fine-tuned model is not clearly better than chance"
        if weak
        else "The fine-tuned model is better than chance in every language"
    )
    score = accuracy.get("score", "accuracy")
    text = (
        f"{verdict}. Its {score} is {_range(view)}, depending on the test language; chance is "
        f"{percent(accuracy['chance'])}."
    )
    sparse = _find(accuracy["views"], model="sparse", view="full")
    if sparse:
        text += f" After sparse fine-tuning, it is {_range(sparse)}."
    if weak:
        text += (
            f" In {listed(weak)}, influence therefore shows which examples change the loss, but "
            "hardly what the model has learned."
        )
    return text


def _by_value(view: Row) -> list[tuple[str, Row]]:
    return sorted(view["languages"].items(), key=lambda item: item[1]["value"])


def _range(view: Row) -> str:
    by_value = _by_value(view)
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
        f"its loss), {percent_interval(share)} are in its own language; the null share, expected "
        f"if language played no role, is {percent(null)}. Among the strongest opponents, the "
        f"own-language share is {percent_interval(entry['share_negative'])}."
    )


def _training(summary: Row) -> str:
    """Return what fine-tuning changed, compared with the same model before it; "" without that."""
    change = _change(summary, ("full", "full"), ("untrained", "full"))
    before = _find(summary["in_language"], model="untrained", view="full")
    if not change or not before:
        return ""
    verdict = {
        1: "Fine-tuning made the model rely more on a test example's own language",
        0: "Fine-tuning did not clearly change how much the model relies on the own language",
        -1: "Fine-tuning made the model rely less on a test example's own language",
    }[_direction(change)]
    return (
        f"{verdict}. Before it, {percent_interval(before['share_positive'])} of the strongest "
        f"proponents are in that language. Fine-tuning {_effect(change)}."
    )


def same_group(summary: Row) -> str:
    """Return the effect of translations of the test examples; "" if there are none."""
    translations = summary.get("same_group")
    view = _find(translations["views"], model="full", view="full") if translations else None
    if not translations or not view:
        return ""
    text = (
        f"{translations['num_with_same_group']:,} of {translations['num_test']:,} test examples "
        "have training examples of their own parallel item (translations). Such an example is the "
        f"strongest proponent for {percent(view['strongest'])} of them "
        f"({percent(translations['strongest_null'])} by chance) and among the {summary['k']} "
        f"strongest for {percent(view['within_k'])} ({percent(translations['within_k_null'])} by "
        "chance)."
    )
    if "share_positive" not in view.get("change", {}):
        return text
    shares, nulls = (
        [entry["share_positive"]["value"] for entry in (view["with"], view["without"])],
        [entry["null_share"] for entry in (view["with"], view["without"])],
    )
    return (
        f"{text} Leaving them out {_effect(view['change'])}, from {percent(shares[0])} to "
        f"{percent(shares[1])} (null share {percent(nulls[0])} and {percent(nulls[1])})."
    )


def seeds(summary: Row) -> str:
    """Return the similarity of subnetworks between seeds, compared with that between languages."""
    baseline = summary.get("seed_baseline")
    if not baseline or baseline["between"]["jaccard"] is None:
        return ""
    within, between, test = baseline["within"], baseline["between"], baseline.get("test")
    alike = test is not None and test["p_value"] <= LEVEL
    verdict = (
        "Subnetworks of one language are more alike than those of two languages"
        if alike
        else "Subnetworks of one language are not clearly more alike than those of two languages, "
        "so these masks are no evidence of specialization by language"
    )
    last = " Only the difference is evidence of specialization by language." if alike else ""
    chance = "" if test is None else f"; permutation test {p_value(test['p_value'])}"
    return (
        f"{verdict}. Subnetworks of one language from two seeds have a mean Jaccard similarity of "
        f"{number(within['jaccard'])} ({number(within['corrected_jaccard'])} beyond chance), those "
        f"of two languages, also from two seeds, {number(between['jaccard'])} "
        f"({number(between['corrected_jaccard'])}{chance}).{last}"
    )


def _subnetworks(summary: Row, model: str) -> str:
    change = _change(summary, (model, "subnetwork"), (model, "full"))
    if not change:
        return ""
    start = "Computing" if model == "full" else "After sparse fine-tuning, computing"
    text = f"{start} influence through each language's own subnetwork {_effect(change)}."
    control = _change(summary, (model, "subnetwork"), (model, "random"))
    if control:
        verdict = {
            1: "so the share is higher than under random masks of the same size",
            0: "so the subnetworks cannot be distinguished from random masks of the same size",
            -1: "so the share is lower than under random masks of the same size",
        }[_direction(control)]
        text += f" The difference from random masks is {_interval(control)}, {verdict}."
    return text


def _sparse(summary: Row) -> str:
    change = _change(summary, ("sparse", "full"), ("full", "full"))
    if not change:
        return ""
    text = f"Sparse fine-tuning {_effect(change)}, with all heads."
    through = _change(summary, ("sparse", "subnetwork"), ("full", "subnetwork"))
    if through:
        unclear = "" if _direction(through) else ", which is not clear"
        text += f" Through the own subnetworks, it is {_interval(through)}{unclear}."
    return text


def _similarity(summary: Row) -> str:
    names = {"model": "full", "view": "full", "measure": "share_positive"}
    test = _find(summary["similarity_influence"], **names)
    if not test or test["p_value"] is None:
        return ""
    if test["p_adjusted"] > LEVEL:
        verdict = (
            "There is no clear relation between the similarity of two languages' subnetworks and "
            "how much the languages rely on each other's training examples"
        )
    else:
        more = "more" if test["correlation"] > 0 else "less"
        verdict = (
            f"Languages with more similar subnetworks rely {more} on each other's training examples"
        )
    text = (
        f"{verdict}. With all heads, the Spearman correlation is {number(test['correlation'])} "
        f"(Mantel test {p_value(test['p_value'])}, adjusted {p_value(test['p_adjusted'])}, "
        f"{test['pairs']} pairs of languages)."
    )
    partial = _find(summary.get("partial_similarity_influence", []), **names)
    if partial and partial["p_value"] is not None:
        text += (
            f" Controlling for {listed([CONTROLS[name] for name in partial['controls']])}, it is "
            f"{number(partial['correlation'])} (adjusted {p_value(partial['p_adjusted'])})."
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
            "How much languages rely on each other's training examples is not clearly related to "
            "any distance between them. The distances that were tested are "
            f"{listed([test['metric'] for test in tests])}."
        )
    shown = [
        f"{test['metric']} (Spearman {number(test['correlation'])}, adjusted "
        f"{p_value(test['p_adjusted'])})"
        for test in clear
    ]
    return (
        "How much languages rely on each other's training examples is related to the distance "
        f"between them. This holds for the distance {listed(shown)}; a negative correlation means "
        "that closer languages rely more on each other."
    )


def _change(summary: Row, new: tuple[str, str], base: tuple[str, str]) -> Row | None:
    return _find(
        summary["changes"], model=new[0], view=new[1], base_model=base[0], base_view=base[1]
    )


def _find(entries: list[Row], **wanted: str) -> Row | None:
    return next((entry for entry in entries if wanted.items() <= entry.items()), None)


def _direction(change: Row) -> int:
    """Return 1 or -1 if the own-language share clearly rises or falls, else 0."""
    share = change["share_positive"]
    return (1 if share["value"] > 0 else -1) if is_clear(share) else 0


def _effect(change: Row) -> str:
    """Return a verb and a sentence: `raises the own-language share. The change is ...`."""
    verb = {1: "raises", -1: "lowers", 0: "does not clearly change"}[_direction(change)]
    return f"{verb} the own-language share. The change is {_interval(change)}"


def _interval(change: Row) -> str:
    """Return a change and its test: `+3.1 points (+1.0 to +5.2; adjusted p = 0.004, d = 0.31)`."""
    share = change["share_positive"]
    value, low, high = (points(share[key]) for key in ("value", "low", "high"))
    return f"{value} points ({low} to {high}; adjusted {tested(share)})"


def listed(names: list[str]) -> str:
    """Return names in a sentence: `en`, `en and de`, `en, de and ru`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
