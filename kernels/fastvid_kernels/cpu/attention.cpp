// Causal attention over packed rows in bf16, forward and backward, for CPUs with AVX512-BF16 (arXiv:2205.14135).
//
// A task is one key/value head. For each segment it brings the head's keys and values into the layouts that VDPBF16PS
// takes, then goes through the queries in blocks of BLOCK. A block sees all its keys at once, so its softmax needs no
// second pass, and backward computes it again from queries and keys: nothing else is saved. Scores, softmax, and sums
// over queries and keys are fp32; probabilities and their gradients are rounded to bf16 as operands of products.

#include "tiles.h"

extern "C" {

// Strides count bf16 numbers from row to row; heads of a row lie d apart.
struct Attention {
    const uint16_t *q, *k, *v, *constant_k, *constant_v;
    int64_t q_stride, k_stride, v_stride, constant_k_stride, constant_v_stride, constant_rows;
    const int64_t* kv_rows;
    const int32_t *q_bounds, *k_bounds;
    int64_t segments, heads, kv_heads, d, threads;
};
}

namespace {

constexpr int64_t BLOCK = 48;  // queries, whole tiles; scores of a thousand keys stay in the second-level cache

// One segment's keys or values of a head: constant rows, and those that follow them.
struct Rows {
    const uint16_t *constant, *own;
    int64_t constant_stride, own_stride, constant_rows, first;
    const int64_t* chosen;  // the row of each key; null: in order from `first`

    const uint16_t* operator()(int64_t key) const {
        const int64_t at = chosen ? chosen[key] : first + key;
        return at < constant_rows ? constant + at * constant_stride : own + (at - constant_rows) * own_stride;
    }
};

struct Segment {
    int64_t q0 = 0, n = 0, first = 0, m = 0;  // first query, queries, first key, keys
    const int64_t* chosen = nullptr;

    Segment() = default;
    Segment(const Attention& x, int64_t s)
        : q0(x.q_bounds[s]), n(x.q_bounds[s + 1] - q0), first(x.k_bounds[s]), m(x.k_bounds[s + 1] - first),
          chosen(x.kv_rows ? x.kv_rows + first : nullptr) {}

    Rows keys(const Attention& x, int64_t channel) const {
        return {x.constant_k + channel, x.k + channel, x.constant_k_stride, x.k_stride, x.constant_rows, first, chosen};
    }
    Rows values(const Attention& x, int64_t channel) const {
        return {x.constant_v + channel, x.v + channel, x.constant_v_stride, x.v_stride, x.constant_rows, first, chosen};
    }
    int64_t row(int64_t key) const { return chosen ? chosen[key] : first + key; }

    // How many of the first keys are those of `other`: their layouts and sums serve both.
    int64_t same_keys(const Segment& other) const {
        int64_t same = 0;
        while (same < std::min(m, other.m) && row(same) == other.row(same)) ++same;
        return same;
    }
};

// A block of queries.
struct Block {
    int64_t begin, count, rows, seen, columns;  // rows: whole tiles; seen: keys of the last query

    Block(const Segment& segment, int64_t from)
        : begin(segment.q0 + from), count(std::min(segment.n - from, BLOCK)), rows(up(count, ROWS)),
          seen(segment.m - segment.n + from + count), columns(read_columns(seen)) {}

    int64_t seen_by(int64_t r) const { return std::min(seen, seen - count + r + 1); }

