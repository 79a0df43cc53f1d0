#include "hnsw_frozen.hpp"

#include <cstring>
#include <numeric>

#include "polyvec/parallel.hpp"

namespace polyvec {

using namespace hnsw;

namespace {

/// Of all vectors, and what `rotate` takes: random signs, and the factors that keep lengths.
void fill_frame(const Graph& graph, const Rows<float>& frame) {
    const std::int64_t d = graph.params.dim;
    std::vector<double> sum(d, 0.0);
    std::vector<float> scratch(d);
    for (std::int64_t slot = 0; slot < graph.n; ++slot) {
        const float* const vector = graph.vector(slot, scratch.data());
        for (std::int64_t i = 0; i < d; ++i) sum[i] += vector[i];
    }
    for (std::int64_t i = 0; i < d; ++i) frame[0][i] = static_cast<float>(sum[i] / std::max<std::int64_t>(graph.n, 1));

    const auto power = static_cast<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(d)));
    const auto size = static_cast<float>(1 / std::sqrt(static_cast<double>(power)));
    Random random(graph.params.seed, 1);
    for (int round = 0; round < 4; ++round) {
        for (std::int64_t i = 0; i < d; ++i) {
            const bool transformed = round % 2 == 0 ? i < power : i >= d - power;
            const float sign = random.next() >> 63 ? -1.0f : 1.0f;
            frame[1 + round][i] = transformed ? sign * size : sign;
        }
    }
}

double dot(const float* x, const float* y, std::int64_t d) {
    double sum = 0;
    for (std::int64_t i = 0; i < d; ++i) sum += static_cast<double>(x[i]) * y[i];
    return sum;
}

/// Fills in the code of a slot. Scratch: `residual` (dim,).
void encode(const Graph& graph, std::int64_t slot, float* residual) {
    constexpr double normal_steps[] = {0.9957, 0.5860, 0.3352};  // lose the least of normal elements of variance 1
    const std::int64_t d = graph.params.dim, plane = graph.params.bit_plane(), bits = graph.params.code_bits();
    const float *const centre = graph.frame[0], *const vector = graph.vector(slot, residual);
    for (std::int64_t i = 0; i < d; ++i) residual[i] = vector[i] - centre[i];
    const double square = dot(residual, residual, d), along = dot(residual, centre, d);
    kernels().codes->rotate(residual, 1, d, graph.frame[1], false);

    const bool split = graph.params.second_width() > 0;
    std::uint8_t *const first = graph.first_part(slot), *const second = graph.second_part(slot);
    std::memset(first, 0, graph.params.first_width());
    if (split) std::memset(second, 0, graph.params.second_width());
    const double step = normal_steps[bits - 2] * std::sqrt(square / static_cast<double>(d));
    const double up = step > 0 ? 1 / step : 0, half = static_cast<double>(1 << (bits - 1));
    double product = 0, rough_product = 0;
    for (std::int64_t i = 0; i < d; ++i) {
        const double above = std::max(1 - half, std::min(half, std::ceil(residual[i] * up)));  // NaN: half
        const auto level = static_cast<int>(above + half - 1);
        product += residual[i] * (2 * level + 1 - 2 * half);
        rough_product += std::abs(residual[i]);
        for (std::int64_t j = 0; j < bits; ++j) {  // from the highest bit
            std::uint8_t* const to = split && j == 1 ? second : first + j * plane;
            to[i % plane] |= static_cast<std::uint8_t>((level >> (bits - 1 - j) & 1) << i / plane);
        }
    }
    const auto over = [square](double product) { return product > 0 ? static_cast<float>(square / product) : 0.0f; };
    const float added = static_cast<float>(graph.params.metric == Metric::l2 ? square : along);
    const float factors[] = {over(rough_product), added, over(product)};
    std::memcpy(first + (split ? 1 : bits) * plane, factors, sizeof factors);
}

/// All slots, breadth first from the entry: near slots are often near. Those of the upper levels come before the
/// others, for what every walk reads first fits the second cache when it lies in one place.
std::vector<std::uint32_t> walking_order(const Graph& graph) {
    std::vector<std::uint32_t> reached;
    std::vector<bool> taken(graph.n, false);
    const auto take = [&](std::uint32_t slot) {
        if (!taken[slot]) reached.push_back(slot);
        taken[slot] = true;
    };
    reached.reserve(graph.n);
    if (graph.n > 0) take(graph.entry);
    std::uint32_t rest = 0;  // slots before it are taken
    for (std::size_t next = 0; next < static_cast<std::size_t>(graph.n); ++next) {
        for (; next == reached.size(); ++rest) take(rest);
        const std::uint32_t* const row = graph.links[reached[next]];
        for (std::int64_t i = 0; i < graph.links.width() && row[i] != no_link; ++i) take(row[i]);
    }
    std::stable_partition(reached.begin(), reached.end(), [&](std::uint32_t slot) { return graph.levels[slot] > 0; });
    return reached;
}

/// Puts the links of a slot at level 0 into order, the nearest first. `order`: what they were called in `from`.
void sort_links(const Graph& from, std::uint32_t slot, const std::uint32_t* order, std::uint32_t* row,
                std::int64_t width) {
    const auto& kernel = kernels().distance->u32;
    const bool l2 = from.params.metric == Metric::l2;
    const std::int64_t d = from.params.dim;
    std::vector<float> scratch(2 * d);
    const float* const vector = from.vector(slot, scratch.data());
    std::vector<std::pair<float, std::uint32_t>> links;
    for (std::int64_t i = 0; i < width && row[i] != no_link; ++i) {
        const std::uint32_t first = 0;
        float distance;
        (l2 ? kernel.l2 : kernel.dot)(vector, from.vector(order[row[i]], &scratch[d]), &first, 1, d, &distance);
        links.emplace_back(l2 ? distance : -distance, row[i]);
    }
    std::sort(links.begin(), links.end());
    std::transform(links.begin(), links.end(), row, [](const auto& link) { return link.second; });
}

}  // namespace

