// Scores of blocks and sums over kept blocks; budgets.py describes the arguments.
//
// Values are rounded as torch's operators round them, or the two would keep different blocks. NaN
// counts as the least value: it has no order, and std::sort with an inconsistent order would read
// outside of the buffers.

#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

#include "tiles.h"

static float bound(float score, float lightest, float heaviest) {
    const float least = score > lightest ? score : lightest;
    return least < heaviest ? least : heaviest;
}

extern "C" {

void ditopt_score_blocks(const float* mass, const float* per_token, const float* ties,
                         float* scores, long matrices, long rows, long columns, float lightest,
                         float heaviest) {
    const Vector low = fill(lightest), high = fill(heaviest);
    for (long r = 0; r < matrices * rows; ++r) {
        const float *from = mass + r * columns, *tie = ties + r % rows * columns;
        float* to = scores + r * columns;
        long j = 0;
        for (; j + WIDTH <= columns; j += WIDTH) {
            const Vector score = load(from + j) * load(per_token + j);
            const Vector least = score > low ? score : low;
            store(to + j, (least < high ? least : high) * load(tie + j));
        }
        for (; j < columns; ++j)
            to[j] = bound(from[j] * per_token[j], lightest, heaviest) * tie[j];
    }
}

void ditopt_square_losses(const float* scores, const float* ties, float* losses, long rows,
                          long columns, long period, float lightest, float heaviest, long threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<int32_t> places(columns);
        std::vector<float> values(columns);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; ++r) {
            const float* score = scores + r * columns;
            const float* tie = ties + r % period * columns;
            for (long j = 0; j < columns; ++j) values[j] = score[j] < INFINITY ? score[j] : 0.0f;
            std::iota(places.begin(), places.end(), 0);
            std::sort(places.begin(), places.end(), [&](int32_t a, int32_t b) {
                return values[a] > values[b] || (values[a] == values[b] && a < b);
            });
            double dropped = 0.0;
            for (long n = columns - 1; n >= 0; --n) {
                const long j = places[n];
                const float own = values[j];
                dropped += own;
                const float loss = own * (2.0f * static_cast<float>(dropped) - own);
                losses[r * columns + j] = bound(loss, lightest, heaviest) * tie[j];
            }
        }
    }
}

void ditopt_rate_recall(const float* scores, const float* mass, const float* weights, float* recall,
                        long matrices, long rows, long columns, long kept, long threads) {
    const long size = rows * columns;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> ordered(size);
#pragma omp for schedule(static)
        for (long m = 0; m < matrices; ++m) {
            const float *score = scores + m * size, *own = mass + m * size;
            for (long n = 0; n < size; ++n) ordered[n] = score[n] > 0.0f ? score[n] : 0.0f;
            const auto last = ordered.begin() + kept - 1;
            std::nth_element(ordered.begin(), last, ordered.end(), std::greater<float>());
            const float limit = *last;
            // Of blocks at the limit, as many as are still missing.
            long room = std::count(ordered.begin(), last + 1, limit);
            double total = 0.0;
            for (long n = 0; n < size; ++n) {
                const bool keeps = score[n] > limit || (score[n] == limit && room-- > 0);
                total += keeps ? own[n] * weights[n / columns] : 0.0f;
            }
            recall[m] = total;
        }
    }
}

void ditopt_measure_kept(const bool* kept, const float* mass, const float* weights,
                         const float* areas, float* recall, float* density, long matrices,
                         long rows, long columns) {
    for (long m = 0; m < matrices; ++m) {
        double found = 0.0, total = 0.0, area = 0.0;
        for (long i = 0; i < rows; ++i) {
            const long at = (m * rows + i) * columns;
            double row = 0.0, all = 0.0;
            for (long j = 0; j < columns; ++j) {
                all += mass[at + j];
                row += kept[at + j] ? mass[at + j] : 0.0f;
                area += kept[at + j] ? areas[i * columns + j] : 0.0f;
            }
            found += weights[i] * row;
            total += weights[i] * all;
        }
        recall[m] = total > 0.0 ? found / total : 1.0;
        density[m] = area;
    }
}

}  // extern "C"
