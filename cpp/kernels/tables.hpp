// The kernels of one ISA level, as plain function pointers: one struct an engine.
// kernels/<stem>.cpp fills its engine's struct; kernels.cpp gathers them; src/isa.cpp chooses one `Kernels` a process.
// Arguments are plain pointers and counts: no vector type crosses this boundary.
#pragma once

#include <cstddef>
#include <cstdint>

#include "prefetch.hpp"

namespace polyvec {

/// Row k of what is gathered is rows[ids[k]]; rows: null when absent.
template <class T>
struct Gathered {
    const T* rows;
    const std::int64_t* ids;
};

/// What a relation query gathers: heads, the rotors they are multiplied by (over their norms, when `normalize`), and
/// what is added.
template <class T>
struct RelationRows {
    Gathered<T> heads, rotors, translations, head_translations;
    bool normalize;
};

/// Scores of normalising flows as inner products: entities are rows of a mean and scales, relations of a mean and a
/// scale; a query row times a key row, plus the query's offset and the key's bias, is minus the distance.
template <class T>
struct FlowKernel {
    /// Rows first .. last of out and offset.
    void (*query)(const Gathered<T>& heads, const Gathered<T>& relations, std::size_t first, std::size_t last,
                  std::size_t d, T* out, T* offset) noexcept;
    void (*keys)(const T* entities, std::size_t first, std::size_t last, std::size_t d, T* out, T* bias) noexcept;
};

/// Rows of `components` planes of length d: component c of a row is row[c * d .. c * d + d).
/// An algebra is its table: out[c] = sum_i table[c * components + i] * x[i] * y[i ^ c].
template <class T>
struct HypercomplexKernel {
    void (*product)(const T* x, const T* y, T* out, std::size_t components, std::size_t d, const T* table) noexcept;
    void (*norm)(const T* x, T* out, std::size_t components, std::size_t d) noexcept;
    void (*normalize)(const T* x, T* out, std::size_t components, std::size_t d) noexcept;
    void (*conjugate)(const T* x, T* out, std::size_t components, std::size_t d) noexcept;
    /// Rows first .. last of out: see RelationRows.
    void (*relation_query)(const RelationRows<T>& rows, std::size_t first, std::size_t last, T* out,
                           std::size_t components, std::size_t d, const T* table) noexcept;
    /// Rows first .. last of out: row r is the sum of x row k (*) y row k over the k in
    /// order[begins[r]] .. order[begins[r + 1]].
    void (*sum_products)(const Gathered<T>& x, const Gathered<T>& y, const std::int64_t* begins,
                         const std::int64_t* order, std::size_t first, std::size_t last, T* out, std::size_t components,
                         std::size_t d, const T* table) noexcept;
    /// The components of n numbers side by side (n, components) <-> planes (components, n).
    void (*to_planes)(const T* x, T* planes, std::size_t components, std::size_t n) noexcept;
    void (*from_planes)(const T* planes, T* x, std::size_t components, std::size_t n) noexcept;
    FlowKernel<T> wasserstein, piecewise, kl;
};

struct HypercomplexKernels {
    HypercomplexKernel<float> f32;
    HypercomplexKernel<double> f64;
};

/// One query (d,) with the rows of a table (., d) that `ids` name: n inner products, or squared distances.
template <class Id>
struct DistanceKernel {
    using Function = void (*)(const float* query, const float* rows, const Id* ids, std::size_t n, std::size_t d,
                              float* out) noexcept;
    Function dot;
    Function l2;
};

/// The same of rows in fewer bits. `scales`: what the elements of each row of int8 are multiplied by; null: 1.
template <class Id>
struct NarrowDistanceKernel {
    using Function = void (*)(const float* query, const void* rows, const float* scales, const Id* ids, std::size_t n,
                              std::size_t d, float* out) noexcept;
    Function dot;
    Function l2;
};

/// Elements of 16 bits in rows that slots of a graph name.
struct HalfKernels {
    NarrowDistanceKernel<std::uint32_t> u32;
    void (*widen)(const void* row, std::size_t d, float* out) noexcept;
};

struct DistanceKernels {
    DistanceKernel<std::uint32_t> u32;
    DistanceKernel<std::int64_t> i64;
    NarrowDistanceKernel<std::int64_t> bf16, f16, i8;
    HalfKernels bf16_by_slot, f16_by_slot;
};

/// Rows of an integer of 8 or 4 bits an element: value i of a row is (code i - bias) * scale. Rows lie on cache lines,
/// and are padded with the bias up to one. Byte j of a line of 4-bit codes holds those of its elements j and, in the
/// high bits, j + 64. At most most_int8 elements: 127^2 times that fits into 31 bits.
struct IntegerRows {
    const std::uint8_t* codes;
    const float* factors;  // two a row: scale, and what is added to its distances
    std::size_t stride;
};

/// The distance from row i is constant + factors[2 i + 1] + factor * scale of i * (<values, codes of i> - offset).
struct IntegerQuery {
    const std::uint8_t* values;  // signed bytes, padded with 0 as rows are
    std::int32_t offset;         // the bias times their sum
    float factor, constant;
};

struct IntegerCode {
    float scale, squares;  // squares: of the decoded values
    std::int32_t sum;      // of the values before scaling
};

/// Of a query's values; a row's largest is bias - 1.
constexpr int most_query_value = 127;

struct IntegerDistanceKernels {
    int bits, bias;  // 8 and 128, or 4 and 8
    /// Writes the `stride` bytes of the row of x (d,).
    IntegerCode (*encode)(const float* x, std::size_t d, std::size_t stride, std::uint8_t* row) noexcept;
    /// Writes n values, those of x (d,) over the scale, rounded, and zeros. The largest is `most`.
    IntegerCode (*encode_query)(const float* x, std::size_t d, std::size_t n, int most, std::uint8_t* values) noexcept;
    /// The values of a row as those of a query; returns their sum.
    std::int32_t (*query_of_row)(const std::uint8_t* row, std::size_t stride, std::uint8_t* values) noexcept;
    /// The distances of the rows that the n `ids` name.
    void (*distances)(const IntegerQuery& query, const IntegerRows& rows, const std::uint32_t* ids, std::size_t n,
                      float* out) noexcept;
    /// The d values of a row of 8 bits; null for 4.
    void (*decode)(const std::uint8_t* row, float scale, std::size_t d, float* out) noexcept;
};

/// Rows of `bits` an element, 2 to 4: value i of a row is (2 * code i - 2^bits + 1) * scale, and roughly its sign times
/// a rough scale. A plane is `plane` bytes, a multiple of 4 that holds a bit an element; bit i / plane of byte i %
/// plane belongs to element i. A row's first part is the planes of its codes, that of the high bits first, and three
/// floats: rough scale, what is added to its distances, scale. Where `second` is not null the bits are two, and the
/// plane of the low ones is the row's second part. Neither begins where a cache line could be saved, and 16 bytes can
/// be read wherever a plane has one.
struct BitRows {
    const std::uint8_t *first, *second;
    std::size_t first_stride, second_stride, plane, bits;
};

/// Of a query, whose rounding adds little to that of the rows.
constexpr int most_bit_value = 31;

/// The distance from a row is constant + weight * what is added + factor * <values, values of the row>; roughly it is
/// that of the signs, and seldom less than this less slack * rough scale.
struct BitQuery {
    const std::uint8_t* values;  // as `prepare` writes them, in the kernel's own order
    std::int32_t sum;            // of the values
    float factor, slack, weight, constant;
};

struct BitDistanceKernels {
    std::size_t (*query_bytes)(std::size_t plane) noexcept;
    /// From a value an element, zeros up to 8 * plane, and room to read 16 more.
    void (*prepare)(const std::uint8_t* values, std::size_t plane, std::uint8_t* query) noexcept;
    void (*distances)(const BitQuery& query, const BitRows& rows, const std::uint32_t* ids, std::size_t n,
                      float* out) noexcept;
    /// Of rows in two parts: writes to `near` those of the n ids whose distance may be `most` or less; returns how
    /// many. Asks for the rest of their rows.
    std::size_t (*select_near)(const BitQuery& query, const BitRows& rows, const std::uint32_t* ids, std::size_t n,
                               float most, std::uint32_t* near) noexcept;
};

/// Query tokens are handed over in panels (pack): transposed, so that a register holds one element of many tokens.
/// Panels and maxima of n tokens need room for n rounded up to panel_width.
template <class T>
struct MaxsimKernel {
    std::size_t panel_width;
    void (*pack)(const T* tokens, std::size_t n, std::size_t d, T* panels) noexcept;
    /// best[i] = max over the rows of doc (rows, d) of <token i, row>, -inf without rows. `next` is the document after
    /// this one: its beginning is fetched meanwhile.
    void (*maxima)(const T* panels, std::size_t n, const T* doc, std::size_t rows, const T* next, std::size_t d,
                   T* best) noexcept;
    /// The maxima and the rows they are found in, the first of equals; -1 without rows.
    void (*align)(const T* panels, std::size_t n, const T* doc, std::size_t rows, std::size_t d, T* best,
                  std::int64_t* row) noexcept;
    /// out[k * stride + i] = <token i, row k of doc (rows, d)>, -inf where it is NaN.
    void (*products)(const T* panels, std::size_t n, const T* doc, std::size_t rows, std::size_t d, T* out,
                     std::size_t stride) noexcept;
};

/// Tokens of a document in fewer bits (kernels/tile_narrow.hpp), and where the document after it begins.
struct NarrowTokens {
    const unsigned char* first;
    std::size_t count;
    const unsigned char* next;
    const float* scales;            // int8, residual: one a token
    const std::int32_t* centroids;  // residual: one a token
    const float* centroid_scores;   // residual: [centroid][query of the panel], over the queries' scales
    const void* weights;            // residual: as pack_weights wrote them
};

/// MaxsimKernel of float queries and narrow tokens. A panel takes panel_words(d) words of 32 bits a query.
struct NarrowMaxsimKernel {
    std::size_t (*panel_words)(std::size_t d);
    void (*pack)(const float* tokens, std::size_t n, std::size_t d, float unit, std::uint32_t* panels) noexcept;
    /// `centroid_scores` of the document are those of the first panel, a panel's after another's.
    void (*maxima)(const std::uint32_t* panels, std::size_t n, const NarrowTokens& doc, std::size_t d,
                   std::size_t n_centroids, float* best) noexcept;
    void (*centroid_scores)(const float* panels, const std::uint32_t* narrow_panels, std::size_t n,
                            const float* centroids, std::size_t n_centroids, std::size_t d, float* scores) noexcept;
    std::size_t weights_bytes;
    void (*pack_weights)(const signed char* weights, unsigned char* table) noexcept;
};

/// What a panel of panel_width query tokens scores against centroids, in steps: the product of token i with centroid c
/// is least[i] + step[i] * byte of both, to half a step. The bytes of a centroid lie together, in an order of the
/// kernel's own.
struct CentroidPanel {
    std::uint8_t* bytes;
    float *least, *step;
};

/// A document of tokens of which only the centroids are kept: rows of the table, and row `start` of it.
struct CentroidDoc {
    const std::uint16_t* ids;
    std::size_t n;
    std::int64_t start;  // -1: none
};

/// Tokens [begin, end) of a panel, those of one query. To sums[i] is added weights[t - begin] times the greatest byte
/// of token t in document i.
struct CentroidQuery {
    std::size_t begin, end;
    const std::int16_t* weights;  // not negative
    std::int64_t* sums;
};

/// MaxsimKernel of tokens of which only the centroids are kept.
struct CentroidMaxsimKernel {
    std::size_t panel_width;
    /// products: (n_centroids, panel_width).
    void (*round)(const float* products, std::size_t n_centroids, const CentroidPanel& panel) noexcept;
    /// Queries share no token.
    void (*sums)(const std::uint8_t* bytes, const CentroidDoc* docs, std::size_t n_docs, const CentroidQuery* queries,
                 std::size_t n_queries) noexcept;
};

struct MaxsimKernels {
    MaxsimKernel<float> f32;
    MaxsimKernel<double> f64;
    NarrowMaxsimKernel bf16, f16, i8, residual4, residual2;
    CentroidMaxsimKernel centroid;
};

/// A panel of queries (ScanKernel::pack) and a block of consecutive rows of a table.
/// The value of a pair is product * scale[row] + offset[row].
struct ScanBlock {
    const void* panel;
    const void* rows;  // (n, d), each row followed by zeros to a multiple of ScanKernel::align elements
    std::size_t n, d;
    const float* scale = nullptr;   // (n,), null: 1; comes with an offset. Of int8 never null
    const float* offset = nullptr;  // (n,), null: 0
    std::uint64_t first_row = 0;    // the row of the table that rows starts with
    /// Pairs that do not take part: row of the table * panel_width + lane, ascending, from this block on.
    const std::uint64_t *excluded = nullptr, *excluded_end = nullptr;
};

/// A query that is zero but for some chunks of scan_chunk elements; the last chunk of a row may be shorter.
constexpr std::size_t scan_chunk = 16;

struct ScanChunks {
    const float* values;      // (n, scan_chunk), zeros behind the row's end
    const std::uint32_t* at;  // (n,) ascending: values[k] are the elements from at[k] * scan_chunk on
    std::size_t n;
};

struct ScanHit {
    float value;
    std::uint32_t at;  // row of the block * panel_width + lane
};

/// Float queries against rows of one dtype.
struct ScanKernel {
    std::size_t align;
    /// Words of 32 bits that a panel takes for each of its queries.
    std::size_t (*panel_words)(std::size_t d);
    /// Packs `count` rows, at most panel_width, `stride` elements apart, into a panel; lanes without a query hold
    /// zeros.
    void (*pack)(const float* rows, std::size_t count, std::size_t stride, std::size_t d, void* panel) noexcept;
    /// Replaces n rows of d by what a panel holds of them; null where that is the rows themselves.
    void (*round)(float* rows, std::size_t n, std::size_t d) noexcept;
    /// All values of the block: (n, panel_width).
    void (*values)(const ScanBlock&, float* out) noexcept;
    /// Writes the pairs whose value is above floor[lane] to `hits`, which has room for all, and returns their number.
    std::size_t (*select)(const ScanBlock&, const float* floor, ScanHit* hits) noexcept;
    /// Adds to each lane how many values are above and how many equal to its target.
    void (*count)(const ScanBlock&, const float* target, std::int32_t* greater, std::int32_t* equal) noexcept;
    /// Replaces best[lane] and id[lane] by the value and the row of the table that are above them; the first of equals.
    void (*nearest)(const ScanBlock&, float* best, std::int32_t* id) noexcept;
    /// out (count, n): products of a few queries (count, d) with the elements of the rows (n, d), which lie densely and
    /// are read once. For fewer queries than are worth a panel.
    void (*products)(const float* queries, std::size_t count, const void* rows, std::size_t n, std::size_t d,
                     float* out) noexcept;
    /// out (n,): products of a query with the rows ids[k] (null: k) of d elements, of which its chunks alone are read.
    void (*chunk_products)(const ScanChunks& query, const void* rows, const std::int64_t* ids, std::size_t n,
                           std::size_t d, float* out) noexcept;
    /// The sums of the squared elements of the rows (n, d).
    void (*squares)(const void* rows, std::size_t n, std::size_t d, float* out) noexcept;
};

constexpr std::size_t max_panel_width = 64;

struct ScanKernels {
    std::size_t panel_width;  // queries in a panel, at most max_panel_width
    std::size_t lanes;        // of a register: panel_width is a multiple
    /// Of values (n, panel_width), for each lane the largest and the sum of exp(scale * (value - largest)), for
    /// scale > 0; NaN values do not take part. A largest of +-inf comes with any sum.
    void (*exponentials)(const float* values, std::size_t n, float scale, float* largest, float* sum) noexcept;
    /// For each lane the sum of max(0, value - threshold[lane]); NaN values do not take part.
    void (*excesses)(const float* values, std::size_t n, const float* threshold, float* sum) noexcept;
    /// Replaces values (n, panel_width) by exp(scale * value - less[lane]), and writes these to rows `stride` apart,
    /// too; 0 for NaN.
    void (*probabilities)(float* values, std::size_t n, float scale, const float* less, float* rows,
                          std::size_t stride) noexcept;
    /// out (d, width): the transpose of `count` rows; width is a multiple of `lanes`, and columns beyond count are 0.
    void (*transpose)(const float* rows, std::size_t count, std::size_t stride, std::size_t d, std::size_t width,
                      float* out) noexcept;
    /// Adds the products of n rows of k elements with a panel (k, columns rounded up to a multiple of `lanes`), columns
    /// at most panel_width, to out: n rows, `out_stride` apart.
    void (*add_products)(const float* rows, std::size_t n, std::size_t stride, std::size_t k, const float* panel,
                         std::size_t columns, float* out, std::size_t out_stride) noexcept;
    ScanKernel f32, bf16, f16, i8;
};

constexpr std::uint32_t fde_end = ~std::uint32_t(0);  // ends a chain of tokens

/// Matrices (d, n) are packed for these alike at every level: n is rounded up to a multiple of 16, and the columns lie
/// in panels [d][32], the last one [d][16] where 16 are left; columns beyond n are zero.
struct FdeKernels {
    /// Bit c of row t of `signs` (n rows, `stride` bytes apart) is [<token t, plane c> > 0], as float64 decides it.
    /// slack[c] * max |x_i| bounds the rounding error of a float32 product with plane c.
    void (*signs)(const float* tokens, std::size_t n, std::size_t d, const float* planes, const float* slack,
                  std::size_t columns, std::uint8_t* signs, std::size_t stride) noexcept;
    /// out (d,) = the sum or the mean of the tokens first, next[first], ... up to fde_end.
    void (*reduce)(const float* tokens, std::size_t d, const std::uint32_t* next, std::uint32_t first, bool mean,
                   float* out) noexcept;
    /// out[blocks[k]] = rows[k] times the projection (d, width), for k < n; blocks are `width` long.
    void (*project)(const float* const* rows, const std::uint32_t* blocks, std::size_t n, std::size_t d,
                    const float* projection, std::size_t width, float* out) noexcept;
};

/// Queries and codebooks (m, ksub, dsub), ksub 16 or 256, to build tables from.
struct PqTables {
    const float* queries;  // (count, m * dsub)
    std::size_t count;
    const float* codebooks;
    std::size_t m, ksub, dsub;
    bool squared;                   // entries are -|q - c|^2; else <q, c>
    const std::int32_t* subspaces;  // those whose entries are wanted
    std::size_t n_subspaces;
    std::size_t stride;  // floats from one query's tables to the next's
};

/// What was lost: a score is offset + step * (the sum of bytes + up to `lost`). No sum is greater than `most`, and no
/// float32 sum of entries leaves +-size on its way.
struct PqRounding {
    double offset, step, size, lost;
    std::int32_t most;
};

/// Codes in blocks: byte j of code i is codes[i / B][j][i % B], B = 16 for 4-bit codes and 64 for 8-bit ones. A step is
/// what a scan takes at once: 4 bytes of 4-bit codes (their number is a multiple of 4 here), 1 byte of 8-bit ones.
struct PqScan {
    const std::uint8_t* codes;
    std::size_t blocks, columns;
    const std::uint8_t* const* tables;  // one a query, as round_down wrote it; zeros where it wrote none
    std::size_t queries;
    const std::int32_t* steps;
    std::size_t n_steps;
    const std::int32_t* floor;    // one a query
    const std::uint8_t* allowed;  // bits of the codes that take part, or null: all
};

struct PqHit {
    std::int32_t sum;
    std::uint32_t at;  // code * PqKernels::most_queries + query
};

/// One query's entries and the codes they score: byte j of code i is codes[i / block][j][i % block]; rows have block 1.
struct PqScores {
    const std::uint8_t* codes;
    std::size_t columns, block;
    const float* entries;  // (code_size, 2, 16) or (code_size, 256)
    const std::int32_t* steps;
    std::size_t n_steps;
};

struct PqKernels {
    std::size_t most_queries;  // of select_nibbles; it takes 1, 2, 4, ... of them
    /// out (count, stride): what each codeword adds to a score, (m, ksub) of them a query.
    void (*entries)(const PqTables&, float* out) noexcept;
    /// One query's entries in 8 bits: 128 bytes a step of 4-bit codes, 256 a step of 8-bit ones. Where `near`, the
    /// score of codes that are to be told apart, is finite, entries far below the best of their subspace may saturate,
    /// so that the others are rounded less: sums put such codes in order, and `rounding` bounds no score. -inf: none
    /// saturate.
    void (*round_down)(const PqTables&, const float* tables, double near, std::uint8_t* out,
                       PqRounding& rounding) noexcept;
    /// out[column][row] = in[row][column].
    void (*transpose_bytes)(const std::uint8_t* in, std::size_t rows, std::size_t columns, std::size_t in_stride,
                            std::uint8_t* out, std::size_t out_stride) noexcept;
    /// Write the codes and queries whose sum of bytes is at least the query's floor to `hits`, which has room for all,
    /// and return their number. select_bytes: one query; null where few_for_bytes is 0.
    std::size_t (*select_nibbles)(const PqScan&, PqHit* hits) noexcept;
    /// sums[query * stride + code]: what select_nibbles compares with the floors. Blocks lie `distance` blocks apart.
    void (*sums_of_nibbles)(const PqScan&, std::size_t distance, std::int32_t* sums, std::size_t stride) noexcept;
    /// The largest multiple of 2^zeros below 2^bits that at least `rank` of n sums reach.
    std::int32_t (*value_of_rank)(const std::int32_t* sums, std::size_t n, std::size_t rank, std::int32_t bits,
                                  std::int32_t zeros) noexcept;
    /// Writes the places of the `count` highest of n sums below 2^bits, of equal ones the first, in their order, and
    /// returns the lowest of them. So many are not negative.
    std::int32_t (*best_sums)(const std::int32_t* sums, std::size_t n, std::size_t count, std::int32_t bits,
                              std::int32_t* places) noexcept;
    std::size_t (*select_bytes)(const PqScan&, PqHit* hits) noexcept;
    /// out[i] = the score of code ids[i]: the float32 sum of its entries in the order of the subspaces.
    void (*score_nibbles)(const PqScores&, const std::int64_t* ids, std::size_t n, float* out) noexcept;
    void (*score_bytes)(const PqScores&, const std::int64_t* ids, std::size_t n, float* out) noexcept;

    // For more queries than these: scores of 8-bit codes (n, code_size) against one query, or against `width` at a time
    // by tables (code_size * 256, width). Hits are at least floor[lane]; ScanHit::at is code * width + lane.
    std::size_t few_for_bytes;  // as many queries, or fewer, are faster by select_bytes
    std::size_t width;
    void (*interleave)(const float* tables, std::size_t count, std::size_t n, float* out) noexcept;
    using FloatScan = std::size_t (*)(const float* tables, const std::uint8_t* codes, std::size_t n,
                                      std::size_t code_size, const float* floor, ScanHit* hits) noexcept;
    FloatScan scan_one, scan_many;
};

/// One vector and all codewords of its m subspaces, k of each. The loss of labels is the sum of their |u - c|^2, u the
/// pieces of the vector x, and `weight` times <x, x - decoded>^2.
struct PqLoss {
    const float* products;  // (m, k): <u, c>
    const float* squares;   // (m, k): |c|^2
    std::size_t m, k;
    float square, weight;  // |x|^2
};

struct PqLossKernels {
    /// Coordinate descent: replaces each label in turn by the one that is best beside the others, the first of equals,
    /// until none changes or a number of passes is over.
    void (*improve)(const PqLoss&, std::size_t most_passes, std::uint8_t* labels) noexcept;
};

/// One vector's beam of sums of codewords, at the level to be added: k codewords, 16 or 256.
struct RqBeam {
    /// <x, c> + offsets[c] for all codewords: pieces of `width` of them, `stride` floats from one to the next.
    const float* products;
    std::size_t width, stride;
    const float* offsets;
    std::size_t k;
    const float* scores;  // of the sums in the beam
    std::size_t sums;
    const float* const* crossings;  // (sums, levels): rows of k floats that a sum takes off the codewords' values
    std::size_t levels;
};

struct RqKernels {
    /// Writes the `wanted` best of all sums with all codewords, best first, of equals the first, and returns their
    /// number. ScanHit::at is sum * k + codeword.
    std::size_t (*extend)(const RqBeam&, std::size_t wanted, ScanHit* best) noexcept;
};

/// n rows of d elements, at most 16, `stride` elements apart, and k codewords (k, width): d rounded up to 4, 8 or 16,
/// with zeros behind the elements.
struct ShortRows {
    const float* first;
    std::size_t n, stride, d;
    const float *codewords, *offsets;
    std::size_t k, width;
};

/// A panel of rows (ScanKernel::pack) and `n` of the means (., d), by their ids; offsets are those of all means.
struct MeansBlock {
    const float *panel, *means, *offsets;
    const std::int32_t* ids;
    std::size_t n, d;
};

/// Rows are compared coarsely by sums of products of bytes in 16 bits: those of a row's elements 0, 1, 4, 5, ... and of
/// the others. A sum fits where the elements of either half, in steps, have norms of at most coarse_norm on both sides,
/// a product of two pairs where means are at most coarse_mean steps.
constexpr float coarse_norm = 181;
constexpr int coarse_mean = 63;

/// `n` means of d elements, less a center: bytes (n, d rounded up to a multiple of 4), each 64 + a number of steps, 64
/// behind the elements. |mean - scale * steps| is at most `error`, and |scale * steps| at most `size`; `rounding`
/// bounds what float32 loses in <row, mean> + offset beside that. Rows less the center are compared with them.
struct CoarseMeans {
    const std::uint8_t* bytes;
    const float *scale, *offset, *size, *error, *rounding;
    std::size_t n, d;
};

struct QuantizeKernels {
    /// The sum of n rows of x (., d), each times scale[row] unless scale is null, in this order and in float64.
    void (*sum_rows)(const float* x, const std::int64_t* rows, std::size_t n, std::size_t d, const float* scale,
                     double* sum) noexcept;
    /// ids[i] = the codeword c of greatest <row i, c> + offsets[c], the first of equals.
    void (*nearest_short)(const ShortRows&, std::int32_t* ids) noexcept;
    /// Updates, for each row of the panel, the best <row, mean> + offset and its id, and the second best. Of equals
    /// what was there before, then the first, is the best.
    void (*nearest_two)(const MeansBlock&, float* best, float* second, std::int32_t* id) noexcept;
    /// The sum of |row i - codeword ids[i]|^2, in float64.
    double (*loss_short)(const ShortRows&, const std::int32_t* ids) noexcept;
    /// Adds the rows with labels c in [first, last), in their order and in float64, to sums (last - first,
    /// short_sum(width)). Codewords play no part.
    void (*sum_short)(const ShortRows&, const std::int64_t* labels, std::int64_t first, std::int64_t last,
                      double* sums) noexcept;
    /// Words of 32 bits of a panel of coarse rows, for each row. Null, as the two after it, where the level has no such
    /// products, or none that are worth it.
    std::size_t (*coarse_words)(std::size_t d);
    /// Packs n rows (., d), at most panel_width, less the center.
    void (*pack_coarse)(const float* rows, const float* center, std::size_t n, std::size_t d, void* panel) noexcept;
    /// Writes the pairs whose <row, mean> + offset may be the greatest of the row, with an upper bound of it, in the
    /// order of the means, and returns their number. ScanHit::at is mean * panel_width + lane. floor[lane] rises to a
    /// lower bound of the greatest: pairs that were written before it rose and lie below are for the caller to leave.
    std::size_t (*candidates)(const CoarseMeans&, const void* panel, float* floor, ScanHit* hits) noexcept;
    /// out[c] = -|row c|^2 / 2 of rows of `width` elements, a multiple of 4: squares in float32, added in their order
    /// in float64, the same at every level.
    void (*half_squares)(const float* rows, std::size_t n, std::size_t width, float* out) noexcept;
};

/// Numbers that the sum of short rows takes: half a register of float32 is widened at a time.
constexpr std::size_t short_sum(std::size_t width) {
    return width < 8 ? 8 : width;
}

/// Rows of integer codes, `stride` bytes apart: d numbers below 2^bits, then the float32 factors that there are, in
/// this order. The numbers lie in planes, one a binary digit of `bits`, the highest first: 6 bits are 4 and then 2. A
/// plane of w bits a number lies in chunks of up to 64 bytes: in a chunk of b bytes, bits k w ... k w + w - 1 of byte t
/// belong to the chunk's number k b + t.
struct CodeRows {
    const std::uint8_t* first;
    std::size_t n, stride, d;
    int bits;
    bool has_scale, has_mean, has_offset;
};

/// What turns the integer dot products of queries with rows (the sum of query_i * (code_i - 2^(bits - 1))) into values:
/// (dot * scale + shift) * row scale + mean * row mean + row offset, each product and sum rounded by itself.
struct CodeQueries {
    const std::uint32_t* packed;
    const float *scale, *shift, *mean;
};

constexpr std::size_t code_margin = 64;

/// One query against codes. Rows: memory of panel_width of them and code_margin bytes behind the last must be readable.
/// Blocks, of which CodeRows tells n, `stride` bytes apart: a block holds 16 codes word by word, 4 bytes, and in a
/// column of 64 bytes the same word of all of them. The words are those of the planes, each padded, and then the
/// factors.
struct CodesOneKernels {
    std::size_t (*query_words)(std::size_t d, int bits);
    void (*pack)(const std::int8_t* query, std::size_t d, int bits, std::uint32_t* out) noexcept;
    /// Writes the codes whose value is at least `floor` to `hits`, which has room for all, and returns their number.
    /// `words` is scratch for one unpacked row.
    std::size_t (*select)(const CodeRows&, const CodeQueries& query, std::uint32_t* words, float floor,
                          ScanHit* hits) noexcept;
    /// All values; rows are a multiple of panel_width.
    void (*values)(const CodeRows&, const CodeQueries& query, std::uint32_t* words, float* out) noexcept;
};

struct CodesKernels {
    std::size_t panel_width;                            // queries in a panel
    std::size_t one_at_a_time;                          // as many queries, or fewer, are faster one by one
    std::size_t (*row_words)(std::size_t d, int bits);  // of an unpacked row
    std::size_t (*panel_words)(std::size_t d, int bits);
    /// Rows as `select` takes them.
    void (*unpack)(const CodeRows&, std::uint32_t* words) noexcept;
    void (*pack)(const std::int8_t* queries, std::size_t count, std::size_t d, int bits, std::uint32_t* panel) noexcept;
    /// Writes the pairs whose value is at least floor[lane] to `hits`, which has room for all, and returns their
    /// number. ScanHit::at is row * panel_width + lane.
    std::size_t (*select)(const CodeRows&, const std::uint32_t* words, const CodeQueries& panel, const float* floor,
                          ScanHit* hits) noexcept;
    /// The values of all pairs: out (n, panel_width).
    void (*values)(const CodeRows&, const std::uint32_t* words, const CodeQueries& panel, float* out) noexcept;
    /// out[lane] = what at least `rank` of the values (n, panel_width) of the lane reach, and few more; NaN if there
    /// are fewer. Overwrites them.
    void (*values_of_rank)(float* values, std::size_t n, std::size_t rank, float* out) noexcept;
    CodesOneKernels of_rows, of_blocks;
    void (*value_of_rank)(float* values, std::size_t n, std::size_t rank, float* out) noexcept;
    /// levels[i] = min(floor(t * magnitudes[i]), top), for the t that brings levels + 1/2 closest in angle to the
    /// magnitudes (each below 2^12). Integers only: the same at every level.
    void (*fit_levels)(const std::uint16_t* magnitudes, std::size_t d, std::uint32_t top,
                       std::uint8_t* levels) noexcept;
    /// n rows of d floats, in place: four times, multiply by a row of `signs` (4, d), then transform the first, or in
    /// turn the last, 2^floor(log2 d) elements by Hadamard's matrix. The inverse with `inverse`.
    void (*rotate)(float* rows, std::size_t n, std::size_t d, const float* signs, bool inverse) noexcept;
};

/// The codewords of one subspace, transposed. The logit of a codeword is scale * <u, c> + offset.
template <class T>
struct SoftCodebook {
    const T* panel;   // (dsub, width), zeros beyond the last codeword
    const T* offset;  // (width,): -|c|^2 / temperature, and -inf beyond the last codeword
    std::size_t width, dsub;
    T scale;  // 2 / temperature
    bool hard;
};

/// Rows are `stride` elements apart, in x and in what is written alike; `zeros` is a row of them.
template <class T>
struct SoftAssignKernel {
    std::size_t step;          // a codebook's width is a multiple of it
    std::size_t scratch_rows;  // scratch holds this many rows of its width
    void (*assign)(const SoftCodebook<T>&, const T* x, std::size_t n, std::size_t stride, T* out, std::int64_t* ids,
                   std::size_t ids_stride, T* scratch, const T* zeros) noexcept;
    /// Writes dx unless it is null. Adds to dpanel (dsub + 1, width) unless it is null: the gradient of a codeword is
    /// its column's first dsub numbers less the codeword times the last.
    void (*gradient)(const SoftCodebook<T>&, const T* x, const T* grad, std::size_t n, std::size_t stride, T* dx,
                     T* dpanel, T* scratch, const T* zeros) noexcept;
};

struct SoftAssignKernels {
    SoftAssignKernel<float> f32;
    SoftAssignKernel<double> f64;
};

struct Kernels {
    const char* isa;
    const HypercomplexKernels* hypercomplex;
    const DistanceKernels* distance;
    const IntegerDistanceKernels *int8_distance, *int4_distance;
    const BitDistanceKernels* bit_distance;
    const MaxsimKernels* maxsim;
    const ScanKernels* scan;
    const FdeKernels* fde;
    const QuantizeKernels* quantize;
    const CodesKernels* codes;
    const SoftAssignKernels* soft_assign;
    const PqKernels* pq;
    const PqLossKernels* pq_loss;
    const RqKernels* rq;
};

/// The table of the active level. Fetched once an op, not once an element.
const Kernels& kernels();

/// The float or the double half of an engine's table.
template <class T, class Engine>
const auto& typed(const Engine& engine) {
    if constexpr (sizeof(T) == sizeof(float)) {
        return engine.f32;
    } else {
        return engine.f64;
    }
}

}  // namespace polyvec
