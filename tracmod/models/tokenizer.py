"""Make a tokenizer of XLM-R's kind: train it on texts or read a SentencePiece file."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# XLM-R's numbering: <s> 0, <pad> 1, </s> 2, <unk> 3, then the pieces, <mask> last.
_FIRST_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
_UNIGRAM = 1  # TrainerSpec.ModelType of SentencePiece


def train_tokenizer(
    texts: Iterable[str], vocabulary: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Train a byte-pair tokenizer on texts and give it XLM-R's special tokens.

    XLM-R itself has a unigram model. Trained on little text, a unigram model splits even frequent
    words, and the one of `tokenizers` gives another vocabulary on every run. Byte-pair merges are
    the same every time, on any number of threads. Words end at punctuation and Chinese characters
    stay single, so that a merge never spans a whole sentence.

    Args:
        texts: training texts; empty texts are skipped.
        vocabulary: number of ids wanted, special tokens included. There are fewer if the texts hold
            too little, and more if they have more characters: every character gets an id.
        max_length: longest input of the model that the tokenizer is for, in tokens.

    Raises:
        ValueError: there is no text.
    """
    lines = [text for text in texts if text and text.strip()]
    if not lines:
        raise ValueError("cannot train a tokenizer: expected training texts, got none")
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1,  # <mask> is added below
        special_tokens=list(_FIRST_TOKENS),
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    backend.add_special_tokens(["<mask>"])
    return _with_special_tokens(backend, max_length)


def read_sentencepiece(path: str | Path, max_length: int) -> PreTrainedTokenizerFast:
    """Read a SentencePiece unigram model in XLM-R's numbering.

    SentencePiece's own ids (0 `<unk>`, 1 `<s>`, 2 `</s>`, then pieces) become 3, 0, 2 and id + 1.

    Args:
        path: `.model` file, or the same gzipped as `.gz`.
        max_length: longest input of the model that the tokenizer is for, in tokens.

    Raises:
        ValueError: the file is missing, is not a SentencePiece model, or is not a unigram model.
    """
    path = Path(path)
    name = f"SentencePiece file {path}"
    if not path.is_file():
        raise ValueError(f"{name}: no such file")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{name}: cannot be read: {error}") from None
    model = _parse_sentencepiece(content, name)
    vocabulary = [(token, 0.0) for token in _FIRST_TOKENS]
    vocabulary += [(piece.piece, piece.score) for piece in model.pieces[3:]]
    vocabulary.append(("<mask>", 0.0))
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    if model.normalizer_spec.precompiled_charsmap:
        backend.normalizer = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    return _with_special_tokens(backend, max_length)


def _parse_sentencepiece(content: bytes, name: str) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    model = messages.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        raise ValueError(f"{name}: not a SentencePiece model") from None
    if model.trainer_spec.model_type != _UNIGRAM:
        raise ValueError(f"{name}: expected a unigram model, got another SentencePiece type")
    first = [piece.piece for piece in model.pieces[:3]]
    if first != ["<unk>", "<s>", "</s>"]:
        raise ValueError(f"{name}: expected the pieces <unk> <s> </s> first, got {first}")
    return model


def _with_special_tokens(backend: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """Add special tokens and pairs as XLM-R has them: `<s> A </s></s> B </s>`."""
    from transformers import PreTrainedTokenizerFast

    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    # The generic class, not XLMRobertaTokenizer: it is read back from tokenizer.json unchanged,
    # while XLMRobertaTokenizer is rebuilt from its parts, differently in every release.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        cls_token="<s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )
