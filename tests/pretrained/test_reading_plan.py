"""Who reads what of a folder, at the sizes of published models: from headers alone, without a byte of weights."""

from __future__ import annotations

import json
import re
import struct
import time
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
from command_line import Say
from folders import EVERY, random_weights, write_folder

from moe_dist.config import Config, load_mapping
from moe_dist.config.huggingface import model_of, read_huggingface
from moe_dist.models.counts import parameter_counts
from moe_dist.models.tensor_names import Names
from moe_dist.parallel.layout import Layout
from moe_dist.pretrained.reading_plan import reading_plan
from moe_dist.pretrained.source import SliceReader, read_folder

_QWEN3 = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 48,
}
_MIXTRAL = {
    "model_type": "mixtral",
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1e6,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32000,
}
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "Qwen3-30B-A3B": (
        {
            **_QWEN3,
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
        },
        30.53,
    ),
    "Qwen3-235B-A22B": (
        {
            **_QWEN3,
            "hidden_size": 4096,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
        },
        235.09,
    ),
    "Mixtral-8x7B": (
        {
            **_MIXTRAL,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 14336,
        },
        46.70,
    ),
    "Mixtral-8x22B": (
        {
            **_MIXTRAL,
            "hidden_size": 6144,
            "num_hidden_layers": 56,
            "num_attention_heads": 48,
            "intermediate_size": 16384,
        },
        140.62,
    ),
    "OLMoE-1B-7B": (
        {
            "model_type": "olmoe",
            "vocab_size": 50304,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "clip_qkv": None,
        },
        6.92,
    ),
    "DeepSeek-V3": (
        {
            "model_type": "deepseek_v3",
            "vocab_size": 129280,
            "hidden_size": 7168,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "n_group": 8,
            "topk_group": 4,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "routed_scaling_factor": 2.5,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
            "max_position_embeddings": 163840,
            "rope_theta": 10000,
            "num_nextn_predict_layers": 1,
            "ep_size": 1,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
        671.03,
    ),
    "GLM-4.5": (
        {
            "model_type": "glm4_moe",
            "vocab_size": 151552,
            "hidden_size": 5120,
            "num_hidden_layers": 92,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": True,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
            "rope_theta": 1000000,
            "max_position_embeddings": 131072,
            "rope_scaling": None,
            "num_nextn_predict_layers": 1,
        },
        352.80,
    ),
}
BYTES = 2
SHARD = 5 * 10**9


