/* The positions of many values in an array of distinct ones: the table of ctrlib/data/vocabulary.py's _Index.
 *
 * A slot holds 32 bits of a value's hash and its position + 1 (0: empty); a value that finds its slot taken goes to the next
 * one. Values are strings (`bytes` from offsets[i] to offsets[i + 1]) or, without offsets, 64-bit integers.
 */
#include <stdint.h>
#include <string.h>

#define HIGH 0xffffffff00000000u
#define PLACE(hash, size) (((hash) & 0xffffffffu) * (size) >> 32) /* of 0 … size − 1 */
#define POSITION(slot) ((int64_t)((slot) & 0xffffffffu) - 1)

typedef struct {
    const int64_t *offsets;
    const uint8_t *bytes;
} Values;

static inline int same(Values a, int64_t i, Values b, int64_t j) {
    if (!a.offsets) return ((const int64_t *)a.bytes)[i] == ((const int64_t *)b.bytes)[j];
    const int64_t size = a.offsets[i + 1] - a.offsets[i];
    if (size != b.offsets[j + 1] - b.offsets[j]) return 0;
    return !memcmp(a.bytes + a.offsets[i], b.bytes + b.offsets[j], (size_t)size);
}

/* Fill `slots`, `size` zeros (more than n, at most 2^32), with n values but the one at `skip`. */
void ctrlib_index(const uint64_t *hashes, int64_t n, int64_t skip, uint64_t *slots, uint64_t size) {
    for (int64_t i = 0; i < n; ++i) {
        if (i + 16 < n) __builtin_prefetch(slots + PLACE(hashes[i + 16], size), 1);
        uint64_t at = PLACE(hashes[i], size);
        if (i == skip) continue;
        while (slots[at]) at = at + 1 < size ? at + 1 : 0;
        slots[at] = (hashes[i] & HIGH) | (uint64_t)(i + 1);
    }
}

/* found[i]: the position of value i among those that ctrlib_index put into `slots`, or -1. */
void ctrlib_find(const uint64_t *hashes, int64_t n, const int64_t *offsets, const uint8_t *bytes, const uint64_t *slots,
                 uint64_t size, const int64_t *known_offsets, const uint8_t *known_bytes, int32_t *found) {
    const Values values = {offsets, bytes}, known = {known_offsets, known_bytes};
    const int64_t width = offsets ? 0 : 8;
    for (int64_t i = 0; i < n; ++i) {
        /* what a value needs comes from three places that depend on each other: ask for each a few values ahead */
        if (i + 24 < n) __builtin_prefetch(slots + PLACE(hashes[i + 24], size));
        if (i + 16 < n) {
            const int64_t soon = POSITION(slots[PLACE(hashes[i + 16], size)]);
            if (soon >= 0) __builtin_prefetch(offsets ? (const void *)(known_offsets + soon) : known_bytes + soon * width);
        }
        if (offsets && i + 8 < n) {
            const int64_t soon = POSITION(slots[PLACE(hashes[i + 8], size)]);
            if (soon >= 0) __builtin_prefetch(known_bytes + known_offsets[soon]);
        }
        uint64_t at = PLACE(hashes[i], size);
        found[i] = -1;
        for (uint64_t slot; (slot = slots[at]); at = at + 1 < size ? at + 1 : 0) {
            if ((slot ^ hashes[i]) & HIGH || !same(values, i, known, POSITION(slot))) continue;
            found[i] = (int32_t)POSITION(slot);
            break;
        }
    }
}
