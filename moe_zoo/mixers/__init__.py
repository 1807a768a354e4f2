"""What mixes tokens over the sequence, each with its own cache: softmax attention, or a state that is carried along."""

from moe_zoo.core.registry import Registry

MIXERS = Registry(
    "mixer",
    {
        "attention": "moe_zoo.mixers.mixer:SoftmaxAttention",
        "none": "moe_zoo.mixers.mixer:NoMixer",
        "mamba": "moe_zoo.mixers.mamba:Mamba",
        "mamba2": "moe_zoo.mixers.mamba2:Mamba2",
        "lightning": "moe_zoo.mixers.lightning:Lightning",
        "short_conv": "moe_zoo.mixers.short_conv:ShortConv",
        "kimi_delta": "moe_zoo.mixers.kimi_delta:KimiDelta",
        "routed_attention": "moe_zoo.mixers.routed_attention:RoutedAttention",
        "gated_delta_net": "moe_zoo.mixers.gated_delta_net:GatedDeltaNet",
    },
    base="moe_zoo.mixers.mixer:Mixer",
)
