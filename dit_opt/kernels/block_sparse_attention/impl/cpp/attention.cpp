// Block-sparse attention in float32; see attention.py for what the arguments are.

#include <cstring>

#include "tiles.h"

// Queries that are taken at once. Their tiles and those of one key block stay in the caches of a
// core.
constexpr int QUERIES = 64;
constexpr int MOST_KEYS = 128;
constexpr int MOST_CHANNELS = 256;

struct Strides {
    long batch, head, token;
};

// Softmax weights of scores [rows, keys] in place, in units of log2, and what has been summed so
// far scaled down where a row has a new largest score.
static void weigh(float* scores, int rows, int keys, float* largest, float* sums, float* out,
                  int channels) {
    for (int r = 0; r < rows; ++r) {
        float* row = scores + r * keys;
        Vector most = load(row);
        for (int j = WIDTH; j < keys; j += WIDTH) most = maximum(load(row + j), most);
        const float high = find_largest(most);
        if (high > largest[r]) {
            const float factor = std::exp2(largest[r] - high);
            largest[r] = high;
            sums[r] *= factor;
            float* kept = out + r * channels;
            for (int j = 0; j < channels; j += WIDTH) store(kept + j, load(kept + j) * factor);
        }
        // Without any key so far, the largest score is no number to subtract.
        const float base = largest[r] == -INFINITY ? 0.0f : largest[r];
        Vector sum = {};
        for (int j = 0; j < keys; j += WIDTH) {
            const Vector weight = raise_two(load(row + j) - base);
            sum += weight;
            store(row + j, weight);
        }
        sums[r] += add_up(sum);
    }
}

extern "C" {

// Keys [tokens, channels] of each block as [channels, block], zero behind the last token.
void ditopt_pack_keys(const float* keys, const Strides* strides, float* packed, long batch,
                      long heads, long tokens, long channels, long block, long threads) {
    const long blocks = (tokens + block - 1) / block;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < batch * heads * blocks; ++i) {
        const long item = i / (heads * blocks), head = i / blocks % heads, first = i % blocks * block;
        const float* from =
            keys + item * strides->batch + head * strides->head + first * strides->token;
        float* to = packed + i * channels * block;
        const long real = tokens - first < block ? tokens - first : block;
        // Few channels at a time, so that what is written stays in the first-level cache.
        for (long c = 0; c < channels; c += 8)
            for (long n = 0; n < block; ++n)
                for (long d = c; d < c + 8; ++d)
                    to[d * block + n] = n < real ? from[n * strides->token + d] : 0.0f;
    }
}

void ditopt_attend(const float* q, const float* packed, const float* v, const float* bias,
                   const int32_t* counts, const int32_t* lists, float* out, float* lse,
                   const Strides* strides, long batch, long heads, long key_heads, long queries,
                   long tokens, long channels, long block_q, long block_k, long capacity,
                   long plan_batch, float scale_log2, long threads) {
    const Strides &of_q = strides[0], &of_v = strides[1], &of_out = strides[2], &of_bias = strides[3];
    const long query_blocks = (queries + block_q - 1) / block_q;
    const long key_blocks = (tokens + block_k - 1) / block_k;
#pragma omp parallel num_threads(threads)
    {
        alignas(64) float scaled[QUERIES * MOST_CHANNELS], sum[QUERIES * MOST_CHANNELS];
        alignas(64) float scores[QUERIES * MOST_KEYS];
        float largest[QUERIES], sums[QUERIES];
        // Rows differ in length, so whoever is done takes the next one.
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < batch * heads * query_blocks; ++i) {
            const long item = i / (heads * query_blocks), head = i / query_blocks % heads;
            const long block = i % query_blocks, key_head = head / (heads / key_heads);
            const long row = ((plan_batch == 1 ? 0 : item) * heads + head) * query_blocks + block;
            const int32_t* list = lists + row * capacity;
            const long end = (block + 1) * block_q < queries ? (block + 1) * block_q : queries;
            for (long first = block * block_q; first < end; first += QUERIES) {
                const int rows = end - first < QUERIES ? end - first : QUERIES;
                const float* query = q + item * of_q.batch + head * of_q.head + first * of_q.token;
                for (int r = 0; r < rows; ++r) {
                    for (long d = 0; d < channels; ++d)
                        scaled[r * channels + d] = query[r * of_q.token + d] * scale_log2;
                    largest[r] = -INFINITY;
                    sums[r] = 0.0f;
                }
                std::memset(sum, 0, sizeof(float) * rows * channels);
                for (int32_t t = 0; t < counts[row]; ++t) {
                    const long key_block = list[t], begin = key_block * block_k;
                    const int real = tokens - begin < block_k ? tokens - begin : block_k;
                    const long place = (item * key_heads + key_head) * key_blocks + key_block;
                    multiply<false>(rows, block_k, channels, scaled, channels,
                                    packed + place * channels * block_k, block_k, scores, block_k);
                    for (int r = 0; r < rows; ++r) {
                        float* line = scores + r * block_k;
                        if (bias) {
                            const float* added =
                                bias + item * of_bias.batch + head * of_bias.head + begin;
                            for (int j = 0; j < real; ++j) line[j] += added[j] / LN_2;
                        }
                        for (int j = real; j < block_k; ++j) line[j] = -INFINITY;
                    }
                    weigh(scores, rows, block_k, largest, sums, sum, channels);
                    multiply<true>(rows, channels, real, scores, block_k,
                                   v + item * of_v.batch + key_head * of_v.head + begin * of_v.token,
                                   of_v.token, sum, channels);
                }
                float* to = out + item * of_out.batch + head * of_out.head + first * of_out.token;
                for (int r = 0; r < rows; ++r) {
                    const bool has_keys = sums[r] != 0.0f;
                    const float inverse = has_keys ? 1.0f / sums[r] : 0.0f;
                    for (long d = 0; d < channels; d += WIDTH)
                        store(to + r * of_out.token + d, load(sum + r * channels + d) * inverse);
                    if (lse)
                        lse[(item * heads + head) * queries + first + r] =
                            has_keys ? (largest[r] + std::log2(sums[r])) * LN_2 : -INFINITY;
                }
            }
        }
    }
}

}  // extern "C"
