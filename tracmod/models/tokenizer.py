"""Tokenizers of new models, of XLM-R's kind: trained on texts or read from a SentencePiece file."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
from transformers import PreTrainedTokenizerFast

# XLM-R's numbering: <s> 0, <pad> 1, </s> 2, <unk> 3, then the pieces, <mask> last.
_SPECIAL_FIRST = ("<s>", "<pad>", "</s>", "<unk>")
_UNIGRAM = 1  # TrainerSpec.ModelType of SentencePiece


def train_tokenizer(
    texts: Iterable[str], vocabulary: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Train byte-pair merges on `texts` and give them XLM-R's special tokens.

    BPE, because a unigram model trained on little text splits even its frequent words (and that of
    `tokenizers` gives another vocabulary on every run); merges are the same every time, on any
    number of threads. Words end at punctuation, and Chinese characters stay single, so that what is
    merged is never a whole sentence.

    Args:
        texts: the training texts; empty ones are skipped.
        vocabulary: number of ids wanted, special tokens included; fewer where the texts hold too
            little. Every character of the texts gets an id, whatever this number is.
        max_length: tokens a model on top of it takes.

    Raises:
        ValueError: without any text.
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
        vocab_size=vocabulary - 1,  # <mask> comes on top
        special_tokens=list(_SPECIAL_FIRST),
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    backend.add_special_tokens(["<mask>"])
    return _with_special_tokens(backend, max_length)


def read_sentencepiece(path: str | Path, max_length: int) -> PreTrainedTokenizerFast:
    """Read a SentencePiece unigram model (`.model`, or gzipped as `.gz`) in XLM-R's numbering.

    SentencePiece's own ids (0 `<unk>`, 1 `<s>`, 2 `</s>`, then pieces) become 3, 0, 2 and id + 1.

    Raises:
        ValueError: the file is missing, is not a SentencePiece model, or is not a unigram model.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"SentencePiece file {path}: no such file")
    try:
        blob = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"SentencePiece file {path}: cannot be read: {error}") from None
    return _from_sentencepiece(blob, f"SentencePiece file {path}", max_length)


def _from_sentencepiece(blob: bytes, source: str, max_length: int) -> PreTrainedTokenizerFast:
    proto = _parse_proto(blob, source)
    vocabulary = [(token, 0.0) for token in _SPECIAL_FIRST]
    vocabulary += [(piece.piece, piece.score) for piece in proto.pieces[3:]]
    vocabulary.append(("<mask>", 0.0))
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    if proto.normalizer_spec.precompiled_charsmap:
        backend.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    return _with_special_tokens(backend, max_length)


def _with_special_tokens(backend: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """Pairs as XLM-R puts them, `<s> A </s></s> B </s>`, and what transformers needs to know."""
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    # The generic class, not XLMRobertaTokenizer: it is read back from tokenizer.json as it is,
    # where the other is rebuilt from its parts, differently in every release of transformers.
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


def _parse_proto(blob: bytes, source: str) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    proto = messages.ModelProto()
    try:
        proto.ParseFromString(blob)
    except DecodeError:
        raise ValueError(f"{source}: not a SentencePiece model") from None
    if proto.trainer_spec.model_type != _UNIGRAM:
        raise ValueError(f"{source}: expected a unigram model, got another SentencePiece type")
    first = [piece.piece for piece in proto.pieces[:3]]
    if first != ["<unk>", "<s>", "</s>"]:
        raise ValueError(f"{source}: expected the pieces <unk> <s> </s> first, got {first}")
    return proto
