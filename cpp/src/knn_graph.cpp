#include "polyvec/knn_graph.hpp"

#include <limits>
#include <tuple>
#include <vector>

#include "polyvec/aligned.hpp"
#include "polyvec/parallel.hpp"
#include "tables.hpp"

namespace polyvec {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

struct Neighbor {
    float distance;
    std::uint32_t id;  // with its bit

    bool operator<(const Neighbor& other) const {
        return distance != other.distance ? distance < other.distance : (id & no_neighbor) < (other.id & no_neighbor);
    }
};

/// Distances of one row after another from others.
class Comparison {
public:
    explicit Comparison(const KnnRows& rows)
        : rows_(rows),
          kernels_(*kernels().byte_distance),
          stride_(static_cast<std::size_t>(rows.codes.dim(1))),
          query_(aligned<std::uint8_t>(rows.codes.dim(1))) {}

    /// Asks for a row that will be compared.
    void fetch(std::uint32_t row) const {
        const auto* code = rows_.codes.as<const std::uint8_t>() + row * stride_;
        for (std::size_t line = 0; line < stride_; line += 64) prefetch(code + line);
    }

    void operator()(std::int64_t row, const std::vector<std::uint32_t>& ids, std::vector<float>& distances) {
        distances.resize(ids.size());
        const auto* codes = rows_.codes.as<const std::uint8_t>();
        const auto* factors = rows_.factors.as<const float>();
        const float *own = factors + 2 * row, factor = rows_.squared ? -2.0f : -1.0f;
        const std::int32_t sum =
            kernels_.query_of_row(codes + row * static_cast<std::int64_t>(stride_), stride_, query_.get());
        kernels_.distances({query_.get(), 128 * sum, factor * own[0], own[1]}, {codes, factors, stride_}, ids.data(),
                           ids.size(), distances.data());
    }

private:
    const KnnRows& rows_;
    const ByteDistanceKernels& kernels_;
    std::size_t stride_;
    Aligned<std::uint8_t> query_;
};

/// Writes the best of `found`, which it sorts, to row i.
void write(std::vector<Neighbor>& found, std::int64_t i, const Array& ids, const Array& distances) {
    const std::size_t kept = ids.dim(1), n = std::min(found.size(), kept);
    std::partial_sort(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(n), found.end());
    auto* id = ids.as<std::uint32_t>() + i * ids.dim(1);
    float* distance = distances.as<float>() + i * ids.dim(1);
    for (std::size_t k = 0; k < kept; ++k) {
        id[k] = k < n ? found[k].id : no_neighbor;
        distance[k] = k < n ? found[k].distance : infinity;
    }
}

/// The nearest so far of each row of a group: pools of twice as many as are kept, cut back when they are full.
class Pools {
public:
    Pools(std::int64_t rows, std::int64_t kept)
        : kept_(static_cast<std::size_t>(kept)),
          room_(2 * kept_ + 32),
          pools_(rows * room_),
          sizes_(rows),
          floors_(rows, -infinity) {}

    float floor(std::int64_t row) const { return floors_[row]; }
    void push(std::int64_t row, float value, std::int64_t id) {
        if (!(value >= floors_[row])) return;
        Neighbor* pool = pools_.data() + row * room_;
        pool[sizes_[row]++] = {-value, static_cast<std::uint32_t>(id)};
        if (sizes_[row] < room_) return;
        std::nth_element(pool, pool + kept_ - 1, pool + room_);
        sizes_[row] = kept_;
        floors_[row] = -pool[kept_ - 1].distance;
    }
    /// The best of a row, at most as many as are kept, in any order.
    void take(std::int64_t row, std::vector<std::uint32_t>& ids) {
        Neighbor* pool = pools_.data() + row * room_;
        const std::size_t n = std::min(sizes_[row], kept_);
        if (n < sizes_[row]) std::nth_element(pool, pool + n - 1, pool + sizes_[row]);
        ids.resize(n);
        std::transform(pool, pool + n, ids.begin(), [](const Neighbor& neighbor) { return neighbor.id; });
    }

private:
    std::size_t kept_, room_;
    std::vector<Neighbor> pools_;
    std::vector<std::size_t> sizes_;
    std::vector<float> floors_;
};

/// A row of a group, and a cluster that it probes; own clusters come first, so that floors are soon high.
struct Probe {
    bool other;
    std::int64_t cluster, row;

    bool operator<(const Probe& b) const { return std::tie(other, cluster, row) < std::tie(b.other, b.cluster, b.row); }
    bool meets_what(const Probe& b) const { return other == b.other && cluster == b.cluster; }
};

/// One thread's panel of rows, and blocks of others as kernels take them.
class Panel {
public:
    explicit Panel(const KnnJoin& op)
        : op_(op),
          kernel_(kernels().scan->i8),
          bytes_(*kernels().byte_distance),
          width_(static_cast<std::int64_t>(kernels().scan->panel_width)),
          d_(op.rows.codes.dim(1)),
          values_(aligned<float>(width_ * d_)),
          packed_(aligned<std::uint32_t>(width_ * static_cast<std::int64_t>(kernel_.panel_words(d_)))),
          block_(aligned<std::int8_t>(most_rows * d_)),
          scale_(most_rows),
          offset_(most_rows),
          hits_(width_ * most_rows),
          floor_(width_) {}

