"""Models by name: `static` and `tiny` made for a corpus, everything else by sentence-transformers."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer

VOCABULARY = 16_000
STATIC_DIM = 256
TINY = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
TINY_MAX_LENGTH = 128
TOKENIZED_AT_ONCE = 256
HUB_TIMEOUT = 10.0  # seconds

# Learning rates at which each kind of model trains well with AdamW; a pretrained model wants little steps.
LEARNING_RATES = {"static": 5e-2, "tiny": 5e-4}
PRETRAINED_LEARNING_RATE = 2e-5


class ModelError(ValueError):
    """A model that cannot be loaded."""


def learning_rate_of(name: str) -> float:
    """The learning rate to use if none is given."""
    return LEARNING_RATES.get(name, PRETRAINED_LEARNING_RATE)


def load_model(name: str, texts: Iterable[str], seed: int) -> SentenceTransformer:
    """A model to train.

    Args:
        name: `static`: mean of token embeddings, from scratch; `tiny`: a transformer of two layers, from
            scratch; both with a tokenizer trained on `texts`. Any other name or path is loaded.
        texts: The training texts.
        seed: Seed of random weights.

    Raises:
        ModelError: The model cannot be loaded.
    """
    from transformers import set_seed
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    set_seed(seed)
    if name == "static":
        return SentenceTransformer(modules=[StaticEmbedding(train_tokenizer(texts), embedding_dim=STATIC_DIM)])
    if name == "tiny":
        return _tiny(train_tokenizer(texts))
    return load_trained(name)


def load_trained(name: str) -> SentenceTransformer:
    """A model by name or path; `ModelError` if it cannot be loaded."""
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ModelError(f"Cannot load the model {name!r}: there is no such folder.")
    if not Path(name).exists() and name.count("/") < 2:
        _ask_hub(name)
    try:
        return SentenceTransformer(name)
    except Exception as error:
        raise ModelError(f"Cannot load the model {name!r}: {error}") from error


def _ask_hub(name: str) -> None:
    """Ask for a model once, unless some of it is on this machine: loading asks for a minute before it gives up."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    repositories = [name] if "/" in name else [f"sentence-transformers/{name}", name]
    failed = ""
    for repository in repositories:
        try:
            cached = (try_to_load_from_cache(repository, file) for file in ("modules.json", "config.json"))
            if any(isinstance(path, str) for path in cached):
                return
            HfApi().model_info(repository, timeout=HUB_TIMEOUT)
            return
        except Exception as error:
            failed = str(error).strip().partition("\n")[0]
    raise ModelError(
        f"Cannot load the model {name!r}: it is no folder, not among the downloaded models of this machine, and the "
        f"Hugging Face hub does not give it ({failed}). Give a folder or the name of a model that is there; train and "
        "compare also make models that are called static and tiny."
    )


def remember_tokens(model: SentenceTransformer, texts: Iterable[str]) -> None:
    """Tokenize `texts` once for all, if the model is static: that takes as long as all else it does with them."""
    if isinstance(model[0], StaticEmbedding):
        model[0].tokenizer = _RememberingTokenizer(model[0].tokenizer)
        model[0].tokenizer.remember(texts)


class _Ids(NamedTuple):
    ids: array[int]


class _RememberingTokenizer:
    """A tokenizer that tokenizes each text once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, _Ids] = {}

    def remember(self, texts: Iterable[str]) -> None:
        """Tokenize what is new."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        for start in range(0, len(missing), TOKENIZED_AT_ONCE):  # what the tokenizer returns takes much memory
            part = missing[start : start + TOKENIZED_AT_ONCE]
            encodings = self._tokenizer.encode_batch(part, add_special_tokens=False)
            self._known.update((text, _Ids(array("i", found.ids))) for text, found in zip(part, encodings, strict=True))

    def encode_batch(self, texts: list[str], **_: Any) -> list[_Ids]:
        """As `Tokenizer.encode_batch` without special tokens, which `StaticEmbedding`, the one caller, never wants."""
        self.remember(texts)
        return [self._known[text] for text in texts]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A WordPiece tokenizer for prose and code: words in camelCase and snake_case fall apart, case is dropped."""
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]", max_input_chars_per_word=64))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"(?<=[a-z0-9])(?=[A-Z])"), " "), normalizers.NFKC(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Whitespace(),
            pre_tokenizers.Split("_", behavior="removed"),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Punctuation(),
        ]
    )
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=specials, show_progress=False)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _tiny(tokenizer: Tokenizer) -> SentenceTransformer:
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TINY_MAX_LENGTH,
        **{f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")},
    )
    config = BertConfig(vocab_size=len(fast), max_position_embeddings=TINY_MAX_LENGTH, **TINY)
    with tempfile.TemporaryDirectory() as folder:  # Transformer only takes models from a folder
        BertModel(config).save_pretrained(folder)
        fast.save_pretrained(folder)
        body = Transformer(str(Path(folder)))
    return SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension())])
