// All decoder layers of a step in one parallel region: no call, allocation or thread start between the parts
// of a layer, which together cost more than the arithmetic when a step is a few tokens.
//
// A layer is that of Llama and its relatives: x += norm(attention(norm(x))), x += norm(mlp(norm(x))), where
// each of the four norms may be missing. The sum x is kept in float32. The Python side, which reads a layer off
// the model and proves that it computes the same, is devices/cpu/layers.py.
#include "attention.h"
#include "layout.h"
#include "linear.h"
#include "lora.h"
#include "maths.h"

extern "C" {

struct ChorusNorm {  // RMSNorm (Zhang & Sennrich 2019)
    const float* weight;  // null = no norm
    float eps;
};

struct ChorusLayer {
    ChorusNorm attention_in, attention_out, mlp_in, mlp_out;
    ChorusNorm q_norm, k_norm;
    int64_t qk_norm_width;  // values normed together: a head's, or all heads'
    ChorusLinear qkv[3], output, gate_up[2], down;
    int64_t num_qkv, num_gate_up;  // 1 where the model has them packed in one; gate and up in whole panels each
    ChorusAttention attention;     // query, key, value, out and their strides are not read
    int64_t rotary_dim;            // leading values of a head that are rotated; 0 = none
    int64_t gelu;                  // 0 = SiLU, 1 = tanh GELU
    float residual_multiplier;
};

struct ChorusDecoder {  // one step; T = plan->num_tokens
    const ChorusLayer* layers;
    int64_t num_layers, hidden_size;
    int64_t stretch;  // what lies before attention `stretch` and after the one before it; -1 = all, attention too
    const ChorusPlan* plan;
    const ChorusSegments* segments;  // null = base model only
    const void* const* cos;          // of each layer: [rows, rotary_dim]
    const void* const* sin;
    const int64_t* positions;     // [T] rows of cos and sin; null = a row for each token
    ChorusNorm final_norm;        // no weight = none, and no samples
    const int64_t* sample_rows;   // [num_samples], of T
    int64_t num_samples;
    void* sampled;    // [num_samples, hidden_size]: those tokens after the final norm
    void* hidden;     // [T, hidden_size]: the embedded tokens; without a final norm, then the last layer's output
    float* residual;  // [T, hidden_size]
    void* normed;     // [T, hidden_size]
    void* qkv;        // [T, heads * k_dim + kv_heads * (k_dim + v_dim)]; where others attend, K is as they want it
    void* attended;   // [T, heads * v_dim]
    void* projected;  // [T, hidden_size]
    void* activated;  // [T, intermediate size]
};
}

namespace {

using namespace chorus;

void rms_norm(float* x, int64_t n, const float* weight, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += x[j] * x[j];
    const float scale = 1.0f / std::sqrt(sum / float(n) + eps);
#pragma omp simd
    for (int64_t j = 0; j < n; j++) x[j] *= scale * weight[j];
}

// Rotary position embedding on the two halves of the leading `dim` values (Su et al. 2021).
void rotate(float* x, int64_t dim, const float* cos, const float* sin) {
    const int64_t half = dim / 2;
#pragma omp simd
    for (int64_t j = 0; j < half; j++) {
        const float a = x[j], b = x[j + half];
        x[j] = a * cos[j] - b * sin[j];
        x[j + half] = b * cos[j + half] + a * sin[j + half];
    }
}

template <typename T>
class Forward {  // one thread's walk through the layers
  public:
    Forward(Member& me, const ChorusDecoder& d)
        : me_(me), d_(d), tokens_(d.plan->num_tokens), segments_(d.segments), sample_rows_(d.sample_rows) {}

    void run() {
        if (d_.stretch >= 0) return stretch(d_.stretch);
        for (int64_t l = 0; l <= d_.num_layers; l++) {
            stretch(l);
            if (l < d_.num_layers) attend(d_.layers[l]);
        }
    }

  private:
    // Layer l up to its attention, after the rest of the layer before.
    void stretch(int64_t l) {
        const ChorusLayer* previous = l > 0 ? &d_.layers[l - 1] : nullptr;
        if (previous) {
            if (l == d_.num_layers) keep_sampled();
            linear_with_lora(&previous->output, 1, d_.attended, d_.projected);
            between(*previous);
            gate_up(*previous);
            linear_with_lora(&previous->down, 1, d_.activated, d_.projected);
        }
        if (l == d_.num_layers) return leave(*previous);
        const ChorusLayer& layer = d_.layers[l];
        enter(previous, layer);
        linear_with_lora(layer.qkv, layer.num_qkv, d_.normed, d_.qkv);
        heads(layer, static_cast<const T*>(d_.cos[l]), static_cast<const T*>(d_.sin[l]));
    }

    static int64_t qkv_width(const ChorusAttention& a) { return a.heads * a.k_dim + a.kv_heads * (a.k_dim + a.v_dim); }

    float* space(int64_t n) {
        if (int64_t(row_.size()) < n) row_.resize(size_t(n));
        return row_.data();
    }

    float* residual(int64_t t) { return d_.residual + t * d_.hidden_size; }