    std::int64_t width() const { return width_; }

    /// Compares the rows of some probes of one cluster with those of the cluster.
    void meet(const std::vector<Probe>& probes, std::int64_t begin, Pools& best) {
        const std::int64_t* rows = op_.begins.as<const std::int64_t>() + probes.front().cluster;
        for (std::int64_t row = rows[0]; row < rows[1]; row += most_rows) {
            ScanBlock block;
            block.panel = packed_.get();
            block.rows = block_.get();
            block.n = std::min(rows[1] - row, most_rows);
            block.d = d_;
            block.scale = scale_.data();
            block.offset = op_.rows.squared ? offset_.data() : nullptr;
            unpack(row, static_cast<std::int64_t>(block.n));
            for (std::size_t p = 0; p < probes.size(); p += width_) {
                const auto count = std::min<std::int64_t>(width_, probes.size() - p);
                pack(probes.data() + p, count);
                for (std::int64_t j = 0; j < width_; ++j)
                    floor_[j] = j < count ? best.floor(probes[p + j].row - begin) : infinity;
                const std::size_t found = kernel_.select(block, floor_.data(), hits_.data());
                for (std::size_t h = 0; h < found; ++h) {
                    const auto lanes = static_cast<std::uint32_t>(width_);
                    const std::int64_t own = probes[p + hits_[h].at % lanes].row, other = row + hits_[h].at / lanes;
                    if (own != other) best.push(own - begin, hits_[h].value, other);
                }
            }
        }
    }

private:
    static constexpr std::int64_t most_rows = 512;

    const std::uint8_t* code(std::int64_t row) const { return op_.rows.codes.as<const std::uint8_t>() + row * d_; }
    const float* factors(std::int64_t row) const { return op_.rows.factors.as<const float>() + 2 * row; }

    void unpack(std::int64_t first, std::int64_t n) {
        bytes_.to_signed(code(first), n * d_, block_.get());
        for (std::int64_t i = 0; i < n; ++i) {
            scale_[i] = factors(first + i)[0];
            offset_[i] = -factors(first + i)[1] / 2;
        }
    }

    void pack(const Probe* probes, std::int64_t count) {
        for (std::int64_t j = 0; j < count; ++j)
            bytes_.decode(code(probes[j].row), d_, factors(probes[j].row)[0], values_.get() + j * d_);
        kernel_.pack(values_.get(), count, d_, d_, packed_.get());
    }

    const KnnJoin& op_;
    const ScanKernel& kernel_;
    const ByteDistanceKernels& bytes_;
    std::int64_t width_, d_;
    Aligned<float> values_;
    Aligned<std::uint32_t> packed_;
    Aligned<std::int8_t> block_;
    std::vector<float> scale_, offset_;
    std::vector<ScanHit> hits_;
    std::vector<float> floor_;
};

}  // namespace

void run(const KnnEncode& op, Cpu cpu) {
    const auto encode = kernels().byte_distance->encode;
    const std::int64_t d = op.x.dim(1), stride = op.rows.codes.dim(1);
    parallel_for(op.x.dim(0), 256, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t i = begin; i < end; ++i) {
            const std::int64_t row = op.first + i;
            const ByteCode code =
                encode(op.x.as<const float>() + i * d, d, stride, 128, op.rows.codes.as<std::uint8_t>() + row * stride);
            op.rows.factors.as<float>()[2 * row] = code.scale;
            op.rows.factors.as<float>()[2 * row + 1] = op.rows.squared ? code.squares : 0;
        }
    });
}

void run(const KnnJoin& op, Cpu cpu) {
    constexpr std::int64_t group = 2048;  // rows whose panels are full: those of a cluster probe much the same others
    const std::int64_t p = op.probes.dim(1);
    parallel_for(op.last - op.first, group, cpu.num_threads, [&](std::int64_t from, std::int64_t to, int) {
        const std::int64_t begin = op.first + from, end = op.first + to;
        std::vector<Probe> probes;
        for (std::int64_t i = begin; i < end; ++i)
            for (std::int64_t k = 0; k < p; ++k)
                probes.push_back({k > 0, op.probes.as<const std::int64_t>()[i * p + k], i});
        std::sort(probes.begin(), probes.end());
        Pools best(end - begin, op.ids.dim(1));
        Panel panel(op);
        std::vector<Probe> some;
        for (std::size_t at = 0; at < probes.size();) {
            some.clear();
            const Probe first = probes[at];
            while (at < probes.size() && first.meets_what(probes[at])) some.push_back(probes[at++]);
            panel.meet(some, begin, best);
        }
        Comparison compare(op.rows);
        std::vector<std::uint32_t> ids;
        std::vector<float> distances;
        std::vector<Neighbor> found;
        for (std::int64_t i = begin; i < end; ++i) {
            best.take(i - begin, ids);
            compare(i, ids, distances);
            found.clear();
            for (std::size_t k = 0; k < ids.size(); ++k) found.push_back({distances[k], ids[k] | new_neighbor});
            write(found, i, op.ids, op.distances);
        }
    });
}