    // The block's rows end to end, zeros behind them.
    void take(const uint16_t* source, int64_t stride, int64_t d, uint16_t* out) const {
        for (int64_t r = 0; r < count; ++r) std::memcpy(out + r * d, source + (begin + r) * stride, d * 2);
        std::memset(out + count * d, 0, (rows - count) * d * 2);
    }
};

const uint32_t* words(const Buffer<uint16_t>& numbers) { return (const uint32_t*)numbers.get(); }

int64_t longest(const Attention& x) {
    int64_t keys = 0;
    for (int64_t s = 0; s < x.segments; ++s) keys = std::max<int64_t>(keys, x.k_bounds[s + 1] - x.k_bounds[s]);
    return up(keys, 3 * COLUMNS);  // whole panels, and whole tiles of rows
}

void forward_head(const Attention& x, int64_t head, uint16_t* out) {
    const int64_t d = x.d, group = x.heads / x.kv_heads, wide = longest(x), panel = d / 2 * COLUMNS;
    const float factor = 1.0f / std::sqrt((float)d);
    auto k_panels = buffer<uint32_t>(wide * d / 2), v_pairs = buffer<uint32_t>(wide * d / 2);
    auto queries = buffer<uint16_t>(BLOCK * d), p_along = buffer<uint16_t>(BLOCK * wide);
    auto scores = buffer<float>(BLOCK * wide), result = buffer<float>(BLOCK * d);
    Segment last;
    for (int64_t s = 0; s < x.segments; ++s) {
        const Segment segment(x, s);
        if (!segment.n) continue;
        const int64_t same = segment.same_keys(last);
        pair_channels(segment.keys(x, head * d), same, segment.m, d, k_panels.get());
        pair_rows(segment.values(x, head * d), same, segment.m, d, v_pairs.get());
        last = segment;
        for (int64_t g = head * group; g < (head + 1) * group; ++g)
            for (int64_t from = 0; from < segment.n; from += BLOCK) {
                const Block block(segment, from);
                block.take(x.q + g * d, x.q_stride, d, queries.get());
                product<false>(words(queries), d / 2, 1, k_panels.get(), COLUMNS, panel, d / 2, scores.get(), wide,
                               block.rows, block.columns);
                for (int64_t r = 0; r < block.rows; ++r)
                    softmax(scores.get() + r * wide, block.seen_by(r), block.columns, factor);
                round_rows(scores.get(), wide, block.rows, block.columns, p_along.get(), wide, nullptr, 0);
                product<false>(words(p_along), wide / 2, 1, v_pairs.get(), d, COLUMNS, (block.seen + 1) / 2,
                               result.get(), d, block.rows, d);
                write_rows(result.get(), block.count, d, 1.0f, out + (block.begin * x.heads + g) * d, x.heads * d);
            }
    }
}

void backward_head(const Attention& x, int64_t head, const uint16_t* grad, uint16_t* grad_q, float* grad_k,
                   float* grad_v) {
    const int64_t d = x.d, group = x.heads / x.kv_heads, wide = longest(x), panel = d / 2 * COLUMNS;
    const float factor = 1.0f / std::sqrt((float)d);
    auto k_panels = buffer<uint32_t>(wide * d / 2), v_panels = buffer<uint32_t>(wide * d / 2);
    auto k_pairs = buffer<uint32_t>(wide * d / 2);
    auto q_rows = buffer<uint16_t>(BLOCK * d), grad_rows = buffer<uint16_t>(BLOCK * d);
    auto q_pairs = buffer<uint32_t>(BLOCK * d / 2), grad_pairs = buffer<uint32_t>(BLOCK * d / 2);
    auto p = buffer<float>(BLOCK * wide), slopes = buffer<float>(BLOCK * wide), result = buffer<float>(BLOCK * d);
    auto p_across = buffer<uint32_t>(BLOCK / 2 * wide), slopes_across = buffer<uint32_t>(BLOCK / 2 * wide);
    auto slopes_along = buffer<uint16_t>(BLOCK * wide);
    auto k_sums = buffer<float>(wide * d), v_sums = buffer<float>(wide * d);
    Segment last;
    // Adds to their rows' gradients the sums of the last segment's keys from `begin` on, which then begin anew.
    auto flush = [&](int64_t begin) {
        for (int64_t j = begin; j < last.m; ++j) {
            const int64_t place = ((last.row(j) - x.constant_rows) * x.kv_heads + head) * d;
            for (int64_t c = 0; c < d && place >= 0; ++c) {
                grad_k[place + c] += factor * k_sums[j * d + c];
                grad_v[place + c] += v_sums[j * d + c];
            }
        }
        for (float* sums : {k_sums.get(), v_sums.get()}) std::fill(sums + begin * d, sums + up(last.m, ROWS) * d, 0.0f);
    };
    for (int64_t s = 0; s < x.segments; ++s) {
        const Segment segment(x, s);
        if (!segment.n) continue;
        const int64_t same = segment.same_keys(last);
        flush(same);
        const Rows keys = segment.keys(x, head * d);
        pair_channels(keys, same, segment.m, d, k_panels.get());
        pair_rows(keys, same, segment.m, d, k_pairs.get());
        pair_channels(segment.values(x, head * d), same, segment.m, d, v_panels.get());
        last = segment;
        for (int64_t g = head * group; g < (head + 1) * group; ++g)
            for (int64_t from = 0; from < segment.n; from += BLOCK) {
                const Block block(segment, from);
                const int64_t rows = block.rows, columns = block.columns, key_rows = up(block.seen, ROWS);
                block.take(x.q + g * d, x.q_stride, d, q_rows.get());
                block.take(grad + g * d, x.heads * d, d, grad_rows.get());
                pair_rows([&](int64_t r) { return q_rows.get() + r * d; }, 0, rows, d, q_pairs.get());
                pair_rows([&](int64_t r) { return grad_rows.get() + r * d; }, 0, rows, d, grad_pairs.get());
                product<false>(words(q_rows), d / 2, 1, k_panels.get(), COLUMNS, panel, d / 2, p.get(), wide, rows,
                               columns);
                product<false>(words(grad_rows), d / 2, 1, v_panels.get(), COLUMNS, panel, d / 2, slopes.get(), wide,
                               rows, columns);
                for (int64_t r = 0; r < rows; ++r) {
                    softmax(p.get() + r * wide, block.seen_by(r), columns, factor);
                    softmax_slopes(p.get() + r * wide, slopes.get() + r * wide, columns);
                }
                round_rows(p.get(), wide, rows, columns, nullptr, 0, p_across.get(), wide);
                round_rows(slopes.get(), wide, rows, columns, slopes_along.get(), wide, slopes_across.get(), wide);
                product<true>(p_across.get(), 1, wide, grad_pairs.get(), d, COLUMNS, rows / 2, v_sums.get(), d,
                              key_rows, d);
                product<true>(slopes_across.get(), 1, wide, q_pairs.get(), d, COLUMNS, rows / 2, k_sums.get(), d,
                              key_rows, d);
                product<false>(words(slopes_along), wide / 2, 1, k_pairs.get(), d, COLUMNS, (block.seen + 1) / 2,
                               result.get(), d, rows, d);
                write_rows(result.get(), block.count, d, factor, grad_q + (block.begin * x.heads + g) * d, x.heads * d);
            }
    }
    flush(0);
}

}  // namespace

extern "C" {

// out: [N, H, d] bf16, dense.
void attention_forward(const Attention* x, uint16_t* out) {
#pragma omp parallel for schedule(dynamic) num_threads(x->threads)
    for (int64_t head = 0; head < x->kv_heads; ++head) forward_head(*x, head, out);
}

// grad, grad_q: [N, H, d] bf16; grad_k, grad_v: [R, K, d] fp32, to which gradients are added; all dense.
void attention_backward(const Attention* x, const uint16_t* grad, uint16_t* grad_q, float* grad_k, float* grad_v) {
#pragma omp parallel for schedule(dynamic) num_threads(x->threads)
    for (int64_t head = 0; head < x->kv_heads; ++head) backward_head(*x, head, grad, grad_q, grad_k, grad_v);
}

}  // extern "C"
