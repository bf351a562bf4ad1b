// Thresholds on scores, bit by bit; see thresholds.py for what the arguments are.

#include <cstdint>
#include <cstring>

// Gains of the scores that reach a threshold.
static double add_gains(const float* scores, const float* gains, long count, float threshold) {
    // Several sums, or each addition would wait for the one before.
    constexpr int LANES = 8;
    double sums[LANES] = {};
    long i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; ++j)
            sums[j] += scores[i + j] >= threshold ? gains[i + j] : 0.0f;
    for (; i < count; ++i) sums[0] += scores[i] >= threshold ? gains[i] : 0.0f;
    double total = 0.0;
    for (double sum : sums) total += sum;
    return total;
}

extern "C" void ditopt_search_bits(const float* scores, const float* gains, const float* targets,
                                   int32_t* found, long groups, long size, long period, long lowest,
                                   long steps, long within, long threads) {
    // Threads cost more than the sum of a few thousand values.
    constexpr long FEW = 1 << 16;
    for (long group = 0; group < groups; ++group) {
        const float* score = scores + group * size;
        // They are the same in all groups and repeat within one, or are one for each score.
        const float* gain = gains + group * size % period;
        const long length = period < size ? period : size;
        int32_t low = lowest;
        for (long step = steps - 1; step >= 0; --step) {
            const int32_t middle = low + (1 << step);
            float threshold;
            std::memcpy(&threshold, &middle, sizeof threshold);
            double total = 0.0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) if (size > FEW)
            for (long first = 0; first < size; first += length)
                total += add_gains(score + first, gain, length, threshold);
            const double target = targets[group];
            if (within ? total > target : total >= target) low = middle;
        }
        found[group] = low;
    }
}
