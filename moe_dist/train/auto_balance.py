"""Automatic balancing: what the policy of `monitor/actions.py` decides, done on every rank at the same step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moe_dist.config import Config
from moe_dist.monitor.health.actions import Policy, levers
from moe_dist.monitor.records import ActionRecord, LayerRecord, TrainRecord
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.balance import Balancer
from moe_dist.train.callbacks import Callback, RunState


class AutoBalance(Callback):
    """Raises balancing where a layer is in trouble and takes it back when it is well (`balance.act`).

    Rank 0 decides and all ranks do it before the next step, so they cannot differ; nothing is asked when it is off.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        balancer: Balancer,
        pending: Callable[[], dict[int, list[int]]],
        report: Callable[[list[ActionRecord]], None],
    ) -> None:
        """`pending` gives the global pairs by layer and expert since the last logged line (collective); `report` is
        called with what has been changed.
        """
        self.mesh, self.balancer, self.pending, self.report = mesh, balancer, pending, report
        self.interval = config.monitor.logging_steps
        balance, model = config.balance, config.model
        self.policy: Policy | None = None
        if balance.act != "off" and model.moe_layers:
            applies = balance.act == "on"
            cooldown, top_k = balance.act_cooldown, model.num_experts_per_tok
            self.policy = Policy(levers(balance), model.moe_layers, top_k, cooldown, applies)

    def on_log(self, run: RunState, record: TrainRecord) -> None:
        """Decide by what the interval was like."""
        self.report(self.observe(run.step, record.layers))

    def observe(self, step: int, layers: Sequence[LayerRecord]) -> list[ActionRecord]:
        """A line has been logged after `step`, with these layers: what has been changed (collective).

        Lines come early too, at the first step and when a run is stopped; only whole intervals decide, so that a run
        that was stopped goes on as if it had not been.
        """
        if self.policy is None:
            return []
        policy = self.policy
        policy.add({record.layer: record.tokens_per_expert for record in layers})
        if step % self.interval:
            return []
        actions, state = self.mesh.ask_rank_zero(lambda: (policy.decide(step), policy.state_dict()))
        policy.load_state_dict(state)
        self._apply()
        return actions

    def _apply(self) -> None:
        """Set what the layers of this rank balance by."""
        if self.policy is None or not self.policy.apply:
            return
        for layer, moe in self.balancer.layers.items():
            values = self.policy.values(layer)
            self.balancer.rates[layer] = values.get("bias_update_rate", self.balancer.rates[layer])
            if "router_aux_loss_coef" in values:
                moe.balance.set_aux_coef(values["router_aux_loss_coef"])

    def state_dict(self) -> dict[str, Any] | None:
        """For a checkpoint, with what the interval has counted so far (collective); None when nothing acts."""
        if self.policy is None:
            return None
        saved = self.policy.state_dict()
        for layer, counts in self.pending().items():
            before = saved[str(layer)]["pairs"] or [0] * len(counts)
            saved[str(layer)]["pairs"] = [old + new for old, new in zip(before, counts, strict=True)]
        return saved

    def load_state_dict(self, saved: dict[str, Any] | None) -> None:
        """Go on where `state_dict` was taken, in whatever layout."""
        if self.policy is not None and saved is not None:
            self.policy.load_state_dict(saved)
            self._apply()
