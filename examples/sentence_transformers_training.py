"""Train a sentence-transformers model with a negative cache: find functions of the standard library by description.

    python examples/sentence_transformers_training.py    # less than a minute; saves to standard-library-search

A pair consists of the first paragraph of a function's docstring and the function's code without the docstring. The
model has static embeddings and is trained from scratch, which takes seconds; `--model NAME` trains any other model.
For pairs in a file, `negative_cache.data.load_data("my-pairs.csv")` takes the place of `standard_library()`.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Punctuation, Sequence, Whitespace
from tokenizers.trainers import WordPieceTrainer

from negative_cache.data import RetrievalData
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.integrations.trainer import NegativeCacheTrainer

MAX_CHARS, MIN_WORDS = 2_000, 4
DIM, VOCABULARY = 256, 16_000  # of the static model


def standard_library() -> RetrievalData:
    """The functions of all modules of the standard library, each code once; a tenth of them are test queries."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not {"site-packages", "test", "tests"} & set(path.parts)]
    found = {code: description for path in files for description, code in functions(path)}
    corpus = {str(number): code for number, code in enumerate(found)}
    queries = {f"q{number}": description for number, description in enumerate(found.values())}
    relevant = {f"q{number}": [number] for number in corpus}
    tested = list(queries)[::10]
    qrels = {
        "train": {query: documents for query, documents in relevant.items() if query not in set(tested)},
        "test": {query: relevant[query] for query in tested},
    }
    return RetrievalData("standard library", corpus, queries, qrels)


def functions(path: Path) -> Iterator[tuple[str, str]]:
    """The description and the code of each function of a module that has a docstring."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or (docstring := ast.get_docstring(node)) is None:
            continue
        del node.body[0]
        description = " ".join(docstring.split("\n\n")[0].split())
        code = ast.unparse(node) if node.body else ""
        if code and len(description.split()) >= MIN_WORDS and len(description + code) <= MAX_CHARS:
            yield description, code


def make_static_model(texts: list[str]) -> SentenceTransformer:
    """A mean of random token embeddings, with a tokenizer of these texts."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Sequence([Whitespace(), Punctuation()])
    trainer = WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=DIM)])


def make_evaluator(data: RetrievalData) -> InformationRetrievalEvaluator:
    """Searches the code of all functions with the descriptions of the tested ones."""
    relevant = data.judged("test")
    return InformationRetrievalEvaluator(
        queries={query: data.queries[query] for query in relevant},
        corpus=dict(data.corpus),
        relevant_docs={query: set(documents) for query, documents in relevant.items()},
        mrr_at_k=[10],
        name="test",
        write_csv=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a model; default: static embeddings with random weights")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--output", default="standard-library-search", help="folder for checkpoints")
    options = parser.parse_args()

    data = standard_library()
    dataset = data.training_set()
    print(f"{len(dataset):,} pairs to train with, {len(data.judged('test')):,} to test with", flush=True)

    if options.model is None:
        model = make_static_model([*dataset["anchor"], *dataset["positive"]])
    else:
        model = SentenceTransformer(options.model)
    # A static model encodes documents at almost no cost, so re-encode 4 per anchor.
    loss = NegativeCacheRankingLoss(model, cache_size=4096, num_samples=4, seed=0)
    arguments = SentenceTransformerTrainingArguments(
        options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=32,
        learning_rate=5e-2 if options.model is None else 2e-5,  # for random static embeddings, and for transformers
        batch_sampler="no_duplicates",
        logging_steps=100,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="epoch",  # with the cache: trainer.train(resume_from_checkpoint=True) resumes
        save_total_limit=1,
        report_to=[],  # "tensorboard", "wandb" or "mlflow" also log the metrics of the cache
        disable_tqdm=True,
    )
    trainer = NegativeCacheTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss)

    evaluator = make_evaluator(data)
    before = evaluator(model)["test_cosine_mrr@10"]
    trainer.train()
    after = evaluator(model)["test_cosine_mrr@10"]
    print(f"MRR@10 of the test queries among {len(data.corpus):,} functions: {before:.3f} before, {after:.3f} after")
    print({name: round(value, 3) for name, value in loss.metrics().items()})


if __name__ == "__main__":
    main()
