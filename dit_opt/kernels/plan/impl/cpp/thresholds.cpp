// Thresholds on scores, bit by bit; thresholds.py describes the arguments.

#include <cstring>

#include "tiles.h"

// As many values as a vector holds in float64.
constexpr int FEW = WIDTH / 2;
typedef float Few __attribute__((vector_size(4 * FEW), aligned(4), may_alias));
typedef double Sums __attribute__((vector_size(8 * FEW)));

static inline Few load_few(const float* from) { return *reinterpret_cast<const Few*>(from); }

// The sum of the gains whose scores reach a threshold.
static double add_gains(const float* scores, const float* gains, long count, float threshold) {
    // Several independent sums, or each addition would wait for the one before.
    constexpr int LANES = 4;
    Sums sums[LANES] = {};
    long i = 0;
    for (; i + LANES * FEW <= count; i += LANES * FEW)
        for (int j = 0; j < LANES; ++j) {
            const Few score = load_few(scores + i + j * FEW), gain = load_few(gains + i + j * FEW);
            const Few reaching = score >= threshold ? gain : Few{};
            sums[j] += __builtin_convertvector(reaching, Sums);
        }
    double total = 0.0;
    for (; i < count; ++i) total += scores[i] >= threshold ? gains[i] : 0.0f;
    for (Sums sum : sums)
        for (int j = 0; j < FEW; ++j) total += sum[j];
    return total;
}

extern "C" void ditopt_search_bits(const float* scores, const float* gains, const float* targets,
                                   int32_t* found, long groups, long size, long period, long lowest,
                                   long steps, long within, long threads) {
    // Threads cost more than the sum of a few thousand values.
    constexpr long ENOUGH = 1 << 16;
    for (long group = 0; group < groups; ++group) {
        const float* score = scores + group * size;
        // Gains are the same in all groups and repeat within each, or there is one for each score.
        const float* gain = gains + group * size % period;
        const long length = period < size ? period : size;
        int32_t low = lowest;
        for (long step = steps - 1; step >= 0; --step) {
            const int32_t middle = low + (1 << step);
            float threshold;
            std::memcpy(&threshold, &middle, sizeof threshold);
            double total = 0.0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) if (size > ENOUGH)
            for (long first = 0; first < size; first += length)
                total += add_gains(score + first, gain, length, threshold);
            const double target = targets[group];
            if (within ? total > target : total >= target) low = middle;
        }
        found[group] = low;
    }
}
