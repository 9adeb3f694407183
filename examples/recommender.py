"""A two-tower recommender for items of very different popularity, with the `log_q` correction.

Which item a user takes depends on the user's taste and on the item's popularity. Negatives come from the batch and the
cache, which contain popular items more often, so the uncorrected loss penalizes popularity. `log_q` corrects for this.
The script prints how often the item that a held-out user took is among the ten items with the highest scores. It takes
about 15 seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from negative_cache import NegativeCacheLoss

NUM_ITEMS, NUM_TASTES, NUM_PAIRS, BATCH, STEPS = 5_000, 8, 40_000, 128, 250


def make_data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features of items `[items, tastes]` and users `[pairs, tastes]`, and the item that each user took `[pairs]`."""
    generator = torch.Generator().manual_seed(seed)
    items = torch.randn(NUM_ITEMS, NUM_TASTES, generator=generator)
    popularity = 1.0 / torch.arange(1, NUM_ITEMS + 1)
    users = torch.randn(NUM_PAIRS, NUM_TASTES, generator=generator)
    weights = [(part @ items.T).exp() * popularity for part in users.split(4096)]
    return items, users, torch.cat([part.multinomial(1, generator=generator).squeeze(1) for part in weights])


class Tower(nn.Module):
    """Encodes features to embeddings; those of items include a learned bias."""

    def __init__(self, num_ids: int = 0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(NUM_TASTES, 64), nn.ReLU(), nn.Linear(64, 32))
        self.bias = nn.Embedding(max(num_ids, 1), 1, _weight=torch.zeros(max(num_ids, 1), 1))

    def forward(self, features: Tensor, ids: Tensor | None = None) -> Tensor:
        body = self.body(features)
        bias = torch.ones(len(body), 1) if ids is None else self.bias(ids)
        return torch.cat([body, bias], dim=1)  # the dot product of both towers includes the bias


def train(items: Tensor, users: Tensor, taken: Tensor, is_corrected: bool) -> tuple[Tower, Tower]:
    torch.manual_seed(0)
    user_tower, item_tower = Tower(), Tower(NUM_ITEMS)
    counts = torch.bincount(taken, minlength=NUM_ITEMS)
    log_q = (counts / counts.sum()).log()
    loss_fn = NegativeCacheLoss(lambda f: item_tower(items[f["id"]], f["id"]), cache_size=4_096, scale=1.0, seed=0)
    optimizer = torch.optim.Adam([*user_tower.parameters(), *item_tower.parameters()], lr=0.01)
    for _ in range(STEPS):
        pairs = torch.randint(len(users), (BATCH,))
        ids = taken[pairs]
        # Items without ids (-1: unknown) occur in the cache as often as they were taken, which log_q corrects.
        correction = {"log_q": log_q[ids]} if is_corrected else {"document_ids": torch.full_like(ids, -1)}
        loss = loss_fn(user_tower(users[pairs]), item_tower(items[ids], ids), {"id": ids}, **correction)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return user_tower, item_tower


@torch.no_grad()
def hit_rate(towers: tuple[Tower, Tower], items: Tensor, users: Tensor, taken: Tensor) -> float:
    user_tower, item_tower = towers
    scores = user_tower(users) @ item_tower(items, torch.arange(NUM_ITEMS)).T
    return float((scores.topk(10).indices == taken[:, None]).any(dim=1).float().mean())


def main() -> None:
    items, users, taken = make_data()
    held_out = slice(NUM_PAIRS - 4_000, None)
    seen = slice(0, NUM_PAIRS - 4_000)
    share = float((taken < NUM_ITEMS // 10).float().mean())
    print(f"{NUM_ITEMS:,} items; the most popular tenth makes up {share:.0%} of what is taken")
    most_popular = torch.bincount(taken[seen], minlength=NUM_ITEMS).topk(10).indices
    popular = float((taken[held_out][:, None] == most_popular).any(dim=1).float().mean())
    print(f"{'ten most popular items':24} hit rate@10 {popular:.3f}")
    for name, is_corrected in (("uncorrected", False), ("corrected by log_q", True)):
        towers = train(items, users[seen], taken[seen], is_corrected)
        print(f"{name:24} hit rate@10 {hit_rate(towers, items, users[held_out], taken[held_out]):.3f}", flush=True)


if __name__ == "__main__":
    main()
