// The most similar row of a document for every query token, and all products of the two.
//
// Query tokens lie in lanes and rows are broadcast, so that a maximum is one operation a register and nothing is ever
// stored but the maxima. Tokens of several queries share panels: the kernel knows tokens only.
#include "tables.hpp"
#include "tile.hpp"
#include "tile_narrow.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

/// Calls f<R>(first token) for each panel of n tokens: full ones, and a last one no wider than it must be.
template <class T, class F>
POLYVEC_INLINE void for_each_panel(size_t n, F f) noexcept {
    constexpr size_t L = lanes<T>;
    size_t first = 0;
    for (; first + panel_width<T> <= n; first += panel_width<T>) f.template operator()<panel_registers>(first);
    const size_t left = n - first;
    if constexpr (panel_registers == 4) {
        if (left > 3 * L) return f.template operator()<4>(first);
        if (left > 2 * L) return f.template operator()<3>(first);
    }
    if (left > L) return f.template operator()<2>(first);
    if (left > 0) f.template operator()<1>(first);
}

template <class T>
void pack(const T* tokens, size_t n, size_t d, T* panels) noexcept {
    for_each_panel<T>(n, [&]<int R>(size_t first) {
        constexpr size_t width = R * lanes<T>;
        const size_t count = n - first < width ? n - first : width;
        pack_panel(panels + first * d, tokens + first * d, count, d, d, width);
    });
}

template <int R, class T>
void panel_maxima(const T* panel, Rows<T> rows, size_t d, T* best) noexcept {
    Vec<T> most[R];
    for (int r = 0; r < R; ++r) most[r] = broadcast<T>(-__builtin_inf());
    for_each_tile<R>(panel, rows, d, [&]<int J>(size_t, const Vec<T>(&product)[J][R]) {
        for (int j = 0; j < J; ++j) {
            for (int r = 0; r < R; ++r) most[r] = max(product[j][r], most[r]);
        }
    });
    for (int r = 0; r < R; ++r) store(best + r * lanes<T>, most[r]);
}

template <class T>
void maxima(const T* panels, size_t n, const T* doc, size_t rows, const T* next, size_t d, T* best) noexcept {
    for_each_panel<T>(n, [&]<int R>(size_t first) {
        const bool last = first + R * lanes<T> >= n;
        panel_maxima<R>(panels + first * d, Rows<T>{doc, rows, d, last ? next : doc}, d, best + first);
    });
}

template <int R, class T>
void panel_align(const T* panel, Rows<T> rows, size_t d, T* best, int64_t* row) noexcept {
    Vec<T> most[R];
    Mask<T> at[R];
    for (int r = 0; r < R; ++r) {
        most[r] = broadcast<T>(-__builtin_inf());
        at[r] = Mask<T>{} - 1;
    }
    for_each_tile<R>(panel, rows, d, [&]<int J>(size_t first, const Vec<T>(&product)[J][R]) {
        for (int j = 0; j < J; ++j) {
            const Mask<T> here = Mask<T>{} + static_cast<int>(first + j);
            for (int r = 0; r < R; ++r) {
                const Mask<T> more = product[j][r] > most[r];
                most[r] = select(more, product[j][r], most[r]);
                at[r] = select(more, here, at[r]);
            }
        }
    });
    for (int r = 0; r < R; ++r) {
        store(best + r * lanes<T>, most[r]);
        for (size_t k = 0; k < lanes<T>; ++k) row[r * lanes<T> + k] = at[r][k];
    }
}

template <class T>
void align(const T* panels, size_t n, const T* doc, size_t rows, size_t d, T* best, int64_t* row) noexcept {
    for_each_panel<T>(n, [&]<int R>(size_t first) {
        panel_align<R>(panels + first * d, Rows<T>{doc, rows, d}, d, best + first, row + first);
    });
}

/// Products leave their registers for memory by constant indices alone, or they are kept there while they are summed
/// up.
template <class T>
void products(const T* panels, size_t n, const T* doc, size_t rows, size_t d, T* out, size_t stride) noexcept {
    for_each_panel<T>(n, [&]<int R>(size_t first) {
        constexpr size_t width = R * lanes<T>;
        const size_t used = n - first < width ? n - first : width;
        const auto store_products = [&]<int J>(size_t at, const Vec<T>(&product)[J][R]) __attribute__((always_inline)) {
            T some[J * width];
            T* to = used == width ? out + at * stride + first : some;
            const size_t step = used == width ? stride : width;
            for (int j = 0; j < J; ++j) {
                for (int r = 0; r < R; ++r)
                    store(to + j * step + r * lanes<T>, max(product[j][r], broadcast<T>(-__builtin_inf())));
            }
            if (used == width) return;
            for (int j = 0; j < J; ++j) {
                for (size_t i = 0; i < used; ++i) out[(at + j) * stride + first + i] = some[j * width + i];
            }
        };
        for_each_tile<R>(panels + first * d, Rows<T>{doc, rows, d}, d, store_products);
    });
}

