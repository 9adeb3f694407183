"""Train a sentence-transformers model with a negative cache: find functions of the standard library by description.

    python examples/sentence_transformers_training.py    # less than a minute; saves to standard-library-search

A pair consists of the first paragraph of a function's docstring and the function's code without the docstring. The
model has static embeddings and is trained from scratch, which takes seconds; `--model NAME` trains any other model.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.integrations.trainer import NegativeCacheTrainer
from negative_cache.workbench.data.python_code import Pair, extract
from negative_cache.workbench.model_names import learning_rate_of
from negative_cache.workbench.models import load_model


def standard_library() -> list[Pair]:
    """The pairs of all modules of the standard library, each code once."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not {"site-packages", "test", "tests"} & set(path.parts)]
    pairs = [pair for path in files for pair in extract(str(path.relative_to(root)), path)]
    return list({pair.document: pair for pair in pairs}.values())


def make_evaluator(pairs: list[Pair], tested: list[Pair]) -> InformationRetrievalEvaluator:
    """Searches the code of all pairs with the docstrings of the tested ones."""
    return InformationRetrievalEvaluator(
        queries={pair.name: pair.query for pair in tested},
        corpus={pair.name: pair.document for pair in pairs},
        relevant_docs={pair.name: {pair.name} for pair in tested},
        mrr_at_k=[10],
        name="test",
        write_csv=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="static", help="static, tiny, or a name or folder of a model")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--output", default="standard-library-search", help="folder for checkpoints")
    options = parser.parse_args()

    pairs = standard_library()
    tested, trained = pairs[::10], [pair for number, pair in enumerate(pairs) if number % 10]
    dataset = Dataset.from_dict({"anchor": [p.query for p in trained], "positive": [p.document for p in trained]})
    print(f"{len(trained):,} pairs to train with, {len(tested):,} to test with", flush=True)

    model: SentenceTransformer = load_model(options.model, [text for p in trained for text in (p.query, p.document)], 0)
    # A static model encodes documents at almost no cost, so re-encode 4 per anchor.
    loss = NegativeCacheRankingLoss(model, cache_size=4096, num_samples=4, seed=0)
    arguments = SentenceTransformerTrainingArguments(
        options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=32,
        learning_rate=learning_rate_of(options.model),
        batch_sampler="no_duplicates",
        logging_steps=100,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="epoch",  # with the cache: trainer.train(resume_from_checkpoint=True) resumes
        save_total_limit=1,
        report_to=[],  # "tensorboard", "wandb" or "mlflow" also log the metrics of the cache
        disable_tqdm=True,
    )
    trainer = NegativeCacheTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss)

    evaluator = make_evaluator(pairs, tested)
    before = evaluator(model)["test_cosine_mrr@10"]
    trainer.train()
    after = evaluator(model)["test_cosine_mrr@10"]
    print(f"MRR@10 of the test queries among {len(pairs):,} functions: {before:.3f} before, {after:.3f} after")
    print({name: round(value, 3) for name, value in loss.metrics().items()})


if __name__ == "__main__":
    main()
