"""One tiny transformers config per family and per way in which a family's checkpoints differ."""

from __future__ import annotations

from typing import Any

BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 640,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 160}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GPT = {
    "vocab_size": 97,
    "n_embd": 48,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 640,
    "bos_token_id": None,
    "eos_token_id": None,
}
MOE = {"moe_intermediate_size": 40, "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 640,
}
DEEPSEEK = {
    **BASE,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "first_k_dense_replace": 1,
    "num_mtp_layers": 0,
}

# name → (config class, its values)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**BASE, "head_dim": 14}),
    "llama-tied-biased": ("Llama", {**BASE, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("Llama", {**BASE, "rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {**BASE, "rope_parameters": YARN}),
    "llama-linear": ("Llama", {**BASE, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama-dynamic": ("Llama", {**BASE, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}}),
    "mistral": ("Mistral", {**BASE, "sliding_window": 50, "head_dim": 10}),
    "qwen2": (
        "Qwen2",
        {**BASE, "use_sliding_window": True, "sliding_window": 33, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {**BASE, "head_dim": 18}),
    "gemma2": (
        "Gemma2",
        {
            **BASE,
            "head_dim": 14,
            "query_pre_attn_scalar": 9,
            "sliding_window": 40,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **BASE,
            "head_dim": 14,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 20,
            "sliding_window": 40,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
            },
        },
    ),
    "phi3": ("Phi3", {**BASE, "sliding_window": 60}),
    "phi3-longrope": (
        "Phi3",
        {
            **BASE,
            "hidden_size": 64,
            "max_position_embeddings": 2560,
            "original_max_position_embeddings": 640,
            "rope_parameters": {**LONG, "partial_rotary_factor": 0.75},
        },
    ),
    "olmo2": ("Olmo2", {**BASE}),
    "cohere": ("Cohere", {**BASE, "logit_scale": 0.3}),
    "cohere-normed": ("Cohere", {**BASE, "use_qk_norm": True, "tie_word_embeddings": False}),
    "gpt2": ("GPT2", {**GPT, "n_inner": 100}),
    "gpt2-odd": ("GPT2", {**GPT, "n_embd": 45, "n_head": 3}),
    "gpt2-by-layer": ("GPT2", {**GPT, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}),
    "gptj": ("GPTJ", {**GPT, "rotary_dim": 6}),
    "gpt_neox": (
        "GPTNeoX",
        {**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "gpt_neox-serial": (
        "GPTNeoX",
        {
            **BASE,
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        },
    ),
    "opt": ("OPT", {**BASE, "ffn_dim": 90, "word_embed_proj_dim": 48}),
    "opt-odd": ("OPT", {**BASE, "hidden_size": 52, "ffn_dim": 90, "word_embed_proj_dim": 52}),
    "opt-350m": ("OPT", {**BASE, "ffn_dim": 90, "word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    "bloom": ("Bloom", {"vocab_size": 97, "hidden_size": 60, "n_head": 6, "n_layer": 2}),
    "bloom-after-norm": (
        "Bloom",
        {
            "vocab_size": 97,
            "hidden_size": 48,
            "n_head": 4,
            "n_layer": 2,
            "apply_residual_connection_post_layernorm": True,
        },
    ),
    "falcon": ("Falcon", {**BASE}),
    "falcon-new": ("Falcon", {**BASE, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon-new-one-norm": (
        "Falcon",
        {**BASE, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-alibi": (
        "Falcon",
        {**BASE, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "num_attention_heads": 6},
    ),
    "mixtral": ("Mixtral", {**BASE, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 70}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**BASE, **MOE, "norm_topk_prob": False, "shared_expert_intermediate_size": 30, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": ("Qwen3Moe", {**BASE, **MOE, "head_dim": 14, "num_hidden_layers": 3, "decoder_sparse_step": 2}),
    "olmoe": ("Olmoe", {**BASE, "num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 1.5}),
    "deepseek_v3": (
        "DeepseekV3",
        {**DEEPSEEK, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8}},
    ),
    "deepseek_v3-direct": (
        "DeepseekV3",
        {**DEEPSEEK, "q_lora_rank": None, "rope_interleave": False, "attention_bias": True},
    ),
    "gpt_oss": (
        "GptOss",
        {
            **BASE,
            "head_dim": 12,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 30,
            "swiglu_limit": 1.5,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
}

# Cases saved in the library's own layout: all experts of a layer in one tensor.
FUSED = tuple(f"{name}-fused" for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"))
CASES.update({name: CASES[name.removesuffix("-fused")] for name in FUSED})
