// bfloat16 as the upper half of a float32, for the C++ kernels.
#pragma once
#include <cmath>
#include <cstdint>

inline float from_bf16(uint16_t half) { return __builtin_bit_cast(float, uint32_t(half) << 16); }

// Round half to even; NaN stays NaN.
inline uint16_t to_bf16(float value) {
    const uint32_t word = __builtin_bit_cast(uint32_t, value);
    if (std::isnan(value)) return uint16_t((word >> 16) | 0x40);
    return uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}
