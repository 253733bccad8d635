"""From a YAML file and a few overrides to a `Config`, with one clear line for everything that is wrong.

The way through: `yaml_text` (text to plain values) -> `names` (other people's spellings, every key to its
one full name `section.key`) -> `reading` (base files, `huggingface`, overrides, in the order in which they
win) -> pydantic: `sections/` (types, ranges, what fits in a section), `checks` (what sections must agree on), whose
errors `reading` puts in one line. `tree` is the whole, `loading` the way in from outside, `writing` the way back.
There are two levels, and a third in a group such as `monitor.prometheus`, so merging happens on a flat dict of full
names. No torch in here.
"""

from moe_dist.config.huggingface import read_huggingface
from moe_dist.config.loading import load_config, load_mapping
from moe_dist.config.names import ALIASES, FIELDS, HOMES, SECTIONS
from moe_dist.config.sections.base import Section
from moe_dist.config.sections.data import DataConfig
from moe_dist.config.sections.lora import LoraConfig
from moe_dist.config.sections.model import ModelConfig
from moe_dist.config.sections.running import (
    CheckpointConfig,
    LaunchConfig,
    MonitorConfig,
    ParallelConfig,
    PrometheusConfig,
)
from moe_dist.config.sections.training import BalanceConfig, OptimizerConfig, TrainConfig
from moe_dist.config.tree import Config
from moe_dist.config.wording import ConfigError, allowed, show
from moe_dist.config.writing import config_difference, config_reference, dump_config, flatten
from moe_dist.config.yaml_text import parse_yaml, read_yaml

__all__ = [
    "ALIASES",
    "FIELDS",
    "HOMES",
    "SECTIONS",
    "BalanceConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "LaunchConfig",
    "LoraConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrometheusConfig",
    "Section",
    "TrainConfig",
    "allowed",
    "config_difference",
    "config_reference",
    "dump_config",
    "flatten",
    "load_config",
    "load_mapping",
    "parse_yaml",
    "read_huggingface",
    "read_yaml",
    "show",
]