template <class T>
constexpr MaxsimKernel<T> make() {
    return {panel_width<T>, pack<T>, maxima<T>, align<T>, products<T>};
}

template <class Format>
void pack_narrow(const float* tokens, size_t n, size_t d, float unit, uint32_t* panels) noexcept {
    for_each_panel<float>(n, [&]<int R>(size_t first) {
        constexpr size_t width = R * lanes<float>;
        const size_t count = n - first < width ? n - first : width;
        uint32_t* panel = panels + first * panel_words<Format>(d);
        if constexpr (Format::elements == 1)
            pack_panel(reinterpret_cast<float*>(panel), tokens + first * d, count, d, d, width);
        else
            pack_narrow_panel<Format, R>(panel, tokens + first * d, count, d, d, unit);
    });
}

template <class Format>
void narrow_maxima(const uint32_t* panels, size_t n, const NarrowTokens& doc, size_t d, size_t n_centroids,
                   float* best) noexcept {
    [[maybe_unused]] const MatrixUnit<by_matrices<Format>> unit;
    for_each_panel<float>(n, [&]<int R>(size_t first) {
        const uint32_t* panel = panels + first * panel_words<Format>(d);
        NarrowTokens tokens = doc;
        if (first + R * lanes<float> < n) tokens.next = doc.first;
        if constexpr (Format::residual) tokens.centroid_scores += first * n_centroids;
        Vec<float> most[R];
        for (int r = 0; r < R; ++r) most[r] = broadcast<float>(-__builtin_inff());
        for_each_narrow_tile<Format, R>(panel, tokens, d, [&]<int J>(size_t, const Vec<float>(&product)[J][R]) {
            for (int j = 0; j < J; ++j) {
                for (int r = 0; r < R; ++r) most[r] = max(product[j][r], most[r]);
            }
        });
        for (int r = 0; r < R; ++r) {
            if constexpr (Format::integer) most[r] *= lane_scale<Format, R>(panel, d, r);
            store(best + first + r * lanes<float>, most[r]);
        }
    });
}

/// The part of the centroids in the products of narrow_maxima.
template <class Format>
void centroid_scores(const float* panels, const uint32_t* narrow_panels, size_t n, const float* centroids,
                     size_t n_centroids, size_t d, float* scores) noexcept {
    for_each_panel<float>(n, [&]<int R>(size_t first) {
        const uint32_t* panel = narrow_panels + first * panel_words<Format>(d);
        float* out = scores + first * n_centroids;
        Vec<float> scale[R];
        for (int r = 0; r < R; ++r) scale[r] = lane_scale<Format, R>(panel, d, r);
        const auto store_scores = [&]<int J>(size_t at,
                                             const Vec<float>(&product)[J][R]) __attribute__((always_inline)) {
            for (int j = 0; j < J; ++j) {
                for (int r = 0; r < R; ++r) store(out + ((at + j) * R + r) * lanes<float>, product[j][r] / scale[r]);
            }
        };
        for_each_tile<R>(panels + first * d, Rows<float>{centroids, n_centroids, d}, d, store_scores);
    });
}

template <class Format>
constexpr NarrowMaxsimKernel make_narrow() {
    NarrowMaxsimKernel kernel{panel_words<Format>, pack_narrow<Format>, narrow_maxima<Format>, nullptr, 0, nullptr};
    if constexpr (Format::residual) {
        kernel.centroid_scores = centroid_scores<Format>;
        kernel.weights_bytes = Format::table_bytes;
        kernel.pack_weights = Format::pack_weights;
    }
    return kernel;
}

// ---- tokens of which only the centroids are kept: a look into a table and a maximum of bytes each

// The bytes of a centroid are words of 4: those of the tokens k, L + k, 2 L + k, 3 L + k in word k.
constexpr size_t centroid_panel = lanes<uint8_t>;

