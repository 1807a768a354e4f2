"""config.json of released models, as far as shapes depend on it, and how many parameters they have."""

PHI_LONGROPE = {
    "type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "short_mscale": 1.243163121016122,
    "long_mscale": 1.243163121016122, "original_max_position_embeddings": 4096,
}  # fmt: skip
MIXTRAL = dict(
    architectures=["MixtralForCausalLM"], num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
    rms_norm_eps=1e-5, rope_theta=1e6,
)  # fmt: skip
QWEN2 = dict(architectures=["Qwen2MoeForCausalLM"], vocab_size=151936, rope_theta=1e6, norm_topk_prob=False)
QWEN3 = dict(
    architectures=["Qwen3MoeForCausalLM"], vocab_size=151936, num_key_value_heads=4, head_dim=128, num_experts=128,
    num_experts_per_tok=8, norm_topk_prob=True, rope_theta=1e6, intermediate_size=6144,
)  # fmt: skip
GRANITE = dict(
    architectures=["GraniteMoeForCausalLM"], num_key_value_heads=8, intermediate_size=512, num_experts_per_tok=8,
    tie_word_embeddings=True, embedding_multiplier=12.0, attention_multiplier=0.015625, residual_multiplier=0.22,
    logits_scaling=6.0,
)  # fmt: skip
OSS = dict(
    architectures=["GptOssForCausalLM"], vocab_size=201088, hidden_size=2880, intermediate_size=2880,
    num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_experts_per_tok=4, sliding_window=128,
    attention_bias=True, rope_theta=150000.0, max_position_embeddings=131072,
    rope_scaling={
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
)  # fmt: skip
YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
DEEPSEEK = dict(
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, rope_theta=10000,
    max_position_embeddings=163840, moe_layer_freq=1,
)  # fmt: skip
GLM = dict(
    architectures=["Glm4MoeForCausalLM"], vocab_size=151552, num_attention_heads=96, num_key_value_heads=8,
    head_dim=128, attention_bias=True, partial_rotary_factor=0.5, num_experts_per_tok=8, n_shared_experts=1,
    norm_topk_prob=True, rope_theta=1e6,
)  # fmt: skip

GRANITE4 = dict(
    architectures=["GraniteMoeHybridForCausalLM"], vocab_size=100352, num_hidden_layers=40, tie_word_embeddings=True,
    embedding_multiplier=12, attention_multiplier=0.0078125, residual_multiplier=0.22, logits_scaling=16,
    mamba_d_head=64, mamba_d_state=128, mamba_n_groups=1, mamba_expand=2, position_embedding_type="nope",
    layer_types=["attention" if i % 10 == 5 else "mamba" for i in range(40)],
)  # fmt: skip

OPENMOE = dict(
    architectures=["OpenMoeForCausalLM"], model_type="llama", vocab_size=256384, head_dim=128, num_attention_heads=24,
    num_experts=32, topk=2, hidden_act="swiglu", gated=True, layer_norm_epsilon=1e-6, drop_tks=True, min_capacity=4,
    capacity_factor_train=1.25, capacity_factor_eval=2.0,
)  # fmt: skip

#: name -> (config.json, all parameters with balancing biases, active per token or None)
RELEASED = {
    "OLMoE-1B-7B": (
        dict(
            architectures=["OlmoeForCausalLM"], vocab_size=50304, hidden_size=2048, intermediate_size=1024,
            num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8,
        ),
        6_919_161_856, 1.28e9,
    ),
    "Mixtral-8x7B": (
        dict(
            MIXTRAL, vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
            intermediate_size=14336,
        ),
        46_702_792_704, 12.9e9,
    ),
    "Mixtral-8x22B": (
        dict(
            MIXTRAL, vocab_size=32768, hidden_size=6144, num_hidden_layers=56, num_attention_heads=48,
            intermediate_size=16384,
        ),
        140_630_071_296, None,
    ),
    "Qwen1.5-MoE-A2.7B": (
        dict(
            QWEN2, hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16,
            moe_intermediate_size=1408, shared_expert_intermediate_size=5632, intermediate_size=5632, num_experts=60,
            num_experts_per_tok=4,
        ),
        14_315_784_192, 2.69e9,
    ),
    "Qwen2-57B-A14B": (
        dict(
            QWEN2, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
            moe_intermediate_size=2560, shared_expert_intermediate_size=20480, intermediate_size=18944, num_experts=64,
            num_experts_per_tok=8,
        ),
        57_408_658_944, 14.2e9,
    ),
    "Qwen3-30B-A3B": (
        dict(QWEN3, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, moe_intermediate_size=768),
        30_532_122_624, 3.35e9,
    ),
    "Qwen3-235B-A22B": (
        dict(QWEN3, hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, moe_intermediate_size=1536),
        235_093_634_560, 22.2e9,
    ),
    "Phi-3.5-MoE": (
        dict(
            architectures=["PhiMoEForCausalLM"], vocab_size=32064, hidden_size=4096, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, intermediate_size=6400, num_local_experts=16,
            attention_bias=True, lm_head_bias=True, rope_theta=10000.0, rope_scaling=PHI_LONGROPE,
            max_position_embeddings=131072, sliding_window=131072,
        ),
        41_873_153_344, 6.64e9,
    ),
    "Granite-3.0-1b-a400m": (
        dict(GRANITE, vocab_size=49155, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
             num_local_experts=32),
        1_334_628_352, 0.43e9,
    ),
    "Granite-3.0-3b-a800m": (
        dict(GRANITE, vocab_size=49155, hidden_size=1536, num_hidden_layers=32, num_attention_heads=24,
             num_local_experts=40),
        3_298_793_472, 0.88e9,
    ),
    "gpt-oss-20b": (
        dict(OSS, num_hidden_layers=24, num_local_experts=32),
        20_914_757_184, 4.19e9,
    ),
    "gpt-oss-120b": (
        dict(OSS, num_hidden_layers=36, num_local_experts=128),
        116_829_156_672, 5.71e9,
    ),
    "DeepSeek-V2-Lite": (
        dict(
            DEEPSEEK, architectures=["DeepseekV2ForCausalLM"], vocab_size=102400, hidden_size=2048,
            num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None, intermediate_size=10944,
            moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
            first_k_dense_replace=1, rope_scaling=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        ),
        15_706_484_224, 2.66e9,
    ),
    "DeepSeek-V3": (
        dict(
            DEEPSEEK, architectures=["DeepseekV3ForCausalLM"], vocab_size=129280, hidden_size=7168,
            num_hidden_layers=61, num_attention_heads=128, q_lora_rank=1536, intermediate_size=18432,
            moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, n_group=8,
            topk_group=4, first_k_dense_replace=3, routed_scaling_factor=2.5,
            rope_scaling=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        ),
        671_026_419_200, 37.6e9,
    ),
    "GLM-4.5-Air": (
        dict(
            GLM, hidden_size=4096, num_hidden_layers=46, intermediate_size=10944, moe_intermediate_size=1408,
            n_routed_experts=128, first_k_dense_replace=1, use_qk_norm=False,
        ),
        106_852_251_264, None,
    ),
    "GLM-4.5": (
        dict(
            GLM, hidden_size=5120, num_hidden_layers=92, intermediate_size=12288, moe_intermediate_size=1536,
            n_routed_experts=160, first_k_dense_replace=3, use_qk_norm=True, routed_scaling_factor=2.5,
        ),
        352_797_829_024, None,
    ),
    "FlexOlmo-7x7B": (
        dict(
            architectures=["FlexOlmoForCausalLM"], vocab_size=100352, hidden_size=4096, intermediate_size=11008,
            num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, num_experts=7, num_experts_per_tok=5,
        ),
        33_270_665_216, 24.6e9,
    ),
    "DBRX": (
        dict(
            architectures=["DbrxForCausalLM"], vocab_size=100352, d_model=6144, n_heads=48, n_layers=40,
            max_seq_len=32768, attn_config=dict(clip_qkv=8, kv_n_heads=8, rope_theta=500000),
            ffn_config=dict(ffn_hidden_size=10752, moe_num_experts=16, moe_top_k=4, moe_loss_weight=0.05),
        ),
        131_596_523_520, 36.5e9,
    ),
    "Hunyuan-A13B": (
        dict(
            architectures=["HunYuanMoEV1ForCausalLM"], vocab_size=128167, hidden_size=4096, intermediate_size=3072,
            moe_intermediate_size=[3072] * 32, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
            head_dim=128, num_experts=64, moe_topk=[8] * 32, num_shared_expert=[1] * 32, rms_norm_eps=1e-5,
            rope_theta=10000.0, rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
            tie_word_embeddings=True, use_qk_norm=True, use_cla=False,
        ),
        80_393_183_232, 12.75e9,
    ),
    "Trinity-Mini": (
        dict(
            architectures=["AfmoeForCausalLM"], vocab_size=200192, hidden_size=2048, intermediate_size=6144,
            moe_intermediate_size=1024, num_hidden_layers=32, num_dense_layers=2, num_attention_heads=32,
            num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, num_shared_experts=1,
            route_scale=2.826, global_attn_every_n_layers=4, sliding_window=2048, mup_enabled=True,
        ),
        26_123_974_400, 3.475e9,
    ),
    "K-EXAONE-236B": (
        dict(
            architectures=["ExaoneMoEForCausalLM"], vocab_size=153600, hidden_size=6144, intermediate_size=18432,
            moe_intermediate_size=2048, num_hidden_layers=48, num_attention_heads=64, num_key_value_heads=8,
            head_dim=128, num_experts=128, num_experts_per_tok=8, num_shared_experts=1, first_k_dense_replace=1,
            sliding_window=128, sliding_window_pattern="LLLG", rope_theta=1e6,
        ),
        236_571_156_352, 23.67e9,
    ),
    "Ling-lite-1.5": (
        dict(
            architectures=["BailingMoeForCausalLM"], vocab_size=126464, hidden_size=2048, intermediate_size=5632,
            moe_intermediate_size=1408, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=4,
            head_dim=128, num_experts=64, num_experts_per_tok=6, num_shared_experts=2, norm_topk_prob=True,
            rope_theta=600000,
        ),
        16_801_974_272, 2.753e9,
    ),
    "Ling-mini-2.0": (
        dict(
            architectures=["BailingMoeV2ForCausalLM"], vocab_size=157184, hidden_size=2048, intermediate_size=5120,
            moe_intermediate_size=512, num_hidden_layers=20, num_attention_heads=16, num_key_value_heads=4,
            head_dim=128, num_experts=256, num_experts_per_tok=8, num_shared_experts=1, first_k_dense_replace=1,
            n_group=8, topk_group=4, routed_scaling_factor=2.5, partial_rotary_factor=0.5, rope_theta=600000,
            use_qk_norm=True,
        ),
        16_255_643_392, 1.433e9,
    ),
    "deepseek-moe-16b-base": (
        dict(
            architectures=["DeepseekForCausalLM"], model_type="deepseek", vocab_size=102400, hidden_size=2048,
            intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=16, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
            first_k_dense_replace=1, moe_layer_freq=1, norm_topk_prob=False, scoring_func="softmax",
            aux_loss_alpha=0.001, seq_aux=True, attention_bias=False, rope_theta=10000, rope_scaling=None,
        ),
        16_375_728_128, 2.83e9,
    ),
    "openmoe-base": (
        dict(
            OPENMOE, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, head_dim=64,
            num_experts=16, moe_layer_interval=4,
        ),
        799_663_104, 0.535e9,
    ),
    "openmoe-8b": (
        dict(OPENMOE, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, moe_layer_interval=6),
        11_855_046_656, 3.80e9,
    ),
    "openmoe-34b": (
        dict(OPENMOE, hidden_size=3072, intermediate_size=12288, num_hidden_layers=32, moe_layer_interval=4),
        46_270_737_408, 10.03e9,
    ),
    "Llama-4-Scout, text": (
        dict(
            architectures=["Llama4ForCausalLM"], vocab_size=202048, hidden_size=5120, intermediate_size=8192,
            intermediate_size_mlp=16384, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8,
            head_dim=128, num_local_experts=16, num_experts_per_tok=1, interleave_moe_layer_step=1,
            no_rope_layer_interval=4, attention_chunk_size=8192, attn_scale=0.1, floor_scale=8192,
            rope_scaling={
                "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        107_769_861_120, 17.2e9,
    ),
    "LongCat-Flash": (
        dict(
            architectures=["LongcatFlashForCausalLM"], vocab_size=131072, hidden_size=6144, num_layers=28,
            num_attention_heads=64, ffn_hidden_size=12288, expert_ffn_hidden_size=2048, n_routed_experts=512,
            zero_expert_num=256, zero_expert_type="identity", moe_topk=12, q_lora_rank=1536, kv_lora_rank=512,
            qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, routed_scaling_factor=6.0,
            rope_theta=10000000.0,
        ),
        560_664_980_480, None,
    ),
    "JetMoE-8B": (
        dict(
            architectures=["JetMoeForCausalLM"], vocab_size=32000, hidden_size=2048, num_hidden_layers=24,
            num_key_value_heads=16, kv_channels=128, intermediate_size=5632, num_local_experts=8,
            num_experts_per_tok=2, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True,
        ),
        8_522_237_952, 2.33e9,
    ),
    "Qwen3-Next-80B-A3B": (
        dict(
            architectures=["Qwen3NextForCausalLM"], vocab_size=151936, hidden_size=2048, num_hidden_layers=48,
            num_attention_heads=16, num_key_value_heads=2, head_dim=256, intermediate_size=5120,
            moe_intermediate_size=512, shared_expert_intermediate_size=512, num_experts=512, num_experts_per_tok=10,
            norm_topk_prob=True, full_attention_interval=4, partial_rotary_factor=0.25, rope_theta=1e7,
            linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_value_head_dim=128, linear_num_key_heads=16,
            linear_num_value_heads=32,
        ),
        79_674_391_296, None,
    ),
    "Granite-4.0-H-Tiny": (
        dict(
            GRANITE4, hidden_size=1536, intermediate_size=512, shared_intermediate_size=1024, num_attention_heads=12,
            num_key_value_heads=4, num_local_experts=64, num_experts_per_tok=6, mamba_n_heads=48,
        ),
        6_939_037_248, None,
    ),
    "Granite-4.0-H-Small": (
        dict(
            GRANITE4, hidden_size=4096, intermediate_size=768, shared_intermediate_size=1536, num_attention_heads=32,
            num_key_value_heads=8, num_local_experts=72, num_experts_per_tok=10, mamba_n_heads=128,
        ),
        32_207_337_984, None,
    ),
    "Nemotron-3-Nano-30B-A3B": (
        dict(
            architectures=["NemotronHForCausalLM"], vocab_size=131072, hidden_size=2688, intermediate_size=1856,
            moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712, n_routed_experts=128,
            num_experts_per_tok=6, routed_scaling_factor=2.5, num_attention_heads=32, num_key_value_heads=2,
            head_dim=128, mamba_num_heads=64, mamba_head_dim=64, n_groups=8, ssm_state_size=128, num_hidden_layers=52,
            hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        ),
        31_577_940_288, None,
    ),
    "Jamba-v0.1": (
        dict(
            architectures=["JambaForCausalLM"], vocab_size=65536, hidden_size=4096, intermediate_size=14336,
            num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, num_experts=16, num_experts_per_tok=2,
            attn_layer_period=8, attn_layer_offset=4, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=16,
            mamba_dt_rank=256,
        ),
        51_570_323_328, 12.1e9,
    ),
    "LFM2-8B-A1B": (
        dict(
            architectures=["Lfm2MoeForCausalLM"], vocab_size=65536, hidden_size=2048, intermediate_size=7168,
            moe_intermediate_size=1792, num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=8,
            num_experts=32, num_experts_per_tok=4, num_dense_layers=2,
            layer_types=["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)],
        ),
        8_339_930_560, None,
    ),
    "Kimi-Linear-48B-A3B": (
        dict(
            architectures=["KimiLinearForCausalLM"], vocab_size=163840, hidden_size=2304, intermediate_size=9216,
            moe_intermediate_size=1024, num_hidden_layers=27, num_attention_heads=32, kv_lora_rank=512,
            qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=None, num_experts=256,
            num_experts_per_token=8, num_shared_experts=1, first_k_dense_replace=1, moe_renormalize=True,
            mla_use_nope=True,
            linear_attn_config={
                "full_attn_layers": [4, 8, 12, 16, 20, 24, 27], "head_dim": 128, "num_heads": 32,
                "kda_layers": [i for i in range(1, 27) if i % 4], "short_conv_kernel_size": 4,
            },
        ),
        49_122_681_728, None,
    ),
    "MiniMax-Text-01": (
        dict(
            architectures=["MiniMaxForCausalLM"], vocab_size=200064, hidden_size=6144, intermediate_size=9216,
            num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, head_dim=128, num_local_experts=32,
            num_experts_per_tok=2, rotary_dim=64, rope_theta=1e7,
            layer_types=["full_attention" if i % 8 == 7 else "linear_attention" for i in range(80)],
            **{f"{part}_alpha_factor": 3.5565588200778455 for part in ("full_attn", "linear_attn", "mlp")},
        ),
        456_089_655_296, None,
    ),
    "MiniMax-M2": (
        dict(
            architectures=["MiniMaxM2ForCausalLM"], vocab_size=200064, hidden_size=3072, num_hidden_layers=62,
            num_attention_heads=48, num_key_value_heads=8, head_dim=128, intermediate_size=1536, num_local_experts=256,
            num_experts_per_tok=8, rotary_dim=64, rope_theta=5e6,
        ),
        228_689_764_864, None,
    ),
    "Switch-base-8": (
        dict(
            architectures=["SwitchTransformersForConditionalGeneration"], vocab_size=32128, d_model=768, d_ff=3072,
            d_kv=64, num_heads=12, num_layers=12, num_decoder_layers=12, num_sparse_encoder_layers=6,
            num_sparse_decoder_layers=6, encoder_sparse_step=2, decoder_sparse_step=2, num_experts=8,
            expert_capacity=64, decoder_start_token_id=0,
        ),
        619_339_008, None,
    ),
    "NLLB-MoE-54B": (
        dict(
            architectures=["NllbMoeForConditionalGeneration"], vocab_size=256206, d_model=2048, encoder_layers=24,
            decoder_layers=24, encoder_ffn_dim=8192, decoder_ffn_dim=8192, encoder_attention_heads=16,
            decoder_attention_heads=16, encoder_sparse_step=4, decoder_sparse_step=4, num_experts=128,
            expert_capacity=64, moe_token_dropout=0.2, pad_token_id=1,
        ),
        54_500_569_088, None,
    ),
}  # fmt: skip
