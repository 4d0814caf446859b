// Functions of one float, written so that compilers vectorise loops over them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace chorus {

// e^x for x <= 0 within 2 ulp of float32: e^x = 2^n * 2^f, |f| <= 1/2.
inline float exp_negative(float x) {
    const float z = (x < -87.0f ? -87.0f : x) * 1.44269504f;
    const float n = std::nearbyint(z), f = z - n;
    float y = 1.5403530e-4f;
    y = y * f + 1.3333558e-3f;
    y = y * f + 9.6181291e-3f;
    y = y * f + 5.5504109e-2f;
    y = y * f + 2.4022651e-1f;
    y = y * f + 6.9314718e-1f;
    y = y * f + 1.0f;
    const int32_t bits = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return x < -87.0f ? 0.0f : y * scale;
}

inline float sigmoid(float x) {
    const float e = exp_negative(x < 0 ? x : -x);
    return (x < 0 ? e : 1.0f) / (1.0f + e);
}

inline float tanh_of(float x) {
    const float e = exp_negative(x < 0 ? 2 * x : -2 * x), t = (1.0f - e) / (1.0f + e);
    return x < 0 ? -t : t;
}

inline float silu(float x) { return x * sigmoid(x); }

// 0.5 x (1 + tanh(u)) = x sigmoid(2 u), the approximation of Hendrycks & Gimpel 2016.
inline float gelu_tanh(float x) { return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x)); }

}  // namespace chorus