void run(const KnnReverse& op, Cpu) {
    const std::int64_t n = op.ids.dim(0), kept = op.ids.dim(1), room = op.reverse.dim(1);
    auto* reverse = op.reverse.as<std::uint32_t>();
    std::fill_n(reverse, n * room, no_neighbor);
    std::vector<std::int32_t> count(n);
    for (std::int64_t i = 0; i < n; ++i) {
        const auto* ids = op.ids.as<const std::uint32_t>() + i * kept;
        for (std::int64_t k = 0; k < op.degree && ids[k] != no_neighbor; ++k) {
            const std::uint32_t other = ids[k] & no_neighbor;
            if (count[other] < room)
                reverse[other * room + count[other]++] = static_cast<std::uint32_t>(i) | (ids[k] & new_neighbor);
        }
    }
}

void run(const KnnRefine& op, Cpu cpu) {
    const std::int64_t n = op.rows.codes.dim(0), kept = op.ids.dim(1), room = op.reverse.dim(1);
    const auto* ids = op.ids.as<const std::uint32_t>();
    const auto* reverse = op.reverse.as<const std::uint32_t>();
    /// Calls visit(entry) for the first of a row's list, and for its reverse.
    const auto for_each_of = [&](std::int64_t row, auto visit) {
        for (std::int64_t k = 0; k < op.degree && ids[row * kept + k] != no_neighbor; ++k) visit(ids[row * kept + k]);
        for (std::int64_t k = 0; k < room && reverse[row * room + k] != no_neighbor; ++k)
            visit(reverse[row * room + k]);
    };
    constexpr std::int64_t grain = 1024;
    const std::int64_t rows = op.last - op.first;
    std::vector<std::vector<std::uint32_t>> seen(workers_for(rows, grain, cpu.num_threads));
    parallel_for(rows, grain, cpu.num_threads, [&](std::int64_t from, std::int64_t to, int worker) {
        auto& mark = seen[worker];  // the last row, counted from 1, that met each
        mark.resize(n);
        Comparison compare(op.rows);
        std::vector<std::uint32_t> others;
        std::vector<float> distances;
        std::vector<Neighbor> found;
        for (std::int64_t i = op.first + from; i < op.first + to; ++i) {
            const auto stamp = static_cast<std::uint32_t>(i + 1);
            others.clear();
            found.clear();
            mark[i] = stamp;
            for (std::int64_t k = 0; k < kept && ids[i * kept + k] != no_neighbor; ++k) {
                const std::uint32_t id = ids[i * kept + k] & no_neighbor;
                mark[id] = stamp;
                found.push_back({op.distances.as<const float>()[i * kept + k], id});
            }
            const auto meet = [&](std::uint32_t row) {
                if (mark[row] == stamp) return;
                mark[row] = stamp;
                others.push_back(row);
                compare.fetch(row);
            };
            for_each_of(i, [&](std::uint32_t between) {
                if (between & new_neighbor) meet(between & no_neighbor);
                for_each_of(between & no_neighbor, [&](std::uint32_t entry) {
                    if ((between | entry) & new_neighbor) meet(entry & no_neighbor);
                });
            });
            compare(i, others, distances);
            const float worst = static_cast<std::int64_t>(found.size()) < kept ? infinity : found.back().distance;
            for (std::size_t k = 0; k < others.size(); ++k)
                if (distances[k] <= worst) found.push_back({distances[k], others[k] | new_neighbor});
            write(found, i, op.better_ids, op.better_distances);
        }
    });
}

void run(const KnnSort& op, Cpu cpu) {
    const std::int64_t kept = op.ids.dim(1);
    parallel_for(op.ids.dim(0), 4096, cpu.num_threads, [&](std::int64_t begin, std::int64_t end, int) {
        std::vector<std::pair<float, std::int64_t>> list(kept);
        for (std::int64_t i = begin; i < end; ++i) {
            auto* ids = op.ids.as<std::int64_t>() + i * kept;
            auto* distances = op.distances.as<float>() + i * kept;
            for (std::int64_t k = 0; k < kept; ++k) list[k] = {distances[k], ids[k]};
            std::sort(list.begin(), list.end());
            for (std::int64_t k = 0; k < kept; ++k) std::tie(distances[k], ids[k]) = list[k];
        }
    });
}

}  // namespace polyvec
