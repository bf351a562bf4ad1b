// The softmax mass of sampled rows, summed over blocks of keys; sampled.py describes the
// arguments.

#include <vector>

#include "tiles.h"

// Sampled rows that are weighed at once, as columns of vectors.
constexpr int COLUMNS = VECTORS * WIDTH;

// Sums of lines [count, COLUMNS] as `gather` and `offsets` list them. With WEIGH the lines are
// scores, and their weights relative to the greatest score of each column, `most`, are summed.
template <bool WEIGH>
static void add_lines(const float* lines, const int64_t* gather, long gathered,
                      const int64_t* offsets, long sums, const Vector* most, float* out) {
    for (long s = 0; s < sums; ++s) {
        const long end = s + 1 < sums ? offsets[s + 1] : gathered;
        Vector sum[VECTORS] = {};
        for (long i = offsets[s]; i < end; ++i)
            for (int j = 0; j < VECTORS; ++j) {
                const Vector line = load(lines + gather[i] * COLUMNS + j * WIDTH);
                sum[j] += WEIGH ? raise_two(line - most[j]) : line;
            }
        for (int j = 0; j < VECTORS; ++j) store(out + s * COLUMNS + j * WIDTH, sum[j]);
    }
}

extern "C" {

long ditopt_count_columns() { return COLUMNS; }

void ditopt_sample_mass(const float* keys, long stride_batch, long stride_head, long stride_token,
                        const float* queries, const int64_t* gather, long gathered,
                        const int64_t* offsets, long sums, const int64_t* gather_again,
                        long gathered_again, const int64_t* offsets_again, long sums_again,
                        float* mass, long batch, long heads, long tokens, long channels, long tiles,
                        long threads) {
    const long blocks = gather_again ? sums_again : sums;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(tokens * COLUMNS), first(sums * COLUMNS), last(blocks * COLUMNS);
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < batch * heads * tiles; ++i) {
            const long item = i / (heads * tiles), head = i / tiles % heads;
            const float* key = keys + item * stride_batch + head * stride_head;
            multiply<false>(tokens, COLUMNS, channels, key, stride_token,
                            queries + i * channels * COLUMNS, COLUMNS, scores.data(), COLUMNS);
            Vector most[VECTORS], total[VECTORS] = {};
            for (int j = 0; j < VECTORS; ++j) most[j] = load(scores.data() + j * WIDTH);
            for (long n = 1; n < tokens; ++n)
                for (int j = 0; j < VECTORS; ++j)
                    most[j] = maximum(load(scores.data() + n * COLUMNS + j * WIDTH), most[j]);
            if (gathered == tokens) {
                add_lines<true>(scores.data(), gather, gathered, offsets, sums, most, first.data());
            } else {
                // Each token is in several sums, but is weighed once.
                for (long n = 0; n < tokens; ++n)
                    for (int j = 0; j < VECTORS; ++j) {
                        float* at = scores.data() + n * COLUMNS + j * WIDTH;
                        store(at, raise_two(load(at) - most[j]));
                    }
                add_lines<false>(scores.data(), gather, gathered, offsets, sums, most,
                                 first.data());
            }
            const float* found = first.data();
            for (long s = 0; s < sums; ++s)
                for (int j = 0; j < VECTORS; ++j)
                    total[j] += load(found + s * COLUMNS + j * WIDTH);
            // The sums count each token gathered / tokens times.
            for (int j = 0; j < VECTORS; ++j) total[j] *= float(tokens) / gathered;
            if (gather_again) {
                add_lines<false>(found, gather_again, gathered_again, offsets_again, sums_again,
                                 most, last.data());
                found = last.data();
            }
            // [batch, heads, blocks, tiles * COLUMNS]
            float* to = mass + ((item * heads + head) * blocks * tiles + i % tiles) * COLUMNS;
            for (long s = 0; s < blocks; ++s)
                for (int j = 0; j < VECTORS; ++j)
                    store(to + s * tiles * COLUMNS + j * WIDTH,
                          load(found + s * COLUMNS + j * WIDTH) / total[j]);
        }
    }
}

}  // extern "C"
