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

    /// Gives the appended slots the links that `slots` of `from` have, all that are not removed there, in this order.
    /// Where these lead to removed slots the links are chosen anew, among those that removed slots lead to as well.
    /// As in FreshDiskANN (Singh et al. 2021), section 4.2. After an exception the graph is of no use.
    void copy_links(const Graph& from, std::span<const std::uint32_t> slots);

private:
    struct Link {
        std::uint32_t from, to;
        int level;
    };
    class Chooser;

    void link_batch(std::int64_t end);
    std::int64_t sort_links();
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
