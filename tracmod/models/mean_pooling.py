"""A classifier of texts that reads the mean of an encoder's tokens.

Sentence encoders such as multilingual-e5 are pretrained to be read so, but transformers' classifier
of their architecture reads the first token, through layers that no pretraining has seen.

A copy of this file lies in every folder of such a model, so that transformers' own
`AutoModelForSequenceClassification` loads it if it is given `trust_remote_code`. So it imports
nothing of tracmod.

Shape suffixes: B examples, S tokens, I hidden size, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

# What transformers asks of a model's class, and only the encoder's class can answer.
OF_ENCODER = (
    "base_model_prefix",
    "_no_split_modules",
    "_supports_attention_backend",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_sdpa",
)


class MeanPoolingForSequenceClassification(PreTrainedModel):
    """An encoder of transformers and a linear classifier of the mean of its last hidden states.

    With h (B, S, I) the last hidden states and a (B, S) the attention mask::

        logits[b] = W (sum_s a[b, s] h[b, s]) / (sum_s a[b, s]) + bias        W (C, I)

    The encoder has no pooler. Its weights have the names that they have in transformers' own
    classifier, such as `bert.encoder.layer.0...`; the classifier's are `classifier.weight` and
    `classifier.bias`.

    Args:
        config: the encoder's config, of any type that `AutoModel` knows.
    """

    def __init__(self, config: Any) -> None:
        """Build the model with random weights."""
        encoder_class: Any = MODEL_MAPPING[type(config)]
        for name in OF_ENCODER:
            setattr(self, name, getattr(encoder_class, name))
        config.auto_map = {"AutoModelForSequenceClassification": AUTO_MAP}
        super().__init__(config)
        self.num_labels = config.num_labels
        encoder = encoder_class(config)
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        setattr(self, self.base_model_prefix, encoder)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: Any, *args: Any, config: Any = None, **options: Any
    ) -> Any:
        """Load a folder or Hub name, as transformers does; its config may be of any encoder."""
        config = AutoConfig.from_pretrained(name) if config is None else config
        return super().from_pretrained(name, *args, config=config, **options)

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> MeanPoolingForSequenceClassification:
        """Make a model with random weights, as the method of transformers' auto classes does."""
        options.pop("trust_remote_code", None)
        model: MeanPoolingForSequenceClassification = cls._from_config(config, **options)
        return model

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        """Compute the logits (B, C), and with labels the loss that the config states.

        Args:
            input_ids: (B, S) tokens; or `inputs_embeds` among the further inputs.
            attention_mask: (B, S), 0 for padding; None for ones.
            labels: (B,) or (B, C).
            **inputs: further inputs of the encoder.
        """
        output = self.base_model(
            input_ids, attention_mask=attention_mask, **{**inputs, "return_dict": True}
        )
        hidden_BSI = output.last_hidden_state
        if attention_mask is None:
            mean_BI = hidden_BSI.mean(dim=1)
        else:
            mask_BS1 = attention_mask[:, :, None].to(hidden_BSI.dtype)
            mean_BI = (hidden_BSI * mask_BS1).sum(dim=1) / mask_BS1.sum(dim=1)
        logits_BC = self.classifier(mean_BI)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits_BC, config=self.config)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits_BC,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


AUTO_MAP = f"mean_pooling.{MeanPoolingForSequenceClassification.__name__}"
MeanPoolingForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
