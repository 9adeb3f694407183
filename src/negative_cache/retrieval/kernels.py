"""The Triton kernels of the fused pass; `triton.py` beside this prepares their arguments and merges their results.

Names in capitals are compile-time constants. Queries are contiguous `[batch, DIM]`; all other tensors have strides.
A tensor that is None takes its code out of the kernel.
"""

import functools

import triton
import triton.language as tl

# Integers that change from call to call: their value must not lead to another compilation.
_CHANGING = ["batch", "group_size", "num_longer", "num_parts", "part_blocks", "num_segments", "num_excluded"]


@triton.jit
def _hide(scores, hidden, hidden_at, is_query, start, stride, count):
    """Put -inf at the excluded rows of a block, if there are any.

    `hidden [BLOCK_M, n]` has some of the excluded rows, and `hidden_at [BLOCK_M]` points to the first of them. Only a
    block that has one of them, which few have, is looked at score by score.
    """
    is_near = (hidden >= start) & (hidden < start + scores.shape[1])
    if tl.max(tl.max(is_near.to(tl.int32), axis=1), axis=0) > 0:
        for number in range(count):
            row = tl.load(hidden_at + number * stride, mask=is_query, other=-1).to(tl.int32) - start
            scores = tl.where(row[:, None] == tl.arange(0, scores.shape[1])[None, :], float("-inf"), scores)
    return scores


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scores of BLOCK_M queries and one segment, block of BLOCK_N rows by block, reduced on the way.

    The rows are groups of group_size or group_size + 1, a group is num_parts segments of part_blocks blocks. Written
    per query and segment: the highest score (best_out float32), then

    - GROUPED: the first block that has it (chosen_out int32 `[batch, num_segments]`, counted within the group);
    - otherwise: the sum of exp(score - highest) (total_out float32), and SAMPLES blocks, each drawn in proportion to
      its own such sum (chosen_out int32 `[batch, num_segments, SAMPLES]`).

    maxima_out float32 `[batch, part_blocks * num_parts]` has the highest score of every block of a single group.
    """
    num_tiles = tl.cdiv(batch, BLOCK_M)
    segment = tl.program_id(0) // num_tiles
    query = (tl.program_id(0) % num_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_query = query < batch
    group = segment // num_parts
    first_block = (segment % num_parts) * part_blocks
    group_start = group * group_size + tl.minimum(group, num_longer)
    group_stop = group_start + group_size + tl.where(group < num_longer, 1, 0)
    num_blocks = tl.minimum(part_blocks, tl.cdiv(group_stop - group_start, BLOCK_N) - first_block)

    NUM_K: tl.constexpr = (DIM + BLOCK_K - 1) // BLOCK_K
    local = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    query_at = query.to(tl.int64)[:, None] * DIM + column[None, :]
    row_at = local[None, :] * row_stride + column[:, None] * row_step
    if NUM_K == 1:  # the queries stay on the chip
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
        key = tl.load(seed)
        counter = tl.zeros([BLOCK_M, SAMPLES], tl.int32)
        counter_query = counter + query[:, None]
        counter_sample = counter + tl.arange(0, SAMPLES)[None, :]
    if rows.dtype.element_ty == tl.int8:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    # One loop over blocks and their chunks of columns, so that loads run ahead across blocks.
    for step in range(num_blocks * NUM_K):
        block = first_block + step // NUM_K
        k = step % NUM_K
        start = group_start + block * BLOCK_N
        is_row = local < group_stop - start
        is_column = column < DIM - k * BLOCK_K
        tile = rows + start.to(tl.int64) * row_stride + k * BLOCK_K * row_step
        if NUM_K > 1:
            q = tl.load(queries + k * BLOCK_K + query_at, mask=is_query[:, None] & is_column[None, :], other=0)
        r = tl.load(tile + row_at, mask=is_column[:, None] & is_row[None, :], other=0)
        if UPCAST:  # the interpreter's products know no bfloat16
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
                shift = tl.where(higher == float("-inf"), 0.0, higher)
                inside = tl.sum(tl.exp(scores - shift[:, None]), axis=1)
                total = total * tl.exp(best - shift) + inside
                best = higher
                if SAMPLES > 0:
                    # The block takes the place of the chosen one with probability inside / total. The uniform has 32
                    # bits and is never 0, so a block without weight never wins; it may round to 1, so <=.
                    word, _, _, _ = tl.philox(key, counter_query, counter + block, counter_sample, counter)
                    uniform = (word.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10
                    wins = (uniform * total[:, None] <= inside[:, None]) & (inside > 0)[:, None]
                    chosen = tl.where(wins, block, chosen)
            acc = tl.zeros_like(acc)

    at = query.to(tl.int64) * num_segments + segment
    tl.store(best_out + at, best, mask=is_query)
    if GROUPED:
        tl.store(chosen_out + at, chosen, mask=is_query)
    else:
        tl.store(total_out + at, total, mask=is_query)
        if SAMPLES > 0:
            sample = tl.arange(0, SAMPLES)
            tl.store(chosen_out + at[:, None] * SAMPLES + sample[None, :], chosen, mask=is_query[:, None])


@functools.cache
def tuned():
    """`scan` with the fastest of some ways to cut it, measured when it meets new shapes."""
    configs = [
        triton.Config({"BLOCK_K": block_k}, num_warps=num_warps, num_stages=num_stages)
        for block_k in (32, 64, 128, 256)
        for num_warps in (4, 8)
        for num_stages in (2, 3, 4)
    ]
    return triton.autotune(configs, key=["DIM", "GROUPED", "SAMPLES", "EXCLUDED", "BLOCK_M", "BLOCK_N"])(scan)


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
    uniforms,
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
    """Scores of `count` pairs of a query and a short range of rows; pair p belongs to query p // slots.

    One of three things is written: all scores of a pair (scores_out float32 `[count, BLOCK_N]`), or a row (rows_out
    int64), drawn in proportion to exp(score) where there are uniforms (float64 `[count]`), else the first of the best.
    """
    pair = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    is_pair = pair < count
    query = (pair // slots).to(tl.int64)
    start = tl.load(starts + pair, mask=is_pair, other=0)
    stop = tl.load(stops + pair, mask=is_pair, other=0)
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
    scores = tl.where(is_candidate, scores, float("-inf"))

    if scores_out is not None:
        at = scores_out + pair.to(tl.int64)[:, None] * BLOCK_N + local[None, :]
        tl.store(at, scores, mask=is_pair[:, None])
    else:
        top = tl.max(scores, axis=1)
        if uniforms is not None:
            shift = tl.where(top == float("-inf"), 0.0, top)
            weights = tl.exp(scores - shift[:, None]).to(tl.float64)
            cumulative = tl.cumsum(weights, axis=1)
            target = tl.load(uniforms + pair, mask=is_pair, other=0) * tl.sum(weights, axis=1)
            has_weight = weights > 0
            hits = (cumulative > target[:, None]) & has_weight
            last = tl.max(tl.where(has_weight, local[None, :], 0), axis=1)
        else:
            hits = is_candidate & (scores == top[:, None])
            last = tl.zeros([BLOCK_P], tl.int32)
        first = tl.min(tl.where(hits, local[None, :], BLOCK_N), axis=1)
        tl.store(rows_out + pair, start + tl.where(first < BLOCK_N, first, last), mask=is_pair)
