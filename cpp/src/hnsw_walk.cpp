#include "hnsw_walk.hpp"

#include <cmath>

#include "hnsw_frozen.hpp"

namespace polyvec::hnsw {

void unit_vector(float* x, std::int64_t d) {
    double square = 0;
    for (std::int64_t i = 0; i < d; ++i) square += static_cast<double>(x[i]) * x[i];
    const double scale = square > 0 ? 1 / std::sqrt(square) : 0;
    for (std::int64_t i = 0; i < d; ++i) x[i] = static_cast<float>(x[i] * scale);
}

void Target::prepare(const Graph& graph) {
    graph_ = &graph;
    const auto& kernel = kernels().distance->u32;
    const bool l2 = graph.params.metric == Metric::l2;
    floats_ = l2 ? kernel.l2 : kernel.dot;
    const HalfKernels* const half = half_kernels(graph.params.kept);
    halves_ = !half ? nullptr : l2 ? half->u32.l2 : half->u32.dot;
    own_.resize(graph.params.dim);
    if (graph.params.kept == DType::i8) decoded_.resize(graph.params.dim);
    const bool frozen = graph.params.frozen;
    integers_ = integer_kernels(graph.params);
    bits_ = frozen ? kernels().bit_distance : nullptr;
    if (frozen) rotated_.resize(graph.params.dim);
    const std::int64_t bytes = frozen ? bit_query_bytes(graph.params) : integers_ ? query_bytes() : 0;
    if (room_ < bytes) values_ = aligned<std::uint8_t>(room_ = bytes);
}

void Target::set(const void* query, DType dtype) {
    const HnswParams& p = graph_->params;
    query_ = as_floats(query, half_kernels(dtype), p.dim, own_.data());
    if (p.metric == Metric::cosine) {
        if (query_ != own_.data()) std::copy_n(query_, p.dim, own_.data());
        unit_vector(own_.data(), p.dim);
        query_ = own_.data();
    }
    set_code();
}

/// Of integers: a byte an element of a row.
std::int64_t Target::query_bytes() const {
    return static_cast<std::int64_t>(graph_->integer_rows().stride) * 8 / integers_->bits;
}

void Target::set_code() {
    const HnswParams& p = graph_->params;
    stored_ = false;
    if (bits_) bit_code_ = bit_query(*graph_, query_, rotated_.data(), values_.get());
    if (!integers_) return;
    const IntegerCode code = integers_->encode_query(query_, p.dim, query_bytes(), most_query_value, values_.get());
    const bool l2 = p.metric == Metric::l2;
    code_ = {values_.get(), integers_->bias * code.sum, (l2 ? -2 : -1) * code.scale, l2 ? code.squares : 0};
}

void Target::set(std::uint32_t slot) {
    if (!integers_) {
        query_ = graph_->vector(slot, own_.data());
        return set_code();
    }
    const IntegerRows rows = graph_->integer_rows();
    const std::int32_t sum = integers_->query_of_row(rows.codes + slot * rows.stride, rows.stride, values_.get());
    const float* factors = graph_->factors[slot];
    const bool l2 = graph_->params.metric == Metric::l2;
    code_ = {values_.get(), integers_->bias * sum, (l2 ? -2 : -1) * factors[0], factors[1]};
    stored_ = true;
}

BitRows Target::bit_rows() const {
    const HnswParams& p = graph_->params;
    const auto first = static_cast<std::size_t>(p.first_width()), second = static_cast<std::size_t>(p.second_width());
    return {graph_->first_part(0),
            second > 0 ? graph_->second_part(0) : nullptr,
            first,
            second,
            static_cast<std::size_t>(p.bit_plane()),
            static_cast<std::size_t>(p.code_bits())};
}

std::size_t Target::select_near(const std::uint32_t* slots, std::size_t count, float most, std::uint32_t* near) const {
    return bits_->select_near(bit_code_, bit_rows(), slots, count, most, near);
}

void Target::measure(const std::uint32_t* slots, std::size_t count, float* distances) const {
    if (bits_) return bits_->distances(bit_code_, bit_rows(), slots, count, distances);
    if (!integers_) return measure_exactly(slots, count, distances);
    integers_->distances(code_, graph_->integer_rows(), slots, count, distances);
    // Codes alike err alike, for which two scales make up too much: a copy would be farther than what is a little
    // longer.
    if (stored_ && graph_->params.metric == Metric::l2)
        for (std::size_t i = 0; i < count; ++i) distances[i] = std::max(distances[i], 0.0f);
}

namespace {

constexpr std::int64_t line = 64, most_fetched = 32 * line;

void fetch_rows(const void* data, std::int64_t stride, std::int64_t bytes, const std::uint32_t* slots,
                std::size_t count) {
    for (std::size_t k = 0; k < count; ++k) {
        const char* const row = static_cast<const char*>(data) + slots[k] * stride;
        prefetch(row);
        for (std::int64_t i = line; i < std::min(most_fetched, bytes); i += line) prefetch(row + i);
    }
}

}  // namespace

void Target::measure_exactly(const std::uint32_t* slots, std::size_t count, float* distances) const {
    const void* const rows = graph_->vectors.data();
    if (!decoded_.empty()) {  // kept in int8
        constexpr std::uint32_t first = 0;
        constexpr std::size_t ahead = 4;
        const std::int64_t bytes = graph_->params.vector_bytes();
        for (std::size_t i = 0; i < count; ++i) {
            if (i % ahead == 0) fetch_rows(rows, bytes, bytes, slots + i, std::min(2 * ahead, count - i));
            floats_(query_, graph_->vector(slots[i], decoded_.data()), &first, 1, graph_->params.dim, distances + i);
        }
    } else if (halves_) {
        halves_(query_, rows, nullptr, slots, count, graph_->params.dim, distances);
    } else {
        floats_(query_, static_cast<const float*>(rows), slots, count, graph_->params.dim, distances);
    }
    if (graph_->params.metric == Metric::l2) return;
    for (std::size_t i = 0; i < count; ++i) distances[i] = 0.0f - distances[i];  // never -0
}

void Target::fetch(const std::uint32_t* slots, std::size_t count) const {
    const HnswParams& p = graph_->params;
    if (bits_) return fetch_rows(graph_->first_part(0), p.first_width(), p.first_width(), slots, count);
    if (integers_) {
        const IntegerRows rows = graph_->integer_rows();
        const auto stride = static_cast<std::int64_t>(rows.stride);
        fetch_rows(rows.factors, p.factor_count() * sizeof(float), line, slots, count);
        return fetch_rows(rows.codes, stride, stride, slots, count);
    }
    constexpr std::int64_t first = 4 * line;  // the kernel asks for more; 1 to 12 here are as fast: nothing to tune
    fetch_rows(graph_->vectors.data(), p.vector_bytes(), std::min(first, p.vector_bytes()), slots, count);
}

void Walk::prepare(const Graph& graph, std::size_t ef) {
    graph_ = &graph;
    target.prepare(graph);
    pool.reserve(ef);
    forget();  // of a walk that an exception ended
    seen_.resize((graph.capacity + 63) / 64, 0);
    at_a_time_ = graph.params.frozen ? 4 : 1;
    const std::size_t most_fresh = static_cast<std::size_t>(at_a_time_) * graph.links.width();
    if (target.selects()) near_.resize(most_fresh);
    distances_.resize(std::max(ef, most_fresh));
    upper_found_.resize(max_level + 1);
}

void Walk::start(std::size_t ef, int wide, const std::uint8_t* hidden, std::size_t most, Reach reach) {
    ef_ = ef;
    reach_ = reach;
    wide_ = wide;
    hidden_ = hidden;
    most_ = most;
    gave_up_ = false;
    level_ = graph_->levels[graph_->entry];
    float distance;
    target.measure(&graph_->entry, 1, &distance);
    begin_level(entry_of(distance, graph_->entry));
}

void Walk::begin_level(Entry start) {
    pool.reset(level_ > wide_ ? 1 : ef_);
    detours_.clear();
    const std::uint32_t slot = slot_of(start);
    slots_.assign(1, slot);
    known_ = 1;
    seen_[slot / 64] |= std::uint64_t(1) << slot % 64;
    hidden_&& level_ <= wide_ ? take(start) : pool.insert(start);
    fetch_links();
    measuring_ = false;
}

void Walk::forget() {
    for (std::size_t i = 0; i < known_ + fresh_; ++i) seen_[slots_[i] / 64] = 0;
    known_ = fresh_ = 0;
}

bool Walk::step() {
    if (measuring_) {
        measure();
        measuring_ = false;
        return true;
    }
    gave_up_ = level_ == 0 && known_ > most_;
    measuring_ = !gave_up_ && look();
    if (measuring_) return true;
    forget();
    if (level_ == 0) return false;
    if (level_ <= wide_) upper_found_[level_].assign(pool.begin(), pool.begin() + pool.size());
    --level_;
    begin_level(*pool.begin() & ~followed);
    return true;
}

bool Walk::look() {
    const std::int64_t width = graph_->width(level_);
    if (slots_.size() < known_ + at_a_time_ * width + 1) slots_.resize(2 * (known_ + at_a_time_ * width + 1));
    std::uint32_t* const fresh = slots_.data() + known_;
    std::size_t count = 0;
    bool found = false;
    const float most = limit();
    for (int i = 0; i < at_a_time_; ++i) {
        const std::uint32_t slot = next(most);
        if (slot == no_link) break;
        found = true;
        const std::uint32_t* const row = graph_->row(slot, level_);
        for (std::int64_t j = 0; j < width && row[j] != no_link; ++j) {
            std::uint64_t& word = seen_[row[j] / 64];
            const std::uint64_t bit = std::uint64_t(1) << row[j] % 64;
            fresh[count] = row[j];
            count += (word & bit) == 0;
            word |= bit;
        }
    }
    if (!found) return false;
    target.fetch(fresh, count);
    fetch_links();
    fresh_ = count;
    return true;
}

void Walk::measure() {
    const std::uint32_t* slots = slots_.data() + known_;
    std::size_t count = fresh_;
    const float most = limit();
    if (target.selects()) {
        count = target.select_near(slots, count, most, near_.data());
        slots = near_.data();
    }
    target.measure(slots, count, distances_.data());
    const bool some_hidden = hidden_ && level_ <= wide_;
    for (std::size_t i = 0; i < count; ++i) {
        if (distances_[i] > most) continue;
        const Entry entry = entry_of(distances_[i], slots[i]);
        some_hidden ? take(entry) : pool.insert(entry);
    }
    known_ += fresh_;
    fresh_ = 0;
    fetch_links();
}

/// Of the slots that will be followed next, as far as is known.
void Walk::fetch_links() const {
    constexpr std::int64_t line = 64 / sizeof(std::uint32_t), most = 4 * line;
    pool.each_open(at_a_time_, [&](Entry open) {
        const std::uint32_t* const row = graph_->row(slot_of(open), level_);
        for (std::int64_t i = 0; i < graph_->width(level_) && i < most; i += line) prefetch(row + i);
    });
}

void Walk::take(Entry entry) {
    if (!hidden_[slot_of(entry)]) return pool.insert(entry);
    if (!pool.accepts(entry)) return;
    detours_.push_back(entry);
    std::push_heap(detours_.begin(), detours_.end(), std::greater<>());
}

/// Beyond which distance a slot can be left alone.
float Walk::limit() const {
    if (reach_.factor == 0 || level_ > 0 || pool.size() < reach_.k) return pool.limit();
    const HnswParams& p = graph_->params;
    const float kth = distance_of(pool.begin()[reach_.k - 1]);
    // Of unit vectors the squared distance is 2 - 2 cosines, and -cosine what walks compare.
    const float base = p.metric == Metric::l2 ? 0.0f : 1.0f, square = kth + base;
    if (square <= 0 && (p.frozen || p.integers())) return pool.limit();  // codes do not tell how near
    return std::min(pool.limit(), std::max(reach_.factor * std::max(square, 0.0f) - base, kth));
}

/// The nearest slot that is yet to be followed, or no_link.
std::uint32_t Walk::next(float most) {
    Entry* open = pool.nearest_open();
    if (open && distance_of(*open) > most) open = nullptr;
    const bool on_detour = !detours_.empty() && !(distance_of(detours_.front()) > most);
    if (on_detour && pool.accepts(detours_.front()) && (!open || detours_.front() < *open)) {
        std::pop_heap(detours_.begin(), detours_.end(), std::greater<>());
        const Entry detour = detours_.back();
        detours_.pop_back();
        return slot_of(detour);
    }
    if (!open) return no_link;
    *open |= followed;
    return slot_of(*open);
}

void Walk::scan(std::size_t ef, std::span<const std::uint32_t> slots) {
    pool.reset(ef);
    scan_more(slots);
    pool.sort();
}

void Walk::scan_more(std::span<const std::uint32_t> slots) {
    constexpr std::size_t batch = 256;
    float distances[batch];
    for (std::size_t first = 0; first < slots.size(); first += batch) {
        const std::size_t count = std::min(batch, slots.size() - first);
        target.measure_exactly(slots.data() + first, count, distances);
        for (std::size_t i = 0; i < count; ++i) pool.gather(entry_of(distances[i], slots[first + i]));
    }
}

/// Returns the sum of the squares of the differences.
double Walk::measure_exactly(std::size_t begin, std::size_t end) {
    if (slots_.size() < end) slots_.resize(end);
    std::transform(pool.begin() + begin, pool.begin() + end, slots_.begin(), slot_of);
    target.measure_exactly(slots_.data(), end - begin, distances_.data());
    double squares = 0;
    for (std::size_t i = begin; i < end; ++i) {
        Entry& entry = pool.begin()[i];
        const double difference = distances_[i - begin] - distance_of(entry);
        squares += difference * difference;
        entry = entry_of(distances_[i - begin], slots_[i - begin]);
    }
    return squares;
}

void Walk::measure_nearest(std::size_t k, double deviations) {
    std::size_t done = std::min(k + k / 4 + 3, pool.size());
    const double deviation = std::sqrt(measure_exactly(0, done) / static_cast<double>(std::max<std::size_t>(done, 1)));
    const auto sort_from = [&](std::size_t begin) {
        std::sort(pool.begin() + begin, pool.begin() + done);
        std::inplace_merge(pool.begin(), pool.begin() + begin, pool.begin() + done);
    };
    sort_from(0);
    const std::size_t more = 4 + k / 8;
    while (done < pool.size()) {
        const double most = distance_of(pool.begin()[k - 1]) + deviations * deviation;
        if (!(distance_of(pool.begin()[done]) <= most)) break;
        const std::size_t begin = done;
        done = std::min(done + more, pool.size());
        measure_exactly(begin, done);
        sort_from(begin);
    }
}

Walks::Walks(const Graph& graph, IdleWalks& idle, std::size_t ef, int workers, int each) : idle_(idle), each_(each) {
    const std::size_t needed = static_cast<std::size_t>(workers) * each;
    {
        const std::lock_guard lock(idle.mutex);
        while (!idle.walks.empty() && walks_.size() < needed) {
            walks_.push_back(std::move(idle.walks.back()));
            idle.walks.pop_back();
        }
    }
    while (walks_.size() < needed) walks_.push_back(std::make_unique<Walk>());
    for (auto& walk : walks_) walk->prepare(graph, ef);
}

Walks::~Walks() {
    const std::lock_guard lock(idle_.mutex);
    for (auto& walk : walks_) idle_.walks.push_back(std::move(walk));
}

}  // namespace polyvec::hnsw
