"""Causal attention with dropout for NVIDIA GPUs, in Triton: a forward kernel and two backward ones.

FlashAttention's algorithm (Dao 2023, arXiv 2307.08691): a program takes one block of queries (or of
keys) and goes through the blocks on the other side that it meets; no score leaves it. Each output
is written by one program, without atomics, so results repeat bit for bit. Only
`model.triton_attention` imports this module, which needs the extra `triton`; the arrays are
described there. Shape suffixes are those of one block here: T and S positions, K a head's values,
padded to a power of two.
"""

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1e30)  # a score that the softmax turns to 0, also in fp32 sums
LOG2_E = tl.constexpr(1.4426950408889634)  # GPUs have exp2, not exp


@triton.jit
def forward(
    q_ptr, k_ptr, v_ptr, starts_ptr, words_ptr, q_segments_ptr, k_segments_ptr,
    out_ptr, log_sum_ptr,
    N_QUERIES: tl.constexpr, N_KEYS: tl.constexpr, N_HEADS: tl.constexpr, D_HEAD: tl.constexpr,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the output of a block of queries, and the logs of its softmax's sums."""
    # Late blocks have the most keys: they start first.
    first = (N_QUERIES // BLOCK_T - 1 - tl.program_id(0)) * BLOCK_T
    head, row = tl.program_id(1), tl.program_id(2)
    queries = _offset(row, head, N_QUERIES, N_HEADS, D_HEAD)
    keys = _offset(row, head, N_KEYS, N_HEADS, D_HEAD)
    lines = (row * N_HEADS + head).to(tl.int64) * N_QUERIES  # of one value a query and head

    i_T = first + tl.arange(0, BLOCK_T)
    start = tl.load(starts_ptr + first // CHUNK) + first % CHUNK
    t_T = start + tl.arange(0, BLOCK_T)
    q_TK = _load(q_ptr + queries, i_T, N_HEADS, D_HEAD, BLOCK_K)
    a_T, b_T = _words(words_ptr, lines, i_T, THRESHOLD)
    q_segment_T = _segments(q_segments_ptr, row, N_QUERIES, i_T, SEGMENTS)

    out_TK = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    max_T = tl.full([BLOCK_T], HIDDEN, tl.float32)
    sum_T = tl.zeros([BLOCK_T], tl.float32)
    for EDGE in tl.static_range(2):
        begin, end = _key_range(start, WINDOW, BLOCK_T, BLOCK_S, EDGE)
        for key in range(begin, end, BLOCK_S):
            s_S = key + tl.arange(0, BLOCK_S)
            k_SK = _load(k_ptr + keys, s_S, N_HEADS, D_HEAD, BLOCK_K)
            v_SK = _load(v_ptr + keys, s_S, N_HEADS, D_HEAD, BLOCK_K)
            k_segment_S = _segments(k_segments_ptr, row, N_KEYS, s_S, SEGMENTS)
            scores_TS = tl.dot(q_TK, tl.trans(k_SK)) * (SCALE * LOG2_E)
            scores_TS = _hide(scores_TS, t_T, s_S, q_segment_T, k_segment_S, WINDOW, SEGMENTS, EDGE)
            # Where a block hides all its keys from a query, the maximum is HIDDEN and each adds 1.
            # Its own key comes later, and then all that was added is multiplied by 0.
            new_max_T = tl.maximum(max_T, tl.max(scores_TS, 1))
            exp_TS = tl.exp2(scores_TS - new_max_T[:, None])
            shrink_T = tl.exp2(max_T - new_max_T)
            # Dropped probabilities count in the sum: the softmax comes before the dropout.
            sum_T = sum_T * shrink_T + tl.sum(exp_TS, 1)
            if THRESHOLD > 0:
                exp_TS = tl.where(keep_mask(a_T, b_T, key, THRESHOLD, BLOCK_S), exp_TS, 0.0)
            out_TK = out_TK * shrink_T[:, None]
            out_TK = tl.dot(exp_TS.to(v_SK.dtype), v_SK, out_TK)
            max_T = new_max_T

    out_TK = out_TK * (65536 / (65536 - THRESHOLD)) / sum_T[:, None]
    _store(out_ptr + queries, i_T, out_TK, N_HEADS, D_HEAD, BLOCK_K)
    tl.store(log_sum_ptr + lines + i_T, (max_T + tl.log2(sum_T)) / LOG2_E)


@triton.jit
def backward_queries(
    q_ptr, k_ptr, v_ptr, starts_ptr, words_ptr, q_segments_ptr, k_segments_ptr,
    d_out_ptr, log_sum_ptr, mean_ptr,
    d_q_ptr,
    N_QUERIES: tl.constexpr, N_KEYS: tl.constexpr, N_HEADS: tl.constexpr, D_HEAD: tl.constexpr,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a block of queries."""
    first = (N_QUERIES // BLOCK_T - 1 - tl.program_id(0)) * BLOCK_T
    head, row = tl.program_id(1), tl.program_id(2)
    queries = _offset(row, head, N_QUERIES, N_HEADS, D_HEAD)
    keys = _offset(row, head, N_KEYS, N_HEADS, D_HEAD)
    lines = (row * N_HEADS + head).to(tl.int64) * N_QUERIES

    i_T = first + tl.arange(0, BLOCK_T)
    start = tl.load(starts_ptr + first // CHUNK) + first % CHUNK
    t_T = start + tl.arange(0, BLOCK_T)
    q_TK = _load(q_ptr + queries, i_T, N_HEADS, D_HEAD, BLOCK_K)
    d_out_TK = _load(d_out_ptr + queries, i_T, N_HEADS, D_HEAD, BLOCK_K)
    log_sum_T = tl.load(log_sum_ptr + lines + i_T) * LOG2_E
    mean_T = tl.load(mean_ptr + lines + i_T)
    a_T, b_T = _words(words_ptr, lines, i_T, THRESHOLD)
    q_segment_T = _segments(q_segments_ptr, row, N_QUERIES, i_T, SEGMENTS)

    d_q_TK = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for EDGE in tl.static_range(2):
        begin, end = _key_range(start, WINDOW, BLOCK_T, BLOCK_S, EDGE)
        for key in range(begin, end, BLOCK_S):
            s_S = key + tl.arange(0, BLOCK_S)
            k_SK = _load(k_ptr + keys, s_S, N_HEADS, D_HEAD, BLOCK_K)
            v_SK = _load(v_ptr + keys, s_S, N_HEADS, D_HEAD, BLOCK_K)
            k_segment_S = _segments(k_segments_ptr, row, N_KEYS, s_S, SEGMENTS)
            scores_TS = tl.dot(q_TK, tl.trans(k_SK)) * (SCALE * LOG2_E)
            scores_TS = _hide(scores_TS, t_T, s_S, q_segment_T, k_segment_S, WINDOW, SEGMENTS, EDGE)
            probs_TS = tl.exp2(scores_TS - log_sum_T[:, None])
            d_probs_TS = tl.dot(d_out_TK, tl.trans(v_SK))
            if THRESHOLD > 0:
                d_probs_TS = d_probs_TS * (65536 / (65536 - THRESHOLD))
                keep_TS = keep_mask(a_T, b_T, key, THRESHOLD, BLOCK_S)
                d_probs_TS = tl.where(keep_TS, d_probs_TS, 0.0)
            d_scores_TS = probs_TS * (d_probs_TS - mean_T[:, None])
            d_q_TK = tl.dot(d_scores_TS.to(k_SK.dtype), k_SK, d_q_TK)

    _store(d_q_ptr + queries, i_T, d_q_TK * SCALE, N_HEADS, D_HEAD, BLOCK_K)


@triton.jit
def backward_keys(
    q_ptr, k_ptr, v_ptr, starts_ptr, words_ptr, q_segments_ptr, k_segments_ptr,
    d_out_ptr, log_sum_ptr, mean_ptr,
    d_k_ptr, d_v_ptr,
    N_QUERIES: tl.constexpr, N_KEYS: tl.constexpr, N_HEADS: tl.constexpr, D_HEAD: tl.constexpr,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a block of keys and of its values, from all queries that see it."""
    key = tl.program_id(0) * BLOCK_S
    head, row = tl.program_id(1), tl.program_id(2)
    queries = _offset(row, head, N_QUERIES, N_HEADS, D_HEAD)
    keys = _offset(row, head, N_KEYS, N_HEADS, D_HEAD)
    lines = (row * N_HEADS + head).to(tl.int64) * N_QUERIES

    s_S = key + tl.arange(0, BLOCK_S)
    k_SK = _load(k_ptr + keys, s_S, N_HEADS, D_HEAD, BLOCK_K)
    v_SK = _load(v_ptr + keys, s_S, N_HEADS, D_HEAD, BLOCK_K)
    k_segment_S = _segments(k_segments_ptr, row, N_KEYS, s_S, SEGMENTS)

    d_k_SK = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    d_v_SK = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    for chunk in range(N_QUERIES // CHUNK):
        start = tl.load(starts_ptr + chunk)
        for EDGE in tl.static_range(2):
            begin, end = _query_range(key - start, CHUNK, WINDOW, BLOCK_T, BLOCK_S, EDGE)
            for within in range(begin, end, BLOCK_T):
                i_T = chunk * CHUNK + within + tl.arange(0, BLOCK_T)
                t_T = start + within + tl.arange(0, BLOCK_T)
                q_TK = _load(q_ptr + queries, i_T, N_HEADS, D_HEAD, BLOCK_K)
                d_out_TK = _load(d_out_ptr + queries, i_T, N_HEADS, D_HEAD, BLOCK_K)
                log_sum_T = tl.load(log_sum_ptr + lines + i_T) * LOG2_E
                mean_T = tl.load(mean_ptr + lines + i_T)
                a_T, b_T = _words(words_ptr, lines, i_T, THRESHOLD)
                q_segment_T = _segments(q_segments_ptr, row, N_QUERIES, i_T, SEGMENTS)
                scores_TS = tl.dot(q_TK, tl.trans(k_SK)) * (SCALE * LOG2_E)
                scores_TS = _hide(
                    scores_TS, t_T, s_S, q_segment_T, k_segment_S, WINDOW, SEGMENTS, EDGE
                )
                probs_TS = tl.exp2(scores_TS - log_sum_T[:, None])
                kept_TS = probs_TS
                d_probs_TS = tl.dot(d_out_TK, tl.trans(v_SK))
                if THRESHOLD > 0:
                    d_probs_TS = d_probs_TS * (65536 / (65536 - THRESHOLD))
                    keep_TS = keep_mask(a_T, b_T, key, THRESHOLD, BLOCK_S)
                    d_probs_TS = tl.where(keep_TS, d_probs_TS, 0.0)
                    kept_TS = tl.where(keep_TS, probs_TS, 0.0)
                d_v_SK = tl.dot(tl.trans(kept_TS.to(d_out_TK.dtype)), d_out_TK, d_v_SK)
                d_scores_TS = probs_TS * (d_probs_TS - mean_T[:, None])
                d_k_SK = tl.dot(tl.trans(d_scores_TS.to(q_TK.dtype)), q_TK, d_k_SK)

    _store(d_k_ptr + keys, s_S, d_k_SK * SCALE, N_HEADS, D_HEAD, BLOCK_K)
    d_v_SK = d_v_SK * (65536 / (65536 - THRESHOLD))
    _store(d_v_ptr + keys, s_S, d_v_SK, N_HEADS, D_HEAD, BLOCK_K)


@triton.jit
def keep_mask(a_T, b_T, key, THRESHOLD: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return bools `[T, S]`: whether dropout keeps each of the keys from `key`, an even number, on.

    A hash of a query's two random words and of half the key's position gives 16 bits to each of two
    neighbouring keys. It is computed once for both; the compiler would not find that.
    """
    pair_P = (key // 2 + tl.arange(0, BLOCK_S // 2)).to(tl.uint32)
    x_TP = (pair_P * 0x9E3779B1)[None, :] + a_T[:, None]
    x_TP = (x_TP ^ (x_TP >> 16)) * 0x7FEB352D
    x_TP = (x_TP ^ (x_TP >> 15) ^ b_T[:, None]) * 0x846CA68B
    x_TP = x_TP ^ (x_TP >> 16)
    # The bits of both, each in the upper half of a word: what stands below changes no comparison.
    bits_TS = tl.reshape(tl.join(x_TP << 16, x_TP), [a_T.shape[0], BLOCK_S])
    return bits_TS >= THRESHOLD * 65536


@triton.jit
def _hide(
    scores_TS, t_T, s_S, q_segment_T, k_segment_S,
    WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Return the scores, and HIDDEN where a query must not see a key."""
    if EDGE:
        scores_TS = tl.where(t_T[:, None] >= s_S[None, :], scores_TS, HIDDEN)
        if WINDOW >= 0:
            scores_TS = tl.where(t_T[:, None] - s_S[None, :] <= WINDOW, scores_TS, HIDDEN)
    if SEGMENTS:
        scores_TS = tl.where(q_segment_T[:, None] == k_segment_S[None, :], scores_TS, HIDDEN)
    return scores_TS


@triton.jit
def _key_range(
    start, WINDOW: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, EDGE: tl.constexpr
):
    """Return the keys that queries from position `start` on meet: from, to.

    With EDGE those in blocks that only some of them see, else those that all of them see. With a
    window all are taken for the former: they are few.
    """
    if WINDOW >= 0:
        begin = tl.maximum(start - WINDOW, 0) // BLOCK_S * BLOCK_S
        diagonal = begin
    else:
        begin = 0
        diagonal = start // BLOCK_S * BLOCK_S
    if EDGE:
        return diagonal, start + BLOCK_T
    else:
        return begin, diagonal


@triton.jit
def _query_range(
    key, CHUNK: tl.constexpr, WINDOW: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Return the queries of a chunk that meet the block of keys at `key`: from, to, in the chunk.

    `key` counts from the chunk's start, and may lie before or after it. EDGE is as in `_key_range`.
    """
    begin = tl.minimum(tl.maximum(key, 0), CHUNK) // BLOCK_T * BLOCK_T
    last = key + BLOCK_S - 1
    if WINDOW >= 0:
        whole = tl.minimum(tl.maximum(last + 1 + WINDOW, 0), CHUNK)
        end = whole
    else:
        whole = tl.minimum(tl.cdiv(tl.maximum(last, 0), BLOCK_T) * BLOCK_T, CHUNK)
        end = whole * 0 + CHUNK
    if EDGE:
        return begin, whole
    else:
        return whole, end


@triton.jit
def _offset(row, head, LENGTH: tl.constexpr, N_HEADS: tl.constexpr, D_HEAD: tl.constexpr):
    """Return where a row's and head's part of an array `[B, length, H, K]` begins."""
    return (row.to(tl.int64) * LENGTH * N_HEADS + head) * D_HEAD


@triton.jit
def _load(ptr, i_T, N_HEADS: tl.constexpr, D_HEAD: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return `[T, K]` of the positions i of one head."""
    k_K = tl.arange(0, BLOCK_K)
    place_TK = i_T[:, None] * (N_HEADS * D_HEAD) + k_K[None, :]
    if D_HEAD == BLOCK_K:
        return tl.load(ptr + place_TK)
    else:
        return tl.load(ptr + place_TK, mask=k_K[None, :] < D_HEAD, other=0.0)


@triton.jit
def _store(ptr, i_T, x_TK, N_HEADS: tl.constexpr, D_HEAD: tl.constexpr, BLOCK_K: tl.constexpr):
    """Write what `_load` reads."""
    k_K = tl.arange(0, BLOCK_K)
    place_TK = i_T[:, None] * (N_HEADS * D_HEAD) + k_K[None, :]
    x_TK = x_TK.to(ptr.dtype.element_ty)
    if D_HEAD == BLOCK_K:
        tl.store(ptr + place_TK, x_TK)
    else:
        tl.store(ptr + place_TK, x_TK, mask=k_K[None, :] < D_HEAD)


@triton.jit
def _words(ptr, lines, i_T, THRESHOLD: tl.constexpr):
    """Return the two random words of each query; without dropout anything."""
    if THRESHOLD > 0:
        place_T = (lines + i_T) * 2
        return tl.load(ptr + place_T), tl.load(ptr + place_T + 1)
    else:
        return i_T, i_T


@triton.jit
def _segments(ptr, row, LENGTH: tl.constexpr, i_T, SEGMENTS: tl.constexpr):
    """Return the documents' numbers at the positions i; where there are none, anything."""
    if SEGMENTS:
        return tl.load(ptr + row.to(tl.int64) * LENGTH + i_T)
    else:
        return i_T
