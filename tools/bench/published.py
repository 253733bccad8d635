"""Training runs that others have published, with the layouts they chose: what a plan is held against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moe_dist.config import Config, load_config

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "moe_intermediate_size")


def _model(*sizes: int, **more: Any) -> dict[str, Any]:
    return dict(zip(_SIZES, sizes, strict=True)) | {"max_position_embeddings": 40960} | more


DEEPSEEK_V3 = _model(
    *(129280, 7168, 61, 128, 2048),
    intermediate_size=18432,
    num_experts=256,
    num_experts_per_tok=8,
    mlp_only_layers=[0, 1, 2],
    shared_expert_intermediate_size=2048,
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_norm=False,
    scoring_func="sigmoid",
    n_group=8,
    topk_group=4,
)
GPT_OSS_120B = _model(
    *(201088, 2880, 36, 64, 2880),
    num_key_value_heads=8,
    head_dim=64,
    num_experts=128,
    num_experts_per_tok=4,
    qk_norm=False,
    attention_bias=True,
    attention_sinks=True,
    router_bias=True,
    expert="swiglu_clamped",
    sliding_window=128,
    layer_types=["sliding_attention", "full_attention"] * 18,
)


def _of(name: str) -> dict[str, Any]:
    return load_config(f"configs/{name}.yaml").model.model_dump()


MODELS = {
    "DeepSeek-V3": DEEPSEEK_V3,
    "gpt-oss-120b": GPT_OSS_120B,
    "Qwen3-30B-A3B": _of("qwen3_30b_a3b"),
    "Qwen3-235B-A22B": _of("qwen3_235b_a22b"),
    "Mixtral-8x7B": _of("mixtral_8x7b"),
}

BRIDGE = "Megatron Bridge, performance summary, container 25.11"
NEMO = "NeMo Framework, performance summary, container 25.02"
TITAN = "torchtitan, NousResearch/torchtitan pull request 19 (DeepEP)"
DEEPSEEK = "DeepSeek-V3 technical report, arXiv 2412.19437, sections 1 and 3.2"


@dataclass(frozen=True)
class Published:
    """A run as it was published. `rate`: tokens per second of one device."""

    source: str
    model: str
    device: str
    devices: int
    precision: str
    sequences: int
    micro_batch: int
    rate: float
    ep: int
    pp: int = 1
    virtual: int = 1
    zero: int = 1
    schedule: str = ""
    cluster: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Config:
        """As a run file: the published layout, precision as far as this project has it."""
        schedule = self.schedule or ("interleaved_1f1b" if self.virtual > 1 else "1f1b")
        per_replica = self.sequences * self.pp // self.devices
        return Config.model_validate(
            {
                "model": MODELS[self.model],
                "data": {"max_seq_length": 4096, "document_mask": False},
                "parallel": {
                    "ep_size": self.ep,
                    "pp_size": self.pp,
                    "zero_stage": self.zero,
                    "schedule": schedule,
                    "stages": self._stages(),
                },
                "train": {
                    **({"bf16": True} if schedule in ("dualpipe_v", "zero_bubble") else {"pure_bf16": True}),
                    "per_device_train_batch_size": self.micro_batch,
                    "gradient_accumulation_steps": per_replica // self.micro_batch,
                },
            }
        )

    def _stages(self) -> list[int] | None:
        layers = MODELS[self.model]["num_hidden_layers"]
        count = self.pp * self.virtual
        if self.virtual <= 2:
            return None
        return [(layers * (i + 1)) // count - (layers * i) // count for i in range(count)]


# 2.664 million hours for 14.8 T tokens on 2,048 H800, whose NVLink has 160 GB/s each way (arXiv 2505.09343, section 4).
_H800 = {"link_bandwidth": 160e9}
RUNS = [
    Published(
        *(DEEPSEEK, "DeepSeek-V3", "h100", 2048, "FP8", 15360, 1, 1543.0, 64, 16),
        schedule="dualpipe_v",
        cluster=_H800,
    ),
    Published(BRIDGE, "Qwen3-30B-A3B", "h100", 16, "FP8", 512, 2, 5275.0, 8, 2, 24),
    Published(BRIDGE, "gpt-oss-120b", "h100", 64, "BF16", 512, 4, 5630.0, 8, 4),
    Published(BRIDGE, "Qwen3-30B-A3B", "b200", 8, "MXFP8", 512, 1, 9299.0, 8),
    Published(BRIDGE, "Qwen3-235B-A22B", "b200", 64, "MXFP8", 1024, 1, 3269.0, 8, 8, 2),
    Published(BRIDGE, "DeepSeek-V3", "b200", 256, "MXFP8", 2048, 1, 2139.0, 8, 16),
    Published(BRIDGE, "gpt-oss-120b", "b200", 64, "BF16", 512, 4, 8213.0, 8),
    Published(NEMO, "Mixtral-8x7B", "b200", 64, "FP8", 256, 2, 15457.0, 8),
    Published(TITAN, "Qwen3-30B-A3B", "b200", 8, "BF16", 64, 8, 14796.0, 8, zero=3),
    Published(TITAN, "Qwen3-30B-A3B", "b200", 128, "BF16", 1024, 8, 13856.0, 8, zero=3),
]
