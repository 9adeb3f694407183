"""Two BERT towers in Hugging Face's `Trainer`, with random initial weights: nothing is downloaded.

    python examples/hugging_face_towers.py --folder run               # about ten seconds on one core
    python examples/hugging_face_towers.py --folder run --resume      # from the last checkpoint, with its cache

A query consists of some words of its document, translated to another language. The towers must learn the translation.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel, Trainer, TrainingArguments, set_seed

from negative_cache import NegativeCacheLoss
from negative_cache.integrations.hugging_face import NegativeCacheTrainerMixin

VOCABULARY, NUM_DOCUMENTS, LENGTH = 200, 1_600, 10


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
        )
        self.query_tower = BertModel(config, add_pooling_layer=False)
        self.document_tower = BertModel(config, add_pooling_layer=False)
        self.loss_fn = NegativeCacheLoss(self.encode_documents, cache_size=1_024, learnable_scale=True, seed=0)

    def encode_documents(self, features: dict[str, Tensor]) -> Tensor:
        return embed(self.document_tower, features)

    def forward(
        self, query_ids: Tensor, input_ids: Tensor, attention_mask: Tensor, ids: Tensor, return_loss: bool = True
    ) -> dict[str, Tensor]:
        documents = {"input_ids": input_ids, "attention_mask": attention_mask}
        queries = embed(self.query_tower, {"input_ids": query_ids, "attention_mask": torch.ones_like(query_ids)})
        embedded = self.encode_documents(documents)
        if not self.training:  # against the batch alone, so that evaluations can be compared
            return {"loss": self.loss_fn.in_batch_loss(queries, embedded, document_ids=ids)}
        return {"loss": self.loss_fn(queries, embedded, documents, document_ids=ids)}


def embed(tower: BertModel, features: dict[str, Tensor]) -> Tensor:
    """The normalized mean over tokens, `[n, hidden_size]`."""
    mask = features["attention_mask"].unsqueeze(-1)
    return normalize((tower(**features).last_hidden_state * mask).sum(dim=1), dim=-1)


class TwoTowersTrainer(NegativeCacheTrainerMixin, Trainer):
    pass


def make_data() -> list[dict[str, Tensor | int]]:
    generator = torch.Generator().manual_seed(0)
    translation = torch.randperm(VOCABULARY, generator=generator)
    words = torch.randint(VOCABULARY, (NUM_DOCUMENTS, LENGTH), generator=generator)
    return [
        {"query_ids": translation[w[:5]], "input_ids": w, "attention_mask": torch.ones_like(w), "ids": number}
        for number, w in enumerate(words)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    set_seed(0)
    data = make_data()
    arguments = TrainingArguments(
        options.folder,
        num_train_epochs=3,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        learning_rate=2e-3,
        logging_steps=50,
        save_steps=50,
        save_total_limit=2,
        eval_strategy="epoch",
        label_names=[],  # the model itself returns the loss
        report_to=[],  # "tensorboard", "wandb" or "mlflow" also log the metrics of the cache
        disable_tqdm=True,
    )
    trainer = TwoTowersTrainer(model=TwoTowers(), args=arguments, train_dataset=data[200:], eval_dataset=data[:200])
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=options.resume or None)
    after = trainer.evaluate()["eval_loss"]
    print(f"loss of held-out queries: {before:.3f} before, {after:.3f} after, against the other documents of the batch")


if __name__ == "__main__":
    main()
