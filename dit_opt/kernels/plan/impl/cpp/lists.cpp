// Lists of blocks from masks and from bits, and bits from lists; lists.py describes the arguments.

#include <cstdint>

// Ascending lists, zero behind their counts, of the blocks j of each row r with keeps(r, j).
template <typename Keeps>
static void write_lists(long rows, long blocks, int32_t* counts, int32_t* lists, Keeps keeps) {
    for (long r = 0; r < rows; ++r) {
        int32_t* list = lists + r * blocks;
        int32_t count = 0;
        for (long j = 0; j < blocks; ++j) {
            list[count] = j;
            count += keeps(r, j);
        }
        counts[r] = count;
        for (long j = count; j < blocks; ++j) list[j] = 0;
    }
}

extern "C" {

void ditopt_list_blocks(const bool* kept, long rows, long blocks, int32_t* counts,
                        int32_t* lists) {
    write_lists(rows, blocks, counts, lists, [=](long r, long j) { return kept[r * blocks + j]; });
}

// The first `counts` of `length` entries of each list, as bits of `width` words.
void ditopt_pack_lists(const int32_t* counts, const int32_t* lists, long rows, long length,
                       long width, int32_t* words) {
    for (long r = 0; r < rows; ++r) {
        uint32_t* word = reinterpret_cast<uint32_t*>(words) + r * width;
        for (long j = 0; j < width; ++j) word[j] = 0;
        for (int32_t i = 0; i < counts[r]; ++i) {
            const int32_t block = lists[r * length + i];
            word[block / 32] |= 1u << (block % 32);
        }
    }
}

void ditopt_unpack_lists(const int32_t* words, long rows, long width, long blocks, int32_t* counts,
                         int32_t* lists) {
    write_lists(rows, blocks, counts, lists, [=](long r, long j) {
        return static_cast<uint32_t>(words[r * width + j / 32]) >> (j % 32) & 1;
    });
}

}  // extern "C"