namespace hnsw {

namespace {

/// Bytes of the query's bytes for the kernel, up to a cache line.
std::int64_t prepared_bytes(const HnswParams& params) {
    const auto bytes = kernels().bit_distance->query_bytes(static_cast<std::size_t>(params.bit_plane()));
    return static_cast<std::int64_t>(bytes + 63) / 64 * 64;
}

}  // namespace

std::int64_t bit_query_bytes(const HnswParams& params) {
    return prepared_bytes(params) + 8 * params.bit_plane() + 16;
}

BitQuery bit_query(const Graph& graph, const float* query, float* rotated, std::uint8_t* bytes) {
    const HnswParams& p = graph.params;
    const bool l2 = p.metric == Metric::l2;
    const float* const centre = graph.frame[0];
    const auto product = [d = p.dim](const float* x, const float* y) {
        const std::uint32_t first = 0;
        float result;
        kernels().distance->u32.dot(x, y, &first, 1, d, &result);
        return result;
    };
    // <q, x> = <q - c m, x - m> + c <m, x - m> + <q, m> for any c: this one leaves the shortest rest to the codes.
    const float along = product(query, centre), square = product(centre, centre);
    const float share = l2 ? 1 : square > 0 ? along / square : 0;
    for (std::int64_t i = 0; i < p.dim; ++i) rotated[i] = query[i] - share * centre[i];
    const float rest = product(rotated, rotated);
    kernels().codes->rotate(rotated, 1, p.dim, graph.frame[1], false);

    std::uint8_t* const values = bytes + prepared_bytes(p);
    const auto encode = kernels().int8_distance->encode_query;
    const IntegerCode code = encode(rotated, p.dim, 8 * p.bit_plane(), most_bit_value, values);
    kernels().bit_distance->prepare(values, static_cast<std::size_t>(p.bit_plane()), bytes);
    // A sign and its scale are off by a vector of 0.603 sqrt(d) scales where elements are normal; its product with the
    // query is about normal, too, and this is its deviation.
    const float times = l2 ? 2 : 1, slack = 0.603f * times * std::sqrt(rest);
    if (l2) return {bytes, code.sum, -times * code.scale, slack, 1, rest};
    return {bytes, code.sum, -code.scale, slack, -share, -along};
}

}  // namespace hnsw

std::unique_ptr<HnswIndex> HnswIndex::freeze(Cpu cpu) const {
    const auto lock = reading();
    require(!params_.frozen, freeze_op, "index must not be frozen, got one that freeze returned");
    require(params_.dim <= HnswParams::most_coded, freeze_op, "dim must be at most ", HnswParams::most_coded, ", got ",
            params_.dim);
    const std::shared_ptr<const Graph> whole = graph_->live < graph_->n ? without_removed(cpu) : graph_;
    const Graph& from = *whole;
    HnswParams params = params_;
    params.frozen = true;
    auto index = std::make_unique<HnswIndex>(params);
    Graph& to = *index->graph_;
    to.n = to.capacity = to.live = from.n;
    to.largest_id = from.largest_id;
    to.vectors = Rows<std::uint8_t>(to.n, params.vector_bytes());
    to.factors = Rows<float>(to.n, params.factor_count());
    to.scales = Rows<float>(to.n, params.scale_count());
    to.codes = Rows<std::uint8_t>(to.n, params.code_width());
    to.frame = Rows<float>(frame_rows, params.dim);
    to.links = Rows<std::uint32_t>(to.n, from.links.width());
    fill_frame(from, to.frame);

    const std::vector<std::uint32_t> order = walking_order(from);
    std::vector<std::uint32_t> place(from.n);
    for (std::int64_t slot = 0; slot < to.n; ++slot) place[order[slot]] = static_cast<std::uint32_t>(slot);
    const auto copy_row = [&](std::int64_t slot, int level) {
        const std::uint32_t* const row = from.row(order[slot], level);
        std::transform(row, row + from.width(level), to.row(static_cast<std::uint32_t>(slot), level),
                       [&](std::uint32_t link) { return link == no_link ? no_link : place[link]; });
    };
    to.upper_links.resize(from.upper_links.size());
    to.removed.resize(to.n);
    for (std::int64_t slot = 0; slot < to.n; ++slot) {
        to.levels.push_back(from.levels[order[slot]]);
        to.first_upper.push_back(to.first_upper.back() + to.levels[slot]);
        to.ids.push_back(from.ids[order[slot]]);
        for (int level = 1; level <= to.levels[slot]; ++level) copy_row(slot, level);
    }
    if (to.n > 0) to.entry = place[from.entry];
    parallel_for(to.n, std::max<std::int64_t>(1, (1 << 16) / params.dim), cpu.num_threads,
                 [&](std::int64_t begin, std::int64_t end, int) {
                     std::vector<float> residual(params.dim);
                     for (std::int64_t slot = begin; slot < end; ++slot) {
                         std::copy_n(from.vectors[order[slot]], params.vector_bytes(), to.vectors[slot]);
                         std::copy_n(from.factors[order[slot]], params.factor_count(), to.factors[slot]);
                         std::copy_n(from.scales[order[slot]], params.scale_count(), to.scales[slot]);
                         encode(to, slot, residual.data());
                         copy_row(slot, 0);
                         sort_links(from, order[slot], order.data(), to.links[slot], to.links.width());
                     }
                 });
    to.build_table();
    return index;
}

}  // namespace polyvec
