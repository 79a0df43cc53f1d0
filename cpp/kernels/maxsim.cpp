// The most similar row of a document for every query token.
//
// Query tokens lie in lanes and rows are broadcast, so that a maximum is one operation a register and nothing is ever
// stored but the maxima. Tokens of several queries share panels: the kernel knows tokens only.
#include "tables.hpp"
#include "tile.hpp"

namespace polyvec::POLYVEC_ISA {
namespace {

/// Calls f<R>(first token) for each panel of n tokens: full ones, then narrow ones where a full one would be at least
/// half empty.
template <class T, class F>
POLYVEC_INLINE void for_each_panel(size_t n, F f) noexcept {
    size_t first = 0;
    for (; first + panel_width<T> / 2 < n; first += panel_width<T>) f.template operator()<panel_registers>(first);
    for (; first < n; first += lanes<T>) f.template operator()<1>(first);
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

template <class T>
constexpr MaxsimKernel<T> make() {
    return {panel_width<T>, pack<T>, maxima<T>, align<T>};
}

}  // namespace

extern const MaxsimKernels maxsim_kernels;
const MaxsimKernels maxsim_kernels{make<float>(), make<double>()};

}  // namespace polyvec::POLYVEC_ISA
