/// Links new slots of a graph.
#pragma once

#include "hnsw_walk.hpp"

namespace polyvec::hnsw {

/// Links slots in batches: each slot of a batch searches the graph as it was before the batch, and is compared with
/// those before it in the batch; then every slot that was chosen takes back the links to it, in the order of the slots.
/// So the graph depends on the slots and on how they are split over calls, never on the number of threads, and nothing
/// needs a lock. As in ParlayANN (Manohar et al. 2024), section 3.
class Builder {
public:
    Builder(Graph& graph, IdleWalks& idle, int num_threads);
    ~Builder();

    /// Links the appended slots; those that are linked when an exception ends the work belong to the graph.
    void link(std::int64_t count);

private:
    struct Link {
        std::uint32_t from, to;
        int level;
    };
    class Chooser;

    void link_batch(std::int64_t end);
    void link_back(std::int64_t i, Chooser& chooser);

    Graph& graph_;
    const std::size_t ef_;
    const int num_threads_;
    Walks walks_;
    std::vector<std::unique_ptr<Chooser>> choosers_;
    std::vector<Link> links_;        // of a batch, those to one row together
    std::vector<std::size_t> rows_;  // where each row's links begin
};

}  // namespace polyvec::hnsw
