"""The model: layers -> attention (MLA), moe -> block -> mtp -> causal_lm. Needs torch and
dsv3_mtp.config.

Shape letters used in every file of this folder:
    B batch, T tokens, N = B*T, C hidden_size, H heads, E experts, K experts per token, F expert
    width, R kv_lora_rank, P qk_rope_head_dim, V vocab, D MTP depths (1-based `depth`; depth 0 is
    the main head).
"""