    template <typename Row>
    void rows(int64_t count, Row row) {
        me_.share_rows(count, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) row(i);
        });
    }

    // residual += multiplier * norm(projected)
    void add_projected(int64_t t, const ChorusNorm& norm, float multiplier) {
        const int64_t n = d_.hidden_size;
        float *x = space(n), *sum = residual(t);
        convert(static_cast<const T*>(d_.projected) + t * n, n, x);
        if (norm.weight) rms_norm(x, n, norm.weight, norm.eps);
#pragma omp simd
        for (int64_t j = 0; j < n; j++) sum[j] += multiplier * x[j];
    }

    // normed = norm(residual)
    void norm_residual(int64_t t, const ChorusNorm& norm) {
        const int64_t n = d_.hidden_size;
        float* x = space(n);
        std::memcpy(x, residual(t), size_t(n) * sizeof(float));
        if (norm.weight) rms_norm(x, n, norm.weight, norm.eps);
        convert(x, n, static_cast<T*>(d_.normed) + t * n);
    }

    void enter(const ChorusLayer* previous, const ChorusLayer& layer) {
        rows(tokens_, [&](int64_t t) {
            if (previous)
                add_projected(t, previous->mlp_out, previous->residual_multiplier);
            else
                convert(static_cast<const T*>(d_.hidden) + t * d_.hidden_size, d_.hidden_size, residual(t));
            norm_residual(t, layer.attention_in);
        });
        me_.barrier();
    }

    void between(const ChorusLayer& layer) {
        rows(tokens_, [&](int64_t t) {
            add_projected(t, layer.attention_out, layer.residual_multiplier);
            norm_residual(t, layer.mlp_in);
        });
        me_.barrier();
    }

    // After the last attention only the sampled tokens matter: leaves out the others, where that moves tokens down.
    void keep_sampled() {
        const int64_t n = d_.num_samples;
        if (!sampling() || n == tokens_ || !std::is_sorted(sample_rows_, sample_rows_ + n)) return;
        const int64_t width = d_.layers[d_.num_layers - 1].output.in;
        me_.share(1, [&](int64_t) {
            T* attended = static_cast<T*>(d_.attended);
            for (int64_t i = 0; i < n; i++) {
                std::memmove(attended + i * width, attended + sample_rows_[i] * width, size_t(width) * sizeof(T));
                std::memmove(residual(i), residual(sample_rows_[i]), size_t(d_.hidden_size) * sizeof(float));
            }
        });
        if (segments_) {
            sampled_ = *segments_;
            for (int64_t g = 0; g <= sampled_.num_segments; g++) {
                const int64_t* from = std::lower_bound(sample_rows_, sample_rows_ + n, segments_->token_starts[g]);
                sampled_starts_.push_back(int32_t(from - sample_rows_));
            }
            sampled_.token_starts = sampled_starts_.data();
            segments_ = &sampled_;
        }
        sample_rows_ = nullptr;
        tokens_ = n;
        me_.barrier();
    }

    bool sampling() const { return d_.final_norm.weight != nullptr; }

    void leave(const ChorusLayer& last) {
        T* to = static_cast<T*>(sampling() ? d_.sampled : d_.hidden);
        rows(sampling() ? d_.num_samples : tokens_, [&](int64_t row) {
            const int64_t t = sample_rows_ ? sample_rows_[row] : row;
            add_projected(t, last.mlp_out, last.residual_multiplier);
            if (sampling()) rms_norm(residual(t), d_.hidden_size, d_.final_norm.weight, d_.final_norm.eps);
            convert(residual(t), d_.hidden_size, to + row * d_.hidden_size);
        });
    }

    // Begins what LoRA adds to `count` linears of the same x. Returns the outputs of all of them.
    int64_t begin_lora(const ChorusLinear* linears, int64_t count, const T* x) {
        int64_t width = 0;
        bool adapted = false;
        deltas_.clear();
        for (int64_t i = 0; i < count; width += linears[i++].out) {
            if (!segments_) continue;
            deltas_.emplace_back(*segments_, linears[i].module, linears[i].in, linears[i].out, i, width);
            adapted |= deltas_.back().any();
        }
        if (adapted) {
            lora_begin(me_, *segments_, deltas_.data(), count, x, linears->in);
            me_.barrier();
        }
        return width;
    }

    // What it adds to the i-th of them; null = nothing.
    const LoraDelta<T>* delta(int64_t i) const { return segments_ && deltas_[i].any() ? &deltas_[i] : nullptr; }

    // The outputs of `count` linears of the same x, side by side in y, with what LoRA adds.
    void linear_with_lora(const ChorusLinear* linears, int64_t count, const void* x_from, void* y_to) {
        const T* x = static_cast<const T*>(x_from);
        T* y = static_cast<T*>(y_to);
        const int64_t width = begin_lora(linears, count, x);
        for (int64_t i = 0, column = 0; i < count; column += linears[i++].out)
            linear(me_, linears[i], x, linears[i].in, tokens_, y + column, width, delta(i));
        me_.barrier();
    }

    // activated = activation(gate) * up
    void gate_up(const ChorusLayer& layer) {
        const T* x = static_cast<const T*>(d_.normed);
        const int64_t out = begin_lora(layer.gate_up, layer.num_gate_up, x) / 2, up = layer.num_gate_up - 1;
        const Half first{layer.gate_up[0], 0}, second{layer.gate_up[up], up ? 0 : out / kPanel};
        auto run = [&](auto activation) {
            gated(me_, first, second, out, x, d_.hidden_size, tokens_, static_cast<T*>(d_.activated), out, delta(0),
                  delta(up), activation);
        };
        if (layer.gelu)
            run([](float v) { return gelu_tanh(v); });
        else
            run([](float v) { return silu(v); });
        me_.barrier();
    }

    void norm_heads(float* x, int64_t heads, int64_t dim, const ChorusNorm& norm, int64_t width) {
        if (!norm.weight) return;
        if (width == dim)
            for (int64_t h = 0; h < heads; h++) rms_norm(x + h * dim, dim, norm.weight, norm.eps);
        else
            rms_norm(x, heads * dim, norm.weight, norm.eps);
    }

    // Norms and rotates Q in place, and K on its way into the cache, with V; in place too, where others attend.
    void heads(const ChorusLayer& layer, const T* cos_rows, const T* sin_rows) {
        const ChorusAttention& a = layer.attention;
        const int64_t dim = a.k_dim, rotary = layer.rotary_dim, width = qkv_width(a);
        const bool into_cache = d_.stretch < 0;
        rows(tokens_, [&](int64_t t) {
            float* x = space(a.heads * dim + 2 * rotary);
            float *cos = x + a.heads * dim, *sin = cos + rotary;
            if (rotary) {
                const int64_t at = d_.positions ? d_.positions[t] : t;
                convert(cos_rows + at * rotary, rotary, cos);
                convert(sin_rows + at * rotary, rotary, sin);
            }
            T *q = static_cast<T*>(d_.qkv) + t * width, *k = q + a.heads * dim, *v = k + a.kv_heads * dim;
            convert(q, a.heads * dim, x);
            norm_heads(x, a.heads, dim, layer.q_norm, layer.qk_norm_width);
            for (int64_t h = 0; h < a.heads; h++) rotate(x + h * dim, rotary, cos, sin);
            convert(x, a.heads * dim, q);
            convert(k, a.kv_heads * dim, x);
            norm_heads(x, a.kv_heads, dim, layer.k_norm, layer.qk_norm_width);
            for (int64_t h = 0; h < a.kv_heads; h++) {
                rotate(x + h * dim, rotary, cos, sin);
                convert(x + h * dim, dim, into_cache ? cache_row<T>(*d_.plan, a, t, h, 0) : k + h * dim);
                if (!into_cache) continue;
                std::memcpy(cache_row<T>(*d_.plan, a, t, h, 1), v + h * a.v_dim, size_t(a.v_dim) * sizeof(T));
            }
        });
        me_.barrier();
    }

    void attend(const ChorusLayer& layer) {
        ChorusAttention a = layer.attention;
        a.query = d_.qkv;
        a.q_token = qkv_width(a);
        a.q_head = a.k_dim;
        a.out = d_.attended;
        attention(me_, *d_.plan, a, scratch_);
        me_.barrier();
    }

    Member& me_;
    const ChorusDecoder& d_;
    int64_t tokens_;
    const ChorusSegments* segments_;
    const int64_t* sample_rows_;  // of the tokens at hand; null = all of them, in their order
    ChorusSegments sampled_;      // segments of the sampled tokens alone
    std::vector<int32_t> sampled_starts_;
    Scratch<T> scratch_;
    std::vector<LoraDelta<T>> deltas_;
    std::vector<float> row_;
};

}  // namespace