def write_headers(folder: Path, values: dict[str, Any]) -> Path:
    """The folder as it is published, in bf16 and files of 5 GB; what would be weights are holes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    names = Names(model_of(read_huggingface(folder / "config.json", "a test")))
    files: list[dict[str, Any]] = [{}]
    size = 0
    for name, part in names.parts().items():
        num_bytes = BYTES * prod(part.shape)
        if size and size + num_bytes > SHARD:
            files.append({})
            size = 0
        files[-1][name] = {"dtype": "BF16", "shape": list(part.shape), "data_offsets": [size, size + num_bytes]}
        size += num_bytes
    index = {}
    for number, header in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        text = json.dumps(header).encode()
        end = max(entry["data_offsets"][1] for entry in header.values())
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
        index |= dict.fromkeys(header, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def config_of(folder: Path, **parallel: int) -> Config:
    tree = {"model": {"from_pretrained": str(folder)}, "parallel": parallel}
    tree["train"] = {"gradient_accumulation_steps": 4}  # a pipeline needs them
    return load_mapping(tree, notice=lambda text: None)


@pytest.mark.parametrize(
    "name",
    # Folders of 30,000 tensors and more are read once in the fast tests, by the next one.
    [pytest.param(name, marks=[pytest.mark.slow] * (billions > 200)) for name, (_, billions) in PUBLISHED.items()],
)
def test_published_sizes(name: str, tmp_path: Path) -> None:
    """Every tensor is read, experts by one rank of each group and all else by all; the bytes fall as 1 / ep."""
    values, billions = PUBLISHED[name]
    folder = write_headers(tmp_path / "hf", values)
    config = config_of(folder)
    counts = parameter_counts(config.model)
    assert counts.total / 1e9 == pytest.approx(billions, abs=0.006)
    biases = sum(part.ours.endswith("bias_E") for part in Names(config.model).parts().values())
    whole = BYTES * (counts.total + biases * config.model.num_experts)
    (alone,) = reading_plan(config, Layout.of(config, 1))
    assert alone.num_bytes == whole
    assert alone.num_tensors == len(read_folder(folder, config.model).tensors)
    split = config_of(folder, ep_size=8, pp_size=4)
    plan = reading_plan(split, Layout.of(split, 64))
    assert sorted(rank for reading in plan for rank in reading.ranks) == list(range(64))
    experts = BYTES * counts.experts
    assert sum(reading.num_bytes for reading in plan) == 8 * (whole - experts) + experts
    for reading in plan:
        for ranges in reading.ranges.values():
            assert all(one[1] < other[0] for one, other in pairwise(ranges)), "not merged"


def test_check_says_which_rank_reads_what_of_235_billion_parameters(tmp_path: Path, say: Say) -> None:
    """Totals and byte ranges of every rank, and the same for programs. A bound on work, not on a clock: CPU time with
    much room."""
    folder = write_headers(tmp_path / "hf", PUBLISHED["Qwen3-235B-A22B"][0])
    (tmp_path / "run.yaml").write_text("train: {pure_bf16: true, gradient_accumulation_steps: 8}\n")
    keys = ("parallel.ep_size=8", "parallel.pp_size=4", "parallel.zero_stage=1", "launch.cluster=h200")
    words = ("check", tmp_path / "run.yaml", "--from-pretrained", folder, "--world-size", 64, *keys)
    began = time.process_time()
    said = say(*words)
    assert time.process_time() - began < 15  # 2 s where nothing else runs
    assert said.code == 0, said.err
    assert "every tensor is there, in the shape of this model" in said.out
    totals = re.findall(
        r"^  ranks ([\d, ]+) read ([\d.]+) GB: ([\d,]+) tensors of (\d+) files$", said.out, re.MULTILINE
    )
    assert sorted(int(rank) for ranks, *_ in totals for rank in ranks.split(", ")) == list(range(64))
    assert len(re.findall(r"(?m)^    model-\d{5}-of-\d{5}\.safetensors  .* bytes \d+-\d+", said.out)) >= 32
    told = json.loads(say(*words, "--json").out)["from_pretrained"]
    for (_, gigabytes, tensors, files), reading in zip(totals, told, strict=True):
        bytes_read = sum(end - start for ranges in reading["ranges"].values() for start, end in ranges)
        assert bytes_read / 1e9 == pytest.approx(float(gigabytes), rel=0.01)
        assert (tensors.replace(",", ""), files) == (str(reading["num_tensors"]), str(len(reading["ranges"])))


def test_ranges_are_where_the_values_lie(tmp_path: Path) -> None:
    """What the plan says, against what safetensors reads, matrices and stacks."""
    config = EVERY["qwen3_moe-0"]
    for fused in (False, True):
        weights = random_weights(config, fused=fused)
        folder = write_folder(tmp_path / f"hf{fused}", config, weights, 3)
        run = config_of(folder, ep_size=2)
        for reading in reading_plan(run, Layout.of(run, 2)):
            first = 3 * reading.ranks[0]
            mine = b"".join(
                (folder / file).read_bytes()[start:end]
                for file, ranges in reading.ranges.items()
                for start, end in ranges
            )
            assert len(mine) == reading.num_bytes
            for name, tensor in weights.items():
                if fused and ".experts." in name:
                    assert tensor[first : first + 3].numpy().tobytes() in mine
                    assert tensor[:6].numpy().tobytes() not in mine
                elif ".experts." in name:
                    is_mine = int(name.split(".")[5]) // 3 == reading.ranks[0]
                    assert (tensor.numpy().tobytes() in mine) == is_mine
                else:
                    assert tensor.numpy().tobytes() in mine
    entry = read_folder(folder, config).tensors["model.layers.1.mlp.experts.down_proj"]
    assert SliceReader(folder).read(entry, 2, 3).equal(weights[entry.name][2:5])


def test_a_wrong_folder_is_named(tmp_path: Path) -> None:
    config = EVERY["qwen3_moe-0"]
    weights = random_weights(config)
    del weights["model.layers.1.mlp.experts.4.up_proj.weight"]
    run = config_of(write_folder(tmp_path / "hf", config, weights))
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts.4.up_proj.weight: missing"):
        reading_plan(run, Layout.of(run, 1))
