// Paged attention for torch: see attention.h. The Python side is devices/cpu/attention.py.
#include "attention.h"
#include "layout.h"

namespace {

using namespace chorus;

template <typename T>
void write_cache(Member& me, const ChorusPlan& p, const ChorusAttention& a) {
    me.share_rows(p.num_tokens, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++)
            for (int64_t h = 0; h < a.kv_heads; h++) {
                std::memcpy(cache_row<T>(p, a, t, h, 0), static_cast<const T*>(a.key) + t * a.k_token + h * a.k_head,
                            size_t(a.k_dim) * sizeof(T));
                std::memcpy(cache_row<T>(p, a, t, h, 1), static_cast<const T*>(a.value) + t * a.v_token + h * a.v_head,
                            size_t(a.v_dim) * sizeof(T));
            }
    });
}

template <typename T>
void run(const ChorusPlan& p, const ChorusAttention& a, int64_t threads) {
    run_team(threads, [&](Member& me) {
        Scratch<T> scratch;
        write_cache<T>(me, p, a);
        me.barrier();
        attention(me, p, a, scratch);
    });
}

}  // namespace

extern "C" {
void chorus_attention_f32(const ChorusPlan* p, const ChorusAttention* a, int64_t threads) {
    run<float>(*p, *a, threads);
}
void chorus_attention_bf16(const ChorusPlan* p, const ChorusAttention* a, int64_t threads) {
    run<bf16>(*p, *a, threads);
}
}

CHORUS_LAYOUT(ChorusPlan, &S::query_starts, &S::context_lens, &S::block_tables, &S::slot_mapping, &S::num_seqs,
              &S::table_stride, &S::num_tokens, &S::block_size)

CHORUS_LAYOUT(ChorusAttention, &S::query, &S::key, &S::value, &S::out, &S::k_cache, &S::v_cache, &S::q_token,
              &S::q_head, &S::k_token, &S::k_head, &S::v_token, &S::v_head, &S::heads, &S::kv_heads, &S::k_dim,
              &S::v_dim, &S::window, &S::scale, &S::softcap, &S::sinks)
