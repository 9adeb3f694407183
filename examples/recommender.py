"""A two-tower recommender: users and items with features, and items that some thousand times more people know.

What people take depends on their taste and on how popular an item is. Negatives come from the batch and the cache,
where popular items are often: uncorrected, that is held against them. `log_q` corrects for it. The table shows how
often one of the ten best items of a user is the one that was taken, on held-out pairs. Takes half a minute.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from negative_cache import NegativeCacheLoss

NUM_ITEMS, NUM_TASTES, NUM_PAIRS, BATCH, STEPS = 5_000, 8, 40_000, 128, 500


def make_data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features of items `[items, tastes]` and of users `[pairs, tastes]`, and the items that these took `[pairs]`."""
    generator = torch.Generator().manual_seed(seed)
    items = torch.randn(NUM_ITEMS, NUM_TASTES, generator=generator)
    popularity = 1.0 / torch.arange(1, NUM_ITEMS + 1)
    users = torch.randn(NUM_PAIRS, NUM_TASTES, generator=generator)
    weights = [(part @ items.T).exp() * popularity for part in users.split(4096)]
    return items, users, torch.cat([part.multinomial(1, generator=generator).squeeze(1) for part in weights])


class Tower(nn.Module):
    """Features, and for items a learned bias, to an embedding."""

    def __init__(self, num_ids: int = 0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(NUM_TASTES, 64), nn.ReLU(), nn.Linear(64, 32))
        self.bias = nn.Embedding(max(num_ids, 1), 1, _weight=torch.zeros(max(num_ids, 1), 1))

    def forward(self, features: Tensor, ids: Tensor | None = None) -> Tensor:
        body = self.body(features)
        bias = torch.ones(len(body), 1) if ids is None else self.bias(ids)
        return torch.cat([body, bias], dim=1)  # the product of both towers has the item's bias in it


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
        correction = {"log_q": log_q[ids]} if is_corrected else {}
        # Without document_ids: an item is in the cache as often as it was taken, which is what log_q corrects.
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
    print(f"{NUM_ITEMS:,} items, of which a tenth is taken {share:.0%} of the time")
    most_popular = torch.bincount(taken[seen], minlength=NUM_ITEMS).topk(10).indices
    popular = float((taken[held_out][:, None] == most_popular).any(dim=1).float().mean())
    print(f"{'ten most popular items':24} hit rate@10 {popular:.3f}")
    for name, is_corrected in (("uncorrected", False), ("corrected by log_q", True)):
        towers = train(items, users[seen], taken[seen], is_corrected)
        print(f"{name:24} hit rate@10 {hit_rate(towers, items, users[held_out], taken[held_out]):.3f}", flush=True)


if __name__ == "__main__":
    main()
