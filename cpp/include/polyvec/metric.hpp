/// How two vectors are compared.
#pragma once

#include <cstdint>
#include <string>

#include "polyvec/error.hpp"

namespace polyvec {

enum class Metric : std::uint8_t {
    ip,      // inner product, higher is better
    l2,      // squared distance, lower is better
    cosine,  // inner product over both norms, 0 where a norm is 0; higher is better
};

inline Metric metric_from(const char* op, const std::string& name) {
    if (name == "ip") return Metric::ip;
    if (name == "l2") return Metric::l2;
    if (name == "cosine") return Metric::cosine;
    fail(op, "metric must be one of 'ip', 'l2', 'cosine', got '", name, "'");
}

}  // namespace polyvec
