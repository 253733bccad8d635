"""The sections of a run file: every key a person can write is a field, with its meaning beside it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moe_dist.config.sections.base import Section
from moe_dist.config.sections.data import DataConfig
from moe_dist.config.sections.dpo import DpoConfig
from moe_dist.config.sections.lora import LoraConfig
from moe_dist.config.sections.model import ModelConfig
from moe_dist.config.sections.running import (
    CheckpointConfig,
    LaunchConfig,
    MonitorConfig,
    ParallelConfig,
)
from moe_dist.config.sections.training import BalanceConfig, OptimizerConfig, TrainConfig


class Sections(Section):
    """All sections, each valid by itself: what `Config` makes a run of."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    balance: BalanceConfig = Field(default_factory=BalanceConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    dpo: DpoConfig = Field(default_factory=DpoConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    launch: LaunchConfig = Field(default_factory=LaunchConfig)

    def global_batch_size(self, world_size: int) -> int:
        """Sequences in one optimizer step on `world_size` ranks."""
        dp_size = world_size // self.parallel.pp_size
        return self.train.per_device_train_batch_size * self.train.gradient_accumulation_steps * dp_size

    @property
    def learns_preferences(self) -> bool:
        """Whether section `dpo` says what is trained."""
        return self.data.format == "preference"

    @property
    def rows_per_sample(self) -> int:
        """Rows of data.max_seq_length tokens in a sample: of preferences one for each answer."""
        return 2 if self.learns_preferences else 1

    @property
    def dpo_reference(self) -> Literal["base", "start"]:
        """What `dpo.reference` means in this run."""
        if self.dpo.reference != "auto":
            return self.dpo.reference
        return "base" if self.lora.r and self.lora.from_adapter is None else "start"

    @property
    def num_evaluated(self) -> int | None:
        """Samples of an evaluation at most, over all ranks; None: the whole validation set."""
        train = self.train
        size = train.per_device_eval_batch_size or train.per_device_train_batch_size
        return None if train.eval_batches is None else train.eval_batches * size
