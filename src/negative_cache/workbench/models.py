"""Models by name: `static` and `tiny` are built from texts, `static:NAME` from another model; others are loaded."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from sentence_transformers.util import batch_to_device
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer

from negative_cache.workbench.model_names import DISTILLED, ModelError, check_trained

VOCABULARY = 16_000
STATIC_DIM = 256
TINY = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
TINY_MAX_LENGTH = 128
TEXTS_PER_CHUNK = 256

_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

logger = logging.getLogger("negative_cache")


def load_model(name: str, texts: Iterable[str], seed: int) -> SentenceTransformer:
    """Load or build a model to train.

    Args:
        name: `static` (mean of token embeddings) or `tiny` (transformer with two layers), both with random weights and
            a tokenizer trained on `texts`; or `static:NAME`, a static model whose token embeddings the model of this
            name or path computes. Any other name or path is loaded.
        texts: The training texts.
        seed: Seed of the random weights.

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
    return _distilled(name.removeprefix(DISTILLED)) if name.startswith(DISTILLED) else load_trained(name)


def load_trained(name: str) -> SentenceTransformer:
    """Load a model by name or path; raises ModelError if it cannot be loaded."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    check_trained(name)
    try:
        return SentenceTransformer(name)
    except Exception as error:
        raise ModelError(f"Cannot load the model {name!r}: {error}") from error


def _distilled(name: str) -> SentenceTransformer:
    """A static model of the vocabulary of another model, by model2vec: each token is encoded, then the embeddings are
    reduced to `STATIC_DIM` principal components and weighted by the frequency that Zipf's law gives their rank.

    A model that is static already is loaded as it is.
    """
    model = load_trained(name)
    if isinstance(model[0], StaticEmbedding):
        return model
    try:
        from model2vec.distill import distill_from_model
    except ImportError as error:
        raise ModelError(f"{DISTILLED}{name} needs model2vec: pip install 'model2vec[distill]'.") from error
    body = model[0]
    if not isinstance(body, Transformer):
        kind = type(body).__name__
        raise ModelError(f"{DISTILLED}{name} needs a transformer or a static model; its first module is {kind}.")
    logger.warning(
        "Distilling %s into a static model: each of its %s tokens is encoded.", name, f"{len(body.tokenizer):,}"
    )
    logging.getLogger("model2vec").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be disabled
        found = distill_from_model(
            body.model, body.tokenizer, device=str(model.device), pca_dims=STATIC_DIM, quantize_to="float32"
        )
    weights = torch.as_tensor(found.embedding)
    if found.weights is not None:  # those of the tokens' frequency, which model2vec may keep apart
        weights = weights * torch.as_tensor(found.weights, dtype=weights.dtype)[:, None]
    weights = weights.contiguous()
    return SentenceTransformer(modules=[StaticEmbedding(found.tokenizer, embedding_weights=weights)])


class Prompts(NamedTuple):
    """The texts before queries and documents, as `encode_query` and `encode_document` choose them."""

    query: str
    document: str


def prompts_of(model: SentenceTransformer) -> Prompts:
    """The prompts of a model for queries and documents; empty for none."""

    def resolve(*names: str) -> str:
        stored = (model.prompts[name] for name in (*names, model.default_prompt_name) if name in model.prompts)
        return next(stored, None) or ""

    return Prompts(resolve("query"), resolve("document", "passage", "corpus"))


def set_prompts(model: SentenceTransformer, query: str | None, document: str | None) -> None:
    """Store prompts in a model, so that everyone who loads it uses them; None leaves the model's own."""
    given = {"query": query, "document": document}
    model.prompts |= {name: prompt for name, prompt in given.items() if prompt is not None}


def prepare_for_training(model: SentenceTransformer) -> list[str]:
    """Make the weights float32, as small updates are lost in half precision; return notes for the user, a line each."""
    notes, dtypes = [], {parameter.dtype for parameter in model.parameters()}
    if dtypes & {torch.float16, torch.bfloat16}:
        model.float()
        notes.append("The weights are stored in half precision; they are trained and saved as float32.")
    if model.similarity_fn_name not in (None, "cosine"):
        notes.append(f"Training uses cosine similarity, evaluation that of the model, {model.similarity_fn_name}.")
    if any(model.prompts.values()):
        notes.append(_prompts_note(model))
    return notes


def _prompts_note(model: SentenceTransformer) -> str:
    used = prompts_of(model)
    both = " and ".join(f"{text!r} before {what}" for text, what in zip(used, ("queries", "documents"), strict=True))
    note = f"Training and evaluation use the prompts {both}."
    if unused := [f"{name} ({text!r})" for name, text in model.prompts.items() if text and text not in used]:
        note += f" The model also has {', '.join(unused)}, not used; --query-prompt and --document-prompt set others."
    return note


