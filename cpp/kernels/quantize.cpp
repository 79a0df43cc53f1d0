// Sums of clusters for k-means; tables and scans for product quantisation.
//
// A scan adds one table entry a code byte. For a batch, lanes are queries: the entries of one code for all lanes lie
// side by side, and one vector addition serves them all; limited by the L2 cache, which gives a line every few cycles.
// A single query runs through the same code with V = float: two loads a lookup. Both take the subspaces in groups whose
// tables stay in the nearest cache that holds them, and both add in the order of the subspaces, so that a query's
// scores have the same bits alone and in a batch.
#include "simd.hpp"
#include "tables.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

constexpr size_t L = lanes<float>;

// ---- k-means

template <class Half>
POLYVEC_INLINE Vec<double> widen(Half v) noexcept {
    return __builtin_convertvector(v, Vec<double>);
}

void sum_rows(const float* x, const int64_t* rows, size_t n, size_t d, const float* scale, double* sum) noexcept {
    constexpr size_t half = L / 2;
    for (size_t i = 0; i < d; i += L) {
        const size_t width = d - i < L ? d - i : L;
        Vec<double> low{}, high{};
        for (size_t k = 0; k < n; ++k) {
            const size_t row = static_cast<size_t>(rows[k]);
            const float* at = x + row * d + i;
            const Vec<float> v = width == L ? load(at) : load_first(at, width);
            const Vec<double> factor = broadcast(scale ? static_cast<double>(scale[row]) : 1.0);
            low = fma(widen(lower_half(v)), factor, low);
            high = fma(widen(upper_half(v)), factor, high);
        }
        store_first(sum + i, low, width < half ? width : half);
        if (width > half) store_first(sum + i + half, high, width - half);
    }
}

// ---- product quantisation; V is a vector of queries, or float for one

constexpr size_t group_bytes = 16;  // code bytes a group: 16 KB of tables for one query, 256 KB for 16
constexpr size_t block_rows = 256;  // codes whose sums stay on the stack between groups

template <class V>
constexpr size_t width_of = sizeof(V) / sizeof(float);

template <class V>
POLYVEC_INLINE V get(const float* p) noexcept {
    if constexpr (width_of<V> == 1) {
        return *p;
    } else {
        return load(p);
    }
}

template <class V>
POLYVEC_INLINE void put(float* p, V v) noexcept {
    if constexpr (width_of<V> == 1) {
        *p = v;
    } else {
        store(p, v);
    }
}

/// What each codeword of one subspace adds to a score: <q, c>, or -|q - c|^2. `panel`: (dsub, width).
template <class V>
void subspace_table(const float* panel, const float* codebook, size_t ksub, size_t dsub, bool squared,
                    float* out) noexcept {
    constexpr size_t W = width_of<V>;
    for (size_t c = 0; c < ksub; ++c) {
        const float* codeword = codebook + c * dsub;
        V sum{};
        for (size_t i = 0; i < dsub; ++i) {
            V x = get<V>(panel + i * W);
            if (squared) x -= codeword[i];
            keep_in_register(x);  // GCC would multiply the elements of V = float as a vector, and round twice
            sum = squared ? sum - x * x : sum + x * codeword[i];
        }
        put(out + c * W, sum);
    }
}

template <class V>
void tables(const PqTables& t, float* panel, float* out) noexcept {
    constexpr size_t W = width_of<V>, nibbles = 16, bytes = 256;
    const size_t d = t.m * t.dsub;
    for (size_t i = 0; i < d; ++i) {
        for (size_t k = 0; k < W; ++k) panel[i * W + k] = k < t.count ? t.queries[k * d + i] : 0.0f;
    }
    const auto subspace = [&](size_t s, size_t ksub, float* table) {
        subspace_table<V>(panel + s * t.dsub * W, t.codebooks + s * ksub * t.dsub, ksub, t.dsub, t.squared, table);
    };
    if (!t.nibbles) {
        for (size_t s = 0; s < t.m; ++s) subspace(s, bytes, out + s * bytes * W);
        return;
    }
    for (size_t s = 0; s < t.m; s += 2, out += bytes * W) {
        float low[nibbles * W], high[nibbles * W] = {};
        subspace(s, nibbles, low);
        if (s + 1 < t.m) subspace(s + 1, nibbles, high);
        for (size_t h = 0; h < nibbles; ++h) {
            for (size_t l = 0; l < nibbles; ++l)
                put(out + (h * nibbles + l) * W, get<V>(low + l * W) + get<V>(high + h * W));
        }
    }
}

/// sums[j] += the entries of code bytes begin .. end, for J codes.
template <class V, size_t J>
POLYVEC_INLINE void add_entries(const float* tables, const uint8_t* codes, size_t code_size, size_t begin, size_t end,
                                float* sums) noexcept {
    constexpr size_t W = width_of<V>;
    V sum[J];
    for (size_t j = 0; j < J; ++j) {
        sum[j] = get<V>(sums + j * W);
        keep_in_register(sum[j]);  // without it GCC gathers the J scalars of V = float into one vector
    }
    for (size_t s = begin; s < end; ++s) {
        const float* table = tables + s * 256 * W;
        for (size_t j = 0; j < J; ++j) sum[j] += get<V>(table + codes[j * code_size + s] * W);
    }
    for (size_t j = 0; j < J; ++j) {
        keep_in_register(sum[j]);
        put(sums + j * W, sum[j]);
    }
}

template <class V>
size_t scan(const float* tables, const uint8_t* codes, size_t n, size_t code_size, const float* floor,
            ScanHit* hits) noexcept {
    constexpr size_t W = width_of<V>, J = W == 1 ? 8 : 4;
    const Vec<float> floors = W == 1 ? broadcast(*floor) : load(floor);
    ScanHit* hit = hits;
    for (size_t first = 0; first < n; first += block_rows) {
        const size_t rows = n - first < block_rows ? n - first : block_rows;
        const uint8_t* block = codes + first * code_size;
        float sums[block_rows * W] = {};
        for (size_t s = 0; s < code_size; s += group_bytes) {
            const size_t end = code_size - s < group_bytes ? code_size : s + group_bytes;
            size_t r = 0;
            for (; r + J <= rows; r += J)
                add_entries<V, J>(tables, block + r * code_size, code_size, s, end, sums + r * W);
            for (; r < rows; ++r) add_entries<V, 1>(tables, block + r * code_size, code_size, s, end, sums + r * W);
        }
        for (size_t k = 0; k < rows * W; k += L) {
            Mask<float> above = load(sums + k) >= floors;
            if (rows * W - k < L) above &= first_lanes<float>(rows * W - k);
            for (uint32_t set = bits(above); set; set &= set - 1) {
                const size_t at = k + static_cast<size_t>(__builtin_ctz(set));
                *hit++ = {sums[at], static_cast<uint32_t>(first * W + at)};
            }
        }
    }
    return static_cast<size_t>(hit - hits);
}

template <class V>
constexpr PqKernel make() {
    return {width_of<V>, tables<V>, scan<V>};
}

}  // namespace

extern const QuantizeKernels quantize_kernels;
const QuantizeKernels quantize_kernels{sum_rows, make<float>(), make<Vec<float>>()};

}  // namespace polyvec::POLYVEC_ISA