extern "C" {
void chorus_decoder_f32(const ChorusDecoder* d, int64_t threads) {
    run_team(threads, [&](Member& me) { Forward<float>(me, *d).run(); });
}
void chorus_decoder_bf16(const ChorusDecoder* d, int64_t threads) {
    run_team(threads, [&](Member& me) { Forward<bf16>(me, *d).run(); });
}
}

CHORUS_LAYOUT(ChorusNorm, &S::weight, &S::eps)

CHORUS_LAYOUT(ChorusLayer, &S::attention_in, &S::attention_out, &S::mlp_in, &S::mlp_out, &S::q_norm, &S::k_norm,
              &S::qk_norm_width, &S::qkv, &S::output, &S::gate_up, &S::down, &S::num_qkv, &S::num_gate_up,
              &S::attention, &S::rotary_dim, &S::gelu, &S::residual_multiplier)

CHORUS_LAYOUT(ChorusDecoder, &S::layers, &S::num_layers, &S::hidden_size, &S::stretch, &S::plan, &S::segments, &S::cos,
              &S::sin, &S::positions, &S::final_norm, &S::sample_rows, &S::num_samples, &S::sampled, &S::hidden,
              &S::residual, &S::normed, &S::qkv, &S::attended, &S::projected, &S::activated)
