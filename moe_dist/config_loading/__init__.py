"""From a YAML file and a few overrides to a `Config`, with one clear line for everything that is wrong.

The way through: `yaml_text` (text to plain values) -> `names` (other people's spellings, every key to its
one full name `section.key`) -> `loading` (base files, `huggingface`, overrides, in the order in which they
win) -> pydantic (types, ranges, combinations), whose errors `loading` puts in one line. `writing` is the way
back. There are two levels, and a third in a group such as `monitor.prometheus`, so merging happens on a flat dict of
full names. No torch in here.
"""

from moe_dist.config_loading.huggingface import read_huggingface
from moe_dist.config_loading.loading import load_config, load_mapping
from moe_dist.config_loading.names import ALIASES, FIELDS, HOMES, SECTIONS
from moe_dist.config_loading.wording import ConfigError, allowed, show
from moe_dist.config_loading.writing import config_difference, config_reference, dump_config, flatten
from moe_dist.config_loading.yaml_text import parse_yaml, read_yaml

__all__ = [
    "ALIASES",
    "FIELDS",
    "HOMES",
    "SECTIONS",
    "ConfigError",
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