def freeze_unused(model: SentenceTransformer) -> None:
    """Freeze the parameters that no embedding depends on, such as those of BERT's pooler.

    They have no gradient, for which DistributedDataParallel would wait.
    """
    total = torch.zeros((), device=model.device)
    with torch.enable_grad():
        for task in ("query", "document"):  # a Router has other parameters for each
            features = batch_to_device(model.preprocess(["text"], task=task), model.device)
            total = total + model(features, task=task)["sentence_embedding"].float().sum()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(total, trained, allow_unused=True)
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def count_tokens(model: SentenceTransformer, texts: Sequence[str]) -> list[int]:
    """The number of tokens of each text, with special tokens and without a limit."""
    if isinstance(model[0], StaticEmbedding):
        return [len(found.ids) for found in model.tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    return [len(ids) for ids in model.tokenizer(list(texts), verbose=False)["input_ids"]]


def token_limit(model: SentenceTransformer) -> int | None:
    """The number of tokens after which a model cuts a text; None if it does not."""
    limit = model.max_seq_length
    return None if limit is None or not math.isfinite(limit) else int(limit)


def set_max_seq_length(model: SentenceTransformer, length: int) -> None:
    """Make a model cut texts after this number of tokens.

    Raises:
        ModelError: The model is static, or `length` exceeds the number of its positions.
    """
    if isinstance(model[0], StaticEmbedding):
        raise ModelError("--max-seq-length has no effect on a static model, which has no limit. Leave it out.")
    positions = _num_positions(model)
    if positions is not None and length > positions:
        raise ModelError(
            f"--max-seq-length is {length}; the model has positions for {positions} tokens. Use at most that."
        )
    model.max_seq_length = length


def _num_positions(model: SentenceTransformer) -> int | None:
    """The number of tokens that a model has positions for; None if it has no limit.

    The limit of the tokenizer is not one of the model: sentence-transformers stores `max_seq_length` there.
    """
    for name, module in model[0].named_modules():
        is_of_positions = isinstance(module, torch.nn.Embedding) and name.rpartition(".")[2] == "position_embeddings"
        if is_of_positions and module.padding_idx is not None:  # positions begin after that of padding, as in RoBERTa
            return module.num_embeddings - module.padding_idx - 1
    return getattr(getattr(model[0], "config", None), "max_position_embeddings", None)


def cache_tokens(model: SentenceTransformer, texts: Iterable[str]) -> None:
    """Make a static model tokenize each text only once. Tokenization takes half of the time of a static model."""
    if isinstance(model[0], StaticEmbedding):
        model[0].tokenizer = _CachingTokenizer(model[0].tokenizer)
        model[0].tokenizer.add(texts)


class _Ids(NamedTuple):
    ids: array[int]


class _CachingTokenizer:
    """A tokenizer that tokenizes each text only once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, _Ids] = {}

    def add(self, texts: Iterable[str]) -> None:
        """Tokenize the texts that are new."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        for start in range(0, len(missing), TEXTS_PER_CHUNK):  # the tokenizer's encodings use much memory
            part = missing[start : start + TEXTS_PER_CHUNK]
            encodings = self._tokenizer.encode_batch(part, add_special_tokens=False)
            self._known.update((text, _Ids(array("i", found.ids))) for text, found in zip(part, encodings, strict=True))

    def encode_batch(self, texts: list[str], **_: Any) -> list[_Ids]:
        """`Tokenizer.encode_batch` without special tokens, as its only caller, `StaticEmbedding`, uses it."""
        self.add(texts)
        return [self._known[text] for text in texts]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A WordPiece tokenizer for prose and code: lower case, with camelCase and snake_case split into words.

    The same texts give the same tokenizer. The trainer alone would not: it numbers the characters within words in the
    order of a hash table, which differs from run to run, and the numbers decide which of two equally frequent pairs it
    merges. A first training finds these characters, and a second one gets them in order, as special tokens.

    Args:
        texts: Texts, which are iterated over twice.
    """
    if isinstance(texts, Iterator):
        texts = list(texts)
    characters = set(_vocabulary_of(texts, _SPECIALS, size=0)).difference(_SPECIALS)
    within_words = sorted(character for character in characters if len(character) > 1)  # after ##
    tokenizer = _tokenizer(_vocabulary_of(texts, [*_SPECIALS, *within_words], VOCABULARY))
    tokenizer.add_special_tokens(list(_SPECIALS))
    return tokenizer


def _vocabulary_of(texts: Iterable[str], first: Sequence[str], size: int) -> dict[str, int]:
    """The number of each token, of all characters and of pieces of words up to a size, after those that come first."""
    tokenizer = _tokenizer({})
    trainer = WordPieceTrainer(vocab_size=size, special_tokens=list(first), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return dict(tokenizer.get_vocab())


def _tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=64))
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
    with tempfile.TemporaryDirectory() as folder:  # Transformer loads models from folders only
        BertModel(config).save_pretrained(folder)
        fast.save_pretrained(folder)
        body = Transformer(str(Path(folder)))
    return SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension())])
