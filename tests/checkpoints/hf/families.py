"""Tiny random models of every family, made by transformers: two layers, hidden size 32, routers that take sides."""

BASE = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MOE = dict(moe_intermediate_size=24, num_experts_per_tok=2)
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 3.0, 4.0, 6.0], "short_mscale": 1.24, "long_mscale": 1.3,
    "original_max_position_embeddings": 64,
}  # fmt: skip

OSS = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "truncate": False,
       "original_max_position_embeddings": 16}  # fmt: skip

LATENT = dict(kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
DEEPSEEK_YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 16, "mscale": 0.707,
    "mscale_all_dim": 0.707,
}  # fmt: skip

LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=4,
    linear_conv_kernel_dim=4,
)  # fmt: skip

#: name -> (class of its config, settings besides BASE)
TINY = {
    "olmoe": ("OlmoeConfig", dict(intermediate_size=24, num_experts=8, num_experts_per_tok=3)),
    "mixtral": ("MixtralConfig", dict(intermediate_size=24, num_local_experts=8, head_dim=8)),
    "mixtral_window": ("MixtralConfig", dict(intermediate_size=24, num_local_experts=4, sliding_window=5)),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        dict(intermediate_size=40, shared_expert_intermediate_size=20, num_experts=6, **MOE),
    ),
    "qwen2_moe_mixed": (
        "Qwen2MoeConfig",
        dict(
            intermediate_size=40, shared_expert_intermediate_size=20, num_experts=6, mlp_only_layers=[0],
            norm_topk_prob=True, use_sliding_window=True, sliding_window=4, **MOE,
        ),
    ),
    "qwen3_moe": ("Qwen3MoeConfig", dict(intermediate_size=40, num_experts=8, norm_topk_prob=True, head_dim=16, **MOE)),
    "llama": ("LlamaConfig", dict(intermediate_size=40)),
    "llama3": (
        "LlamaConfig",
        dict(
            intermediate_size=40, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_parameters=LLAMA3,
        ),
    ),
    "mistral": ("MistralConfig", dict(intermediate_size=40, sliding_window=6)),
    "qwen2": (
        "Qwen2Config",
        dict(intermediate_size=40, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "qwen2_yarn": ("Qwen2Config", dict(intermediate_size=40, rope_parameters=YARN)),
    "qwen3": ("Qwen3Config", dict(intermediate_size=40, head_dim=16, tie_word_embeddings=True)),
    "olmo2": ("Olmo2Config", dict(intermediate_size=40)),
    "granitemoe": (
        "GraniteMoeConfig",
        dict(
            intermediate_size=24, num_local_experts=8, num_experts_per_tok=3, embedding_multiplier=12.0,
            attention_multiplier=0.2, residual_multiplier=0.4, logits_scaling=6.0, tie_word_embeddings=True,
        ),
    ),
    "granitemoeshared": (
        "GraniteMoeSharedConfig",
        dict(intermediate_size=24, shared_intermediate_size=20, attention_multiplier=0.3, attention_bias=True),
    ),
    "minimax_m2": (
        "MiniMaxM2Config",
        dict(
            intermediate_size=24, num_local_experts=8, num_experts_per_tok=3, head_dim=8,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        ),
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        dict(
            intermediate_size=40, n_routed_experts=8, attention_bias=True, use_qk_norm=True, head_dim=16, n_group=4,
            topk_group=2, routed_scaling_factor=2.5, **MOE,
        ),
    ),
    "dots1": (
        "Dots1Config",
        dict(
            intermediate_size=40, n_routed_experts=8, n_shared_experts=2, first_k_dense_replace=1, norm_topk_prob=True,
            sliding_window=4, max_window_layers=1, n_group=1, topk_group=1, **MOE,
        ),
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        dict(intermediate_size=40, moe_num_experts=8, moe_k=3, moe_intermediate_size=24, num_hidden_layers=3),
    ),
    "gpt_oss": (
        "GptOssConfig",
        dict(
            intermediate_size=24, num_local_experts=8, num_experts_per_tok=3, head_dim=16, sliding_window=5,
            rope_parameters=OSS, swiglu_limit=1.0,
        ),
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        dict(
            intermediate_size=40, n_routed_experts=8, n_shared_experts=2, first_k_dense_replace=1, q_lora_rank=None,
            num_key_value_heads=4, rope_parameters=DEEPSEEK_YARN, **LATENT, **MOE,
        ),
    ),
    "deepseek_v2_groups": (
        "DeepseekV2Config",
        dict(
            intermediate_size=40, n_routed_experts=8, n_shared_experts=1, q_lora_rank=12, num_key_value_heads=4,
            topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=3.0, **LATENT, **MOE,
        ),
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        dict(
            intermediate_size=40, n_routed_experts=8, first_k_dense_replace=1, q_lora_rank=12, num_key_value_heads=4,
            n_group=4, topk_group=2, rope_parameters=DEEPSEEK_YARN, **LATENT, **MOE,
        ),
    ),
    "flex_olmo": ("FlexOlmoConfig", dict(intermediate_size=24, num_experts=8, num_experts_per_tok=3)),
    "dbrx": (
        "DbrxConfig",
        dict(
            d_model=32, n_heads=4, n_layers=2,
            attn_config=dict(kv_n_heads=2, clip_qkv=0.8, rope_theta=77.0),
            ffn_config=dict(ffn_hidden_size=24, moe_num_experts=8, moe_top_k=3),
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        ),
    ),
    "hunyuan_moe": (
        "HunYuanMoEV1Config",
        dict(
            intermediate_size=24, num_experts=8, moe_topk=[3, 3], head_dim=16,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 500.0, "alpha": 10.0, "factor": 1.0},
        ),
    ),
    "afmoe": (
        "AfmoeConfig",
        dict(
            intermediate_size=40, num_experts=8, num_hidden_layers=3, head_dim=16, num_shared_experts=1,
            route_scale=2.5, global_attn_every_n_layers=3, sliding_window=5, mup_enabled=True, **MOE,
        ),
    ),
    "exaone_moe": (
        "ExaoneMoeConfig",
        dict(
            intermediate_size=40, num_experts=8, num_hidden_layers=3, head_dim=16, n_group=4, topk_group=2,
            sliding_window_pattern=3, sliding_window=5, **MOE,
        ),
    ),
    "llama4": (
        "Llama4TextConfig",
        dict(
            intermediate_size=24, intermediate_size_mlp=40, num_local_experts=6, head_dim=16, num_hidden_layers=3,
            no_rope_layers=[1, 0, 1], moe_layers=[1, 2], attention_chunk_size=6, floor_scale=8, attn_scale=0.3,
            rope_parameters=LLAMA3,
        ),
    ),
    "longcat_flash": (
        "LongcatFlashConfig",
        dict(
            num_hidden_layers=4, ffn_hidden_size=40, expert_ffn_hidden_size=24, n_routed_experts=6, zero_expert_num=3,
            moe_topk=4, q_lora_rank=12, num_key_value_heads=4, head_dim=4, routed_scaling_factor=2.0,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0}, **LATENT,
        ),
    ),
    "jetmoe": (
        "JetMoeConfig",
        dict(
            intermediate_size=24, num_local_experts=6, num_experts_per_tok=2, kv_channels=8, rms_norm_eps=1e-2,
            initializer_range=0.05,
        ),
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        dict(
            intermediate_size=40, num_experts=8, shared_expert_intermediate_size=20, head_dim=16, num_hidden_layers=3,
            layer_types=["linear_attention", "full_attention", "linear_attention"], mlp_only_layers=[2],
            rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
            **LINEAR, **MOE,
        ),
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        dict(
            num_experts=8, shared_expert_intermediate_size=20, head_dim=16,
            layer_types=["linear_attention", "full_attention"], tie_word_embeddings=True, **LINEAR, **MOE,
        ),
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        dict(
            intermediate_size=24, shared_intermediate_size=20, num_local_experts=8, num_experts_per_tok=3,
            layer_types=["linear_attention", "full_attention"], embedding_multiplier=12.0, attention_multiplier=0.2,
            residual_multiplier=0.4, logits_scaling=6.0, tie_word_embeddings=True, mamba_n_heads=8, mamba_d_state=6,
            mamba_n_groups=2, mamba_proj_bias=True,
        ),
    ),
    "granitemoehybrid_dense": (
        "GraniteMoeHybridConfig",
        dict(
            shared_intermediate_size=20, num_local_experts=0, num_experts_per_tok=0, mamba_n_heads=4, mamba_d_state=6,
            layer_types=["full_attention", "linear_attention"], position_embedding_type="rope",
        ),
    ),
    "nemotron_h": (
        "NemotronHConfig",
        dict(
            num_hidden_layers=5, layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "moe"],
            intermediate_size=40, moe_shared_expert_intermediate_size=20, n_routed_experts=8, n_group=4, topk_group=2,
            routed_scaling_factor=2.5, head_dim=8, mamba_num_heads=4, mamba_head_dim=6, n_groups=2, ssm_state_size=5,
            time_step_min=1e-6, **MOE,
        ),
    ),
    "jamba": (
        "JambaConfig",
        dict(
            intermediate_size=24, num_experts=8, num_experts_per_tok=3, num_hidden_layers=3, attn_layer_period=3,
            attn_layer_offset=1, mamba_d_state=5, mamba_dt_rank=3,
        ),
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        dict(
            intermediate_size=40, num_experts=8, num_hidden_layers=3, num_dense_layers=1, routed_scaling_factor=1.5,
            layer_types=["conv", "full_attention", "conv"], tie_word_embeddings=True, conv_bias=True, **MOE,
        ),
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        dict(
            intermediate_size=40, num_local_experts=8, num_hidden_layers=3, num_key_value_heads=4, n_group=4,
            topk_group=2, layer_types=["linear_attention", "full_attention", "linear_attention"],
            mlp_layer_types=["dense", "sparse", "sparse"], linear_num_heads=2, linear_head_dim=6, **LATENT, **MOE,
        ),
    ),
    "minimax": (
        "MiniMaxConfig",
        dict(
            intermediate_size=24, num_local_experts=8, num_hidden_layers=3, head_dim=8, block_size=5,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            **{f"{part}_alpha_factor": 2.5 for part in ("full_attn", "linear_attn", "mlp")},
            **{f"{part}_beta_factor": 0.7 for part in ("full_attn", "linear_attn", "mlp")},
        ),
    ),
    "phimoe": (
        "PhimoeConfig",
        dict(
            intermediate_size=24, num_local_experts=4, attention_bias=True, lm_head_bias=True, router_jitter_noise=0.1,
        ),
    ),
    "phimoe_longrope": (
        "PhimoeConfig",
        dict(intermediate_size=24, num_local_experts=4, rope_parameters=LONGROPE, original_max_position_embeddings=64),
    ),
    "switch_transformers": (
        "SwitchTransformersConfig",
        dict(
            d_model=32, d_kv=16, d_ff=24, num_heads=4, num_layers=3, num_decoder_layers=2, num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=2, num_experts=6, relative_attention_num_buckets=8,
            relative_attention_max_distance=12, decoder_start_token_id=0,
        ),
    ),
    "nllb_moe": (
        "NllbMoeConfig",
        dict(
            d_model=32, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=24, decoder_ffn_dim=20, num_experts=6,
            encoder_attention_heads=4, decoder_attention_heads=2, encoder_sparse_step=2, decoder_sparse_step=3,
            decoder_start_token_id=2,
        ),
    ),
}  # fmt: skip
#: models of two texts
PAIRS = ("switch_transformers", "nllb_moe")


