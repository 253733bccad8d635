"""What to change, from the values that the run has: never a value below the one that is set. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


class Advice:
    """The run's own configuration, and sentences about changing it. Without one, sentences name the key alone."""

    def __init__(self, config_text: str = "") -> None:
        """`config_text`: the resolved configuration as YAML."""
        loaded = yaml.safe_load(config_text)
        self._settings: Mapping[str, Any] = loaded if isinstance(loaded, Mapping) else {}

    def value(self, key: str) -> Any:
        """What is set for a full key, such as `balance.act`; None when it is not known."""
        section, _, name = key.rpartition(".")
        found: Any = self._settings
        for part in section.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found.get(name) if isinstance(found, Mapping) else None

    def change(self, key: str, factor: float, start: float | None = None) -> str:
        """`raise KEY from 0.01 to 0.02`; `set KEY (START)` when it is zero; without numbers when it is not known."""
        verb, value = "raise" if factor > 1 else "lower", self.value(key)
        if start is not None and not value:
            return f"set {key} ({start:g})"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value:
            return f"{verb} {key}"
        goal = value * factor
        return f"{verb} {key} from {value:g} to {max(1, round(goal)) if isinstance(value, int) else goal:g}"

    @property
    def learning_rate(self) -> str:
        return self.change("optimizer.learning_rate", 0.5)

    @property
    def warm_up(self) -> str:
        for key in ("optimizer.warmup_steps", "optimizer.warmup_ratio"):
            if self.value(key):
                return self.change(key, 2.0)
        return "lengthen the warm-up (optimizer.warmup_steps)"

    @property
    def balance(self) -> tuple[str, str]:
        """The key that balances load, and the sentence."""
        auxiliary, bias = "balance.router_aux_loss_coef", "balance.bias_update_rate"
        moved = self.change(bias, 2.0, 1e-3)
        if self.value("balance.freeze_router"):
            return bias, f"the router is frozen (balance.freeze_router): {moved}"
        if self.value("balance.use_auxiliary_loss") is False:
            return bias, f"{moved}, or balance.use_auxiliary_loss"
        if self.value(auxiliary) is None:  # a configuration that is not known
            return auxiliary, f"raise {auxiliary}, or set {bias} (1e-3)"
        return auxiliary, f"{self.change(auxiliary, 2.0, 0.01)}, or {moved}"

    @property
    def workers(self) -> str:
        workers = self.value("data.dataloader_num_workers")
        goal = f" from {workers} to {max(2, 2 * workers)}" if isinstance(workers, int) else ""
        return f"raise data.dataloader_num_workers{goal}"

    @property
    def bigger_work(self) -> str:
        half = self.value("train.bf16") or self.value("train.pure_bf16")
        return self.change("train.per_device_train_batch_size", 2.0) + ("" if half else ", use train.bf16")

    @property
    def less_traffic(self) -> str:
        ep_size = self.value("parallel.ep_size")
        fewer = self.change("parallel.ep_size", 0.5) + ", " if ep_size != 1 else ""
        batch = self.change("train.per_device_train_batch_size", 2.0)
        return f"{fewer}keep parallel.ep_size inside a host, or {batch}"

    @property
    def saving(self) -> tuple[str, str]:
        background = self.value("checkpoint.background")
        rarer = self.change("checkpoint.save_steps", 2.0)
        if background:
            return "checkpoint.save_steps", f"{rarer}, or write to a faster disk"
        return "checkpoint.background", f"set checkpoint.background, {rarer}, or write to a faster disk"

    @property
    def stopping(self) -> str:
        patience = self.value("train.early_stopping_patience")
        if patience:
            return f"train.early_stopping_patience={patience} stops it; go back to the best checkpoint, or more data"
        return "stop earlier (train.early_stopping_patience), or train on more data"

    def warm_up_steps(self, max_steps: int | None) -> float:
        """Steps of the warm-up."""
        ratio = self.value("optimizer.warmup_ratio") or 0.0
        return float(self.value("optimizer.warmup_steps") or ratio * (max_steps or 0))