void round_products(const float* products, size_t n_centroids, const CentroidPanel& panel) noexcept {
    constexpr size_t L = lanes<float>;
    constexpr float largest = 0x1.fffffep127f;  // what overflows must not make steps infinite
    Vec<float> least[4], inverse[4];
    for (size_t j = 0; j < 4; ++j) {
        Vec<float> low = broadcast(largest), high = broadcast(-largest);
        for (size_t c = 0; c < n_centroids; ++c) {
            const Vec<float> x = load(products + c * centroid_panel + j * L);
            low = min(x, low);
            high = max(x, high);
        }
        low = max(low, broadcast(-largest));
        high = min(max(high, low), broadcast(largest));
        const Vec<float> step = high / 255 - low / 255;
        least[j] = low;
        inverse[j] = select(step > 0, 1 / step, Vec<float>{});
        store(panel.least + j * L, low);
        store(panel.step + j * L, step);
    }
    for (size_t c = 0; c < n_centroids; ++c) {
        Vec<int32_t> word{};
        for (size_t j = 0; j < 4; ++j) {
            const Vec<float> x = load(products + c * centroid_panel + j * L);
            const Vec<float> steps = min(max((x - least[j]) * inverse[j], Vec<float>{}), broadcast(255.0f));
            word |= __builtin_convertvector(steps + 0.5f, Vec<int32_t>) << static_cast<int>(8 * j);
        }
        store(panel.bytes + c * centroid_panel, (Vec<uint8_t>)word);
    }
}

POLYVEC_INLINE Vec<uint8_t> greatest_bytes(const uint8_t* bytes, const CentroidDoc& doc) noexcept {
    Vec<uint8_t> most[2] = {};
    if (doc.start >= 0) most[0] = load(bytes + doc.start * static_cast<int64_t>(centroid_panel));
    size_t k = 0;
    for (; k + 4 <= doc.n; k += 4) {
        for (size_t j = 0; j < 4; ++j) most[j % 2] = max(load(bytes + doc.ids[k + j] * centroid_panel), most[j % 2]);
    }
    for (; k < doc.n; ++k) most[0] = max(load(bytes + doc.ids[k] * centroid_panel), most[0]);
    return max(most[0], most[1]);
}

// Weights of a query's tokens for the even bytes and the odd ones, zero for the tokens of others.
struct ByteWeights {
    Vec<int16_t> even, odd;

    static ByteWeights of(const CentroidQuery& query) noexcept {
        constexpr size_t L = lanes<float>;
        ByteWeights weights{};
        for (size_t token = query.begin; token < query.end; ++token) {
            const size_t byte = token % L * 4 + token / L;
            (byte % 2 ? weights.odd : weights.even)[byte / 2] = query.weights[token - query.begin];
        }
        return weights;
    }
    POLYVEC_INLINE Vec<int32_t> sums(Vec<uint8_t> bytes) const noexcept {
        const auto shorts = (Vec<uint16_t>)bytes;
        return multiply_pairs((Vec<uint32_t>)(shorts & 255), (Vec<uint32_t>)even) +
               multiply_pairs((Vec<uint32_t>)(shorts >> 8), (Vec<uint32_t>)odd);
    }
};

void centroid_sums(const uint8_t* bytes, const CentroidDoc* docs, size_t n_docs, const CentroidQuery* queries,
                   size_t n_queries) noexcept {
    ByteWeights weights[centroid_panel];
    for (size_t q = 0; q < n_queries; ++q) weights[q] = ByteWeights::of(queries[q]);
    size_t i = 0;
    for (; i + 4 <= n_docs; i += 4) {
        Vec<uint8_t> most[4];
        for (size_t j = 0; j < 4; ++j) most[j] = greatest_bytes(bytes, docs[i + j]);
        for (size_t q = 0; q < n_queries; ++q) {
            const Vec<int32_t> products[4] = {weights[q].sums(most[0]), weights[q].sums(most[1]),
                                              weights[q].sums(most[2]), weights[q].sums(most[3])};
            const auto sums = reduce_add(products);
            for (size_t j = 0; j < 4; ++j) queries[q].sums[i + j] += sums[j];
        }
    }
    for (; i < n_docs; ++i) {
        const Vec<uint8_t> most = greatest_bytes(bytes, docs[i]);
        for (size_t q = 0; q < n_queries; ++q) queries[q].sums[i] += reduce_add(weights[q].sums(most));
    }
}

}  // namespace

extern const MaxsimKernels maxsim_kernels;
const MaxsimKernels maxsim_kernels{make<float>(),
                                   make<double>(),
                                   make_narrow<Bfloat16>(),
                                   make_narrow<Float16>(),
                                   make_narrow<Int8>(),
                                   make_narrow<Residual<4>>(),
                                   make_narrow<Residual<2>>(),
                                   {centroid_panel, round_products, centroid_sums}};

}  // namespace polyvec::POLYVEC_ISA
