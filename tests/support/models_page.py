"""Write docs/models.md from the forms that tests/models/test_families.py tests."""

from __future__ import annotations

from pathlib import Path

from families import FORMS, answers, has_tokens, small_model

from tracmod.models.architecture import attention_layers

HEAD = """# Models

Classifiers of texts and tokens, models for question answering, and what tracmod can do with them.

This page is made from the tests (`python tests/support/models_page.py`), which compare every row
with transformers' own model.

All of them have exact and projected influence for every parameter, head masks, pruning, sparse
fine-tuning, training from a config alone, and export with zeros in the place of masked heads. They
differ in this:

- **Heads**: separate projections for query, key and value; one fused projection; or grouped heads,
  several of which share keys and values. Where heads are grouped, a head owns its queries and its
  columns of the output projection; keys and values count as shared parameters.
- **Lean**: the last layer is computed at the first token alone, because the classifier reads no
  other. Where it is not, passes are the model's own.
- **Narrow**: masked heads can be taken out of the tensors (`tracmod export --form pruned`,
  `tracmod.save_pruned`). Not where heads share keys and values, or a table of positions (MPNet).
- **Tokens**: transformers has a token classifier of the form, with the same capabilities; its
  passes are never lean.
- **Answers**: the same for models for question answering.

| Form | Models | `model_type` | Heads | Lean | Narrow | Tokens | Answers |
|---|---|---|---|---|---|---|---|
"""

TAIL = """
- **BERT's close kin** whose layers are built in the same way work, too (ERNIE, LayoutLM without its
  boxes, MEGATRON-BERT), and so do their subclasses. Every pass is compared with the model's own
  ([The engine's pass](limits.md#the-engines-pass-and-the-models-own)).
- **DeBERTa-v2 with a convolution** (xlarge, xxlarge) is refused for selections of parameters that
  include it; `parameters: attention` works.
- **X-MOD** passes every example through the adapter of its language: of the column `language`, or
  `lang_ids` in Python (whole numbers, positions in the config's `languages`). If the config has a
  `default_language`, all examples go through that one. `query` takes the language of its text as
  `--text-language`.
- **ALBERT** calls each layer several times. It is one layer here: a head that is masked is masked
  in all calls, and its gradient is the sum over calls.
- **Decoders** read the last token that is no padding, and need a `pad_token_id` for batches.
- **Refused** with the name of the family: other architectures (T5, BART, GPT-2, XLNet, mixtures of
  experts), models with code of their own (GTE's `new` architecture), quantized weights.
- **A new family** is a short file in `tracmod/models/architecture/` and a line in
  `tests/support/families.py`.
"""


def page() -> str:
    """Return the page."""
    rows = []
    for name, form in FORMS.items():
        layer = attention_layers(small_model(name))[0]
        heads = "grouped" if layer.is_grouped else "separate"
        heads = "fused" if layer.query is layer.key else heads
        cells = (
            form.family,
            form.models,
            f"`{form.model_type}`",
            heads,
            "yes" if form.lean else "no",
            "yes" if form.pruned else "no",
            "yes" if has_tokens(name) else "no",
            "yes" if answers(name) else "no",
        )
        rows.append("| " + " | ".join(cells) + " |\n")
    return HEAD + "".join(rows) + TAIL


if __name__ == "__main__":
    path = Path(__file__).parents[2] / "docs" / "models.md"
    path.write_text(page(), encoding="utf-8")
