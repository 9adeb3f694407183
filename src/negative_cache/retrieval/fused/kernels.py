"""The Triton kernels of the fused pass. `launch.py` prepares their arguments and merges their results.

Names in capitals are compile-time constants. Queries are contiguous `[batch, DIM]`; all other tensors have strides.
The code for a tensor that is None is not compiled.
"""

import triton
import triton.language as tl

# Integers that differ between calls: their values must not cause a recompilation.
_CHANGING = ["batch", "group_size", "num_longer", "num_parts", "part_blocks", "num_segments", "num_excluded"]


@triton.jit
def _hide(scores, hidden, hidden_at, is_query, start, stride, count):
    """Put -inf at the excluded rows of a block, if there are any.

    `hidden [BLOCK_M, n]` has some of the excluded rows, and `hidden_at [BLOCK_M]` points to the first of them. Few
    blocks contain an excluded row, so scores are compared one by one only in those.
    """
    is_near = (hidden >= start) & (hidden < start + scores.shape[1])
    if tl.max(tl.max(is_near.to(tl.int32), axis=1), axis=0) > 0:
        for number in range(count):
            row = tl.load(hidden_at + number * stride, mask=is_query, other=-1).to(tl.int32) - start
            scores = tl.where(row[:, None] == tl.arange(0, scores.shape[1])[None, :], float("-inf"), scores)
    return scores


@triton.jit
def _mixed(first, second, number):
    """A uint32 hash of `number` with a key of 64 bits: the finalizer of MurmurHash3, with the second word added inside.

    Philox has ten rounds where this has one, and would take as long as all other operations on a block's scores.
    """
    word = first + number.to(tl.uint32) * 0x9E3779B9
    word = (word ^ (word >> 16)) * 0x85EBCA6B
    word = ((word ^ (word >> 13)) + second) * 0xC2B2AE35
    return word ^ (word >> 16)


