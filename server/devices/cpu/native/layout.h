// Where the fields of a struct lie, for the Python side to compare with its mirror of the struct.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace chorus {

// The struct's size, then the offset of each field: all of them, in order.
template <typename S, typename... Fields>
std::vector<int64_t> layout(Fields S::*... fields) {
    static const S s{};
    const auto offset = [](const auto& field) {
        return int64_t(reinterpret_cast<const char*>(&field) - reinterpret_cast<const char*>(&s));
    };
    return {int64_t(sizeof(S)), offset(s.*fields)...};
}

}  // namespace chorus

// Exports `chorus_layout_NAME`: fills `found` with the first `most` numbers and returns how many there are.
#define CHORUS_LAYOUT(NAME, ...)                                                                         \
    extern "C" int64_t chorus_layout_##NAME(int64_t* found, int64_t most) {                              \
        using S = NAME;                                                                                  \
        const auto numbers = chorus::layout<S>(__VA_ARGS__);                                             \
        for (int64_t i = 0; i < int64_t(numbers.size()) && i < most; i++) found[i] = numbers[size_t(i)]; \
        return int64_t(numbers.size());                                                                  \
    }
