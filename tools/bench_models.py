"""The models of tools/bench.py and tools/bench_decode.py: what they change in configs/v3_tiny.yaml."""

TINY = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "initializer_range": 0.02,
}
SMALL = TINY | {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1056,
    "moe_intermediate_size": 160,
    "num_hidden_layers": 7,
    "q_lora_rank": 128,
    "kv_lora_rank": 96,
}
