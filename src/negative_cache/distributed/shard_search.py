"""One rank's part of the answer to the queries of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from negative_cache.cache.rows import NegativeCache
from negative_cache.distributed.choose_together import choose_together
from negative_cache.distributed.handshake import Meeting
from negative_cache.distributed.ranks import Ranks, shard_sizes
from negative_cache.distributed.routing import Entries
from negative_cache.retrieval import Retrieved, retrieve
from negative_cache.sampling.choose import Serving, candidates_of
from negative_cache.sampling.draw import is_max_score, pool_of
from negative_cache.sampling.one_process import Asked, Rules


def top_k_of_shard(top_k: int, num_rows: Sequence[int], rank: int) -> int:
    """How many of top_k groups lie in one shard: in proportion to its rows, at least one where it has any."""
    ends = [round(top_k * sum(num_rows[: r + 1]) / max(sum(num_rows), 1)) for r in range(len(num_rows))]
    share = ends[rank] - (ends[rank - 1] if rank else 0)
    return min(max(share, 1), num_rows[rank])


class Search:
    """This rank's part of the answer to all queries; rows are numbered through its caches.

    Args:
        ranks, meeting, rules, caches, asked: See `draw_from_ranks`; with the queries of all ranks.
        hidden: int64 `[n]`: rows of the first cache that no query may see, -1 for none; or None.
    """

    def __init__(
        self,
        ranks: Ranks,
        meeting: Meeting,
        rules: Rules,
        caches: Sequence[NegativeCache],
        asked: Asked,
        hidden: Tensor | None,
    ) -> None:
        self.ranks, self.meeting, self.rules, self.asked = ranks, meeting, rules, asked
        self.pool = pool_of(caches, rules.embedding_key, hidden, rules.bias_key)
        self.limits = asked.limits(None if rules.guide_key is None else pool_of(caches, rules.guide_key))
        positives = asked.positives
        self.excluded = None if positives is None else caches[0].find(positives.flatten()).view(positives.shape)
        self.result = self._search()

    def _search(self) -> Retrieved:
        ranks, rules, meeting, pool = self.ranks, self.rules, self.meeting, self.pool
        first, num_rows = 0, meeting.num_rows
        if rules.is_replicated:
            num_rows = shard_sizes(pool.num_rows, ranks.size)
            first = sum(num_rows[: ranks.rank])
            pool = pool.slice(first, first + num_rows[ranks.rank])
        is_max = is_max_score(rules.retrieval_fn)
        num_top = max(rules.num_top, int(is_max))
        batch, device = len(self.asked.queries), self.asked.queries.device
        rows = torch.zeros(batch, rules.num_draws, dtype=torch.int64, device=device)
        top_rows = torch.full((batch, num_top), -1, device=device)
        top_scores = torch.full((batch, num_top), -torch.inf, dtype=pool.score_dtype, device=device)
        lse = torch.full((batch,), -torch.inf, dtype=pool.score_dtype, device=device)
        num_limited = None if self.limits is None else torch.zeros(batch, dtype=torch.int64, device=device)
        group_rows = None
        if meeting.told[ranks.rank].has_rows and pool.num_rows:
            result = retrieve(
                self.asked.queries,
                pool,
                generator=rules.generator,
                score_transform=rules.score_transform,
                excluded=self.excluded,
                top_k=None if rules.top_k is None else top_k_of_shard(rules.top_k, num_rows, ranks.rank),
                num_samples=rules.num_draws,
                num_top=num_top,
                limits=self.limits,
            )
            lse, rows, found = result.lse, result.rows + first, result.top_rows.shape[1]
            group_rows, num_limited = result.group_rows, result.num_limited
            top_scores[:, :found] = result.top_scores
            top_rows[:, :found] = torch.where(result.top_rows >= 0, result.top_rows + first, -1)
        if is_max and rules.num_draws:
            rows = top_rows[:, :1].clamp(min=0)
        return Retrieved(lse, rows, top_rows, top_scores, group_rows, num_limited)

    def choose(self, entries: Entries, lse: Tensor, uniform: Tensor) -> tuple[Entries, list[Serving], list[Tensor]]:
        """Choose the documents to encode from the draws; then each rank has its part of them.

        Args:
            entries: The draws, and the best rows.
            lse: `[batch of all]`: of all shards.
            uniform: float64 `[]`.

        Returns:
            The entries with the chosen ones for the draws, and `Negatives.serving` and `.lse_of_dims`.
        """
        rules, asked, meeting = self.rules, self.asked, self.meeting
        draws = slice(entries.num_draws)
        owner, candidate, is_drawn = entries.owner[draws], entries.candidate[draws], entries.is_update[draws]
        mine = (owner == self.ranks.rank).nonzero().squeeze(1)
        device = lse.device
        candidates = candidates_of(
            asked.queries,
            self.pool,
            lse,
            self.result.rows.flatten()[candidate[mine].to(device)],
            is_drawn[mine].to(device),
            rules.num_candidates,
            rules.score_transform,
            self.excluded,
            self.limits,
            self.result.group_rows,
            rules.dims,
            self._merge,
        )
        assert asked.positive_scores is not None
        assert asked.fresh_lse is not None
        count = rules.num_samples * len(asked.queries)
        shared = choose_together(
            self.ranks,
            meeting,
            owner,
            candidates,
            asked.queries,
            asked.positive_scores,
            asked.fresh_lse,
            lse,
            count,
            uniform,
        )
        parts = torch.tensor([rules.num_samples * batch for batch in meeting.batches])
        asker = torch.repeat_interleave(torch.arange(self.ranks.size), parts)
        tops = slice(entries.num_draws, None)
        chosen = Entries(
            query=torch.cat([torch.full_like(shared.at, -1), entries.query[tops]]),
            asker=torch.cat([asker, entries.asker[tops]]),
            owner=torch.cat([owner[shared.at], entries.owner[tops]]),
            candidate=torch.cat([candidate[shared.at], entries.candidate[tops]]),
            is_update=torch.cat([shared.is_chosen, entries.is_update[tops]]),
            num_draws=len(shared.at),
        )
        own = meeting.queries_of(self.ranks.rank)
        return chosen, shared.serving, [level.lse[own] for level in candidates.levels]

    def _merge(self, lse: Tensor) -> Tensor:
        """From logsumexps of this shard's rows `[batch of all]` to those of all shards."""
        (gathered,) = self.ranks.gather([lse], [[len(lse)]] * self.ranks.size)
        return gathered.view(self.ranks.size, -1).logsumexp(dim=0)