def tiny(name: str, seed: int = 0):
    """The model in eval mode, with weights that make every part matter: routers decide, norms and biases act."""
    import torch
    import transformers

    cls, settings = TINY[name]
    torch.manual_seed(seed)
    if name == "nllb_moe":
        repair_nllb()
    base = {key: BASE[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    config = getattr(transformers, cls)(**{**(base if name in PAIRS else BASE), **settings})
    auto = transformers.AutoModelForSeq2SeqLM if name in PAIRS else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for path, p in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in path or path.endswith(("slope_rate", "_decay", "embed_positions.weights")):
                continue
            if path.endswith("A_log"):
                p.copy_(torch.randn_like(p))  # decays on both sides of 1/2
            elif path.endswith("sinks"):
                p.copy_(torch.randn_like(p))
            elif "correction_bias" in path:
                p.copy_(0.2 * torch.randn_like(p))
            elif "norm" in path and p.ndim == 1 and path.endswith("weight"):
                p.copy_(1 + 0.3 * torch.randn_like(p))
            elif path.endswith("bias") or p.ndim == 1:
                p.copy_(0.3 * torch.randn_like(p))
            elif path.endswith(
                ("gate.weight", "router.weight", "router.layer.weight", "gate.wg.weight", "classifier.weight")
            ):
                p.copy_(torch.randn_like(p))
            elif name != "switch_transformers":  # whose first weights are as large as need be
                p.mul_(5)
    return model


def repair_nllb() -> None:
    """transformers 5.24 takes the 0 and 1 of NLLB's mask of first choices for numbers of experts: expert 1 computes all
    that was chosen first, expert 0 the rest. Here every expert computes what was sent to it, as in earlier versions.
    """
    import torch
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

    def forward(self, hidden_states, router_mask, router_probs):
        out = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            sent = router_probs[:, e] != 0
            out[sent] += self[f"expert_{e}"](hidden_states[sent]) * router_probs[sent, e, None]
        return out * (1 - self.moe_token_dropout)

    NllbMoeExperts.forward = forward