@triton.jit
def _uniform(word):
    """A float32 from 32 random bits; never 0, but it may round to 1."""
    return (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit(do_not_specialize=_CHANGING)
def scan(
    queries,
    query_scales,
    rows,
    row_scales,
    candidates,
    excluded,
    seed,
    best_out,
    total_out,
    chosen_out,
    maxima_out,
    batch,
    group_size,
    num_longer,
    num_parts,
    part_blocks,
    num_segments,
    num_excluded,
    row_stride,
    row_step,
    scale_stride,
    candidate_stride,
    excluded_stride,
    excluded_step,
    DIM: tl.constexpr,
    GROUPED: tl.constexpr,
    SAMPLES: tl.constexpr,
    EXCLUDED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    INTEGER: tl.constexpr,
    COPIED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Compute the scores of BLOCK_M queries and one segment, in blocks of BLOCK_N rows, and reduce them at once.

    The rows are divided into groups of group_size or group_size + 1 rows, and a group into num_parts segments of
    part_blocks blocks. The kernel writes for each query and segment the highest score (best_out float32) and

    - GROUPED: the first block that has it (chosen_out int32 `[batch, num_segments]`, counted within the group);
    - otherwise: the sum of exp(score - highest) (total_out float32), and SAMPLES stretches of BLOCK_S rows, each drawn
      in proportion to its own such sum (chosen_out int32 `[batch, num_segments, SAMPLES]`, counted from the first row).

    maxima_out float32 `[batch, part_blocks * num_parts]` gets the highest score of every block of a single group.

    COPIED: queries and rows are tensor descriptors, whose tiles Hopper's copy engine loads. Addresses then take no
    registers, and a block may have twice as many rows.
    """
    num_tiles = tl.cdiv(batch, BLOCK_M)
    segment = tl.program_id(0) // num_tiles
    query_start = (tl.program_id(0) % num_tiles) * BLOCK_M
    query = query_start + tl.arange(0, BLOCK_M)
    is_query = query < batch
    group = segment // num_parts
    first_block = (segment % num_parts) * part_blocks
    group_start = group * group_size + tl.minimum(group, num_longer)
    group_stop = group_start + group_size + tl.where(group < num_longer, 1, 0)
    num_blocks = tl.minimum(part_blocks, tl.cdiv(group_stop - group_start, BLOCK_N) - first_block)

    NUM_K: tl.constexpr = (DIM + BLOCK_K - 1) // BLOCK_K
    NUM_S: tl.constexpr = BLOCK_N // BLOCK_S
    local = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    if not COPIED:
        query_at = query.to(tl.int64)[:, None] * DIM + column[None, :]
        row_at = local[None, :] * row_stride + column[:, None] * row_step
    if NUM_K == 1:  # the queries stay on the chip
        if COPIED:
            q = queries.load([query_start, 0])
        else:
            q = tl.load(queries + query_at, mask=is_query[:, None] & (column < DIM)[None, :], other=0)
    if query_scales is not None:
        query_scale = tl.load(query_scales + query, mask=is_query, other=0)
    if EXCLUDED > 0:
        slot = tl.arange(0, EXCLUDED)
        slot_at = slot[None, :] * excluded_step
        hidden_at = excluded + query.to(tl.int64) * excluded_stride
        is_slot = is_query[:, None] & (slot < num_excluded)[None, :]
        hidden = tl.load(hidden_at[:, None] + slot_at, mask=is_slot, other=-1).to(tl.int32)

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if GROUPED:
        chosen = tl.zeros([BLOCK_M], tl.int32)
    elif SAMPLES > 0:
        chosen = tl.zeros([BLOCK_M, SAMPLES], tl.int32)
        nothing = tl.zeros([BLOCK_M, SAMPLES], tl.int32)
        sample = nothing + tl.arange(0, SAMPLES)[None, :]
        # A key of 64 bits for each query, segment and sample, from which `_mixed` makes numbers for the blocks.
        words = tl.philox(tl.load(seed), nothing + query[:, None], nothing + segment, sample, nothing)
        first_word, second_word = words[0].to(tl.uint32, bitcast=True), words[1].to(tl.uint32, bitcast=True)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INTEGER else tl.float32)

    # One loop over blocks and their chunks of columns, so that loads are prefetched across blocks.
    for step in range(num_blocks * NUM_K):
        block = first_block + step // NUM_K
        k = step % NUM_K
        start = group_start + block * BLOCK_N
        is_row = local < group_stop - start
        if COPIED:
            if NUM_K > 1:
                q = queries.load([query_start, k * BLOCK_K])
            r = rows.load([start, k * BLOCK_K]).T
        else:
            is_column = column < DIM - k * BLOCK_K
            tile = rows + start.to(tl.int64) * row_stride + k * BLOCK_K * row_step
            if NUM_K > 1:
                q = tl.load(queries + k * BLOCK_K + query_at, mask=is_query[:, None] & is_column[None, :], other=0)
            r = tl.load(tile + row_at, mask=is_column[:, None] & is_row[None, :], other=0)
        if UPCAST:  # the interpreter does not multiply bfloat16
            acc = tl.dot(q.to(tl.float32), r.to(tl.float32), acc, input_precision=PRECISION, out_dtype=acc.dtype)
        else:
            acc = tl.dot(q, r, acc, input_precision=PRECISION, out_dtype=acc.dtype)
        if k == NUM_K - 1:
            scores = acc.to(tl.float32)
            if row_scales is not None:
                row_scale = tl.load(row_scales + (start + local).to(tl.int64) * scale_stride, mask=is_row, other=0)
                scores = scores * row_scale[None, :]
            if query_scales is not None:
                scores = scores * query_scale[:, None]
            candidate_at = candidates + (start + local).to(tl.int64) * candidate_stride
            is_candidate = tl.load(candidate_at, mask=is_row, other=0) != 0
            scores = tl.where(is_candidate[None, :], scores, float("-inf"))
            if EXCLUDED > 0:
                if num_excluded <= EXCLUDED:
                    scores = _hide(scores, hidden, hidden_at, is_query, start, excluded_step, num_excluded)
                else:
                    for first in range(0, num_excluded, EXCLUDED):
                        some_at = hidden_at + first * excluded_step
                        is_hidden = is_query[:, None] & (slot + first < num_excluded)[None, :]
                        some = tl.load(some_at[:, None] + slot_at, mask=is_hidden, other=-1).to(tl.int32)
                        count = tl.minimum(EXCLUDED, num_excluded - first)
                        scores = _hide(scores, some, some_at, is_query, start, excluded_step, count)
            top = tl.max(scores, axis=1)
            if maxima_out is not None:
                maxima_at = maxima_out + query.to(tl.int64) * (part_blocks * num_parts) + block
                tl.store(maxima_at, top, mask=is_query)
            if GROUPED:
                is_better = top > best
                chosen = tl.where(is_better, block, chosen)
                best = tl.where(is_better, top, best)
            else:
                higher = tl.maximum(best, top)
                # Differences first: a product with log2(e) of a large score would be rounded before it is subtracted.
                shift = tl.where(higher == float("-inf"), 0.0, higher)
                weights = tl.exp(scores - shift[:, None])
                parts = tl.sum(tl.reshape(weights, [BLOCK_M, NUM_S, BLOCK_S]), axis=2)
                inside = tl.sum(parts, axis=1)
                total = total * tl.exp(best - shift) + inside
                best = higher
                if SAMPLES > 0:
                    # The block replaces the chosen one with probability inside / total: never without weight, as the
                    # uniform is not 0; and always if it is the first block with weight, even if the uniform is 1.
                    word = _mixed(first_word, second_word, nothing + block)
                    wins = (_uniform(word) * total[:, None] <= inside[:, None]) & (inside > 0)[:, None]
                    if NUM_S == 1:
                        stretch = nothing + block
                    else:
                        # Its stretch is the first one with weight at which the cumulative sum reaches the target; the
                        # last one with weight if no sum reaches it due to rounding.
                        has_weight, number = parts > 0, tl.arange(0, NUM_S)
                        target = _uniform(_mixed(second_word, first_word, nothing + block)) * inside[:, None]
                        reaches = tl.cumsum(parts, axis=1)[:, :, None] >= target[:, None, :]
                        hits = tl.where(reaches & has_weight[:, :, None], number[None, :, None], NUM_S)
                        last = tl.max(tl.where(has_weight, number[None, :], 0), axis=1)
                        stretch = block * NUM_S + tl.minimum(tl.min(hits, axis=1), last[:, None])
                    chosen = tl.where(wins, stretch, chosen)
            acc = tl.zeros_like(acc)

    at = query.to(tl.int64) * num_segments + segment
    tl.store(best_out + at, best, mask=is_query)
    if GROUPED:
        tl.store(chosen_out + at, chosen, mask=is_query)
    else:
        tl.store(total_out + at, total, mask=is_query)
        if SAMPLES > 0:
            tl.store(chosen_out + at[:, None] * SAMPLES + sample, chosen, mask=is_query[:, None])


@triton.jit
def _short_scores(
    queries,
    query_scales,
    rows,
    row_scales,
    candidates,
    excluded,
    query,
    is_pair,
    start,
    stop,
    num_excluded,
    row_stride,
    row_step,
    scale_stride,
    candidate_stride,
    excluded_stride,
    excluded_step,
    DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scores float32 `[BLOCK_P, BLOCK_N]` of pairs of a query and a short range of rows; -inf for hidden rows."""
    local = tl.arange(0, BLOCK_N)
    row = start[:, None] + local[None, :]
    is_row = row < stop[:, None]
    is_candidate = is_row & (tl.load(candidates + row * candidate_stride, mask=is_row, other=0) != 0)
    if excluded is not None:
        for slot in range(num_excluded):
            at = excluded + query * excluded_stride + slot * excluded_step
            hidden_row = tl.load(at, mask=is_pair, other=-1)
            is_candidate = is_candidate & (hidden_row[:, None] != row)

    if rows.dtype.element_ty == tl.int8:
        acc = tl.zeros([BLOCK_P, BLOCK_N], tl.int32)
    else:
        acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for k in range(0, DIM, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        is_column = column < DIM
        at = queries + query[:, None] * DIM + column[None, :]
        q = tl.load(at, mask=is_pair[:, None] & is_column[None, :], other=0)
        at = rows + (row * row_stride)[:, :, None] + (column.to(tl.int64) * row_step)[None, None, :]
        r = tl.load(at, mask=is_candidate[:, :, None] & is_column[None, None, :], other=0)
        acc += tl.sum(r.to(acc.dtype) * q.to(acc.dtype)[:, None, :], axis=2)
    scores = acc.to(tl.float32)
    if row_scales is not None:
        scores = scores * tl.load(row_scales + row * scale_stride, mask=is_candidate, other=0)
    if query_scales is not None:
        scores = scores * tl.load(query_scales + query, mask=is_pair, other=0)[:, None]
    return tl.where(is_candidate, scores, float("-inf"))


@triton.jit
def _uniform_of_53_bits(high, low):
    """A float64 in [0, 1) from two words."""
    high, low = high.to(tl.uint32, bitcast=True) >> 5, low.to(tl.uint32, bitcast=True) >> 6
    return (high.to(tl.float64) * 67108864.0 + low.to(tl.float64)) * 1.1102230246251565e-16


@triton.jit
def _draw_one(weights, uniform):
    """Draw positions int32 `[n]` in proportion to weights float64 `[n, length]`; one of weight 0 only if all are 0."""
    length: tl.constexpr = weights.shape[1]
    position = tl.arange(0, length)[None, :]
    has_weight = weights > 0
    target = uniform * tl.sum(weights, axis=1)
    hits = (tl.cumsum(weights, axis=1) > target[:, None]) & has_weight
    first = tl.min(tl.where(hits, position, length), axis=1)
    last = tl.max(tl.where(has_weight, position, 0), axis=1)  # if no sum exceeds the target due to rounding
    return tl.where(first < length, first, last)


@triton.jit(do_not_specialize=["count", "slots", "num_segments", "num_rows", "num_excluded"])
def draw(
    queries,
    query_scales,
    rows,
    row_scales,
    candidates,
    excluded,
    seed,
    best,
    total,
    chosen,
    lse_out,
    rows_out,
    count,
    slots,
    num_segments,
    num_rows,
    num_excluded,
    row_stride,
    row_step,
    scale_stride,
    candidate_stride,
    excluded_stride,
    excluded_step,
    DIM: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Draw a row for each pair from the results of `scan` over all rows; pair p belongs to query p // slots.

    best, total and chosen are as `scan` wrote them; `SEGMENTS` is num_segments or more. The kernel writes lse_out
    float32 `[batch]` and, if it is given, rows_out int64 `[count]`: a segment is drawn in proportion to its sum, `scan`
    has chosen its stretch, and a row of the stretch is drawn in proportion to exp(score).
    """
    pair = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    is_pair = pair < count
    query, sample = (pair // slots).to(tl.int64), pair % slots
    segment = tl.arange(0, SEGMENTS)
    at = query[:, None] * num_segments + segment[None, :]
    is_segment = is_pair[:, None] & (segment < num_segments)[None, :]
    highest = tl.load(best + at, mask=is_segment, other=float("-inf"))
    top = tl.max(highest, axis=1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    sums = tl.load(total + at, mask=is_segment, other=0).to(tl.float64)
    sums = sums * tl.exp((highest - shift[:, None]).to(tl.float64))
    lse = top.to(tl.float64) + tl.log(tl.maximum(tl.sum(sums, axis=1), 1e-300))
    tl.store(lse_out + query, lse.to(tl.float32), mask=is_pair & (sample == 0))
    if rows_out is not None:
        nothing = tl.zeros([BLOCK_P], tl.int32)
        # The last counter makes these numbers different from those of `scan`.
        words = tl.philox(tl.load(seed), query.to(tl.int32), sample, nothing, nothing + 1)
        drawn = _draw_one(sums, _uniform_of_53_bits(words[0], words[1]))
        stretch = tl.load(chosen + (query * num_segments + drawn) * SAMPLES + sample, mask=is_pair, other=0)
        start = stretch.to(tl.int64) * BLOCK_S
        scores = _short_scores(
            queries,
            query_scales,
            rows,
            row_scales,
            candidates,
            excluded,
            query,
            is_pair,
            start,
            tl.minimum(start + BLOCK_S, num_rows),
            num_excluded,
            row_stride,
            row_step,
            scale_stride,
            candidate_stride,
            excluded_stride,
            excluded_step,
            DIM,
            BLOCK_P,
            BLOCK_S,
            BLOCK_K,
        )
        peak = tl.max(scores, axis=1)
        weights = tl.exp(scores - tl.where(peak == float("-inf"), 0.0, peak)[:, None]).to(tl.float64)
        row = start + _draw_one(weights, _uniform_of_53_bits(words[2], words[3]))
        tl.store(rows_out + pair, row, mask=is_pair)


@triton.jit(do_not_specialize=["count", "slots", "num_excluded"])
def pick(
    queries,
    query_scales,
    rows,
    row_scales,
    candidates,
    excluded,
    starts,
    stops,
    rows_out,
    scores_out,
    count,
    slots,
    num_excluded,
    row_stride,
    row_step,
    scale_stride,
    candidate_stride,
    excluded_stride,
    excluded_step,
    DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Score pairs of a query and a short range of rows; pair p belongs to query p // slots.

    The kernel writes either all scores of each pair (scores_out float32 `[count, BLOCK_N]`) or its first best row
    (rows_out int64 `[count]`).
    """
    pair = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    is_pair = pair < count
    query = (pair // slots).to(tl.int64)
    start = tl.load(starts + pair, mask=is_pair, other=0)
    scores = _short_scores(
        queries,
        query_scales,
        rows,
        row_scales,
        candidates,
        excluded,
        query,
        is_pair,
        start,
        tl.load(stops + pair, mask=is_pair, other=0),
        num_excluded,
        row_stride,
        row_step,
        scale_stride,
        candidate_stride,
        excluded_stride,
        excluded_step,
        DIM,
        BLOCK_P,
        BLOCK_N,
        BLOCK_K,
    )
    local = tl.arange(0, BLOCK_N)
    if scores_out is not None:
        at = scores_out + pair.to(tl.int64)[:, None] * BLOCK_N + local[None, :]
        tl.store(at, scores, mask=is_pair[:, None])
    else:
        is_best = (scores == tl.max(scores, axis=1)[:, None]) & (scores > float("-inf"))
        first = tl.min(tl.where(is_best, local[None, :], BLOCK_N), axis=1)
        tl.store(rows_out + pair, start + tl.where(first < BLOCK_N, first, 0), mask=is_pair)
