"""The DeepSpeed package as engine: ZeRO 1 and 2 shard gradients and optimizer state of our model over our groups.

DeepSpeed (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054) reduces gradients, holds one flat partition of
them and of the optimizer's state on each rank, updates it and gathers the weights. Routing, dispatch, the loss, the
global norm and clipping stay ours. Dense parameters are partitioned over dp, experts over edp.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.config import Config, ConfigError
from moe_dist.config.deepspeed import deepspeed_settings
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.engines.base import NamedState
from moe_dist.parallel.engines.optimizer import at_rest, torch_optimizer
from moe_dist.parallel.mesh import Mesh


class DeepSpeedEngine:
    """`Engine` of `parallel.engine: deepspeed`.

    Raises ConfigError where the package is missing, or with one process.
    """

    def __init__(self, model: Transformer, config: Config, mesh: Mesh) -> None:
        if mesh.sparse is None:
            raise ConfigError("parallel.engine=deepspeed: needs two ranks or more; allowed for one process: torch")
        deepspeed = import_deepspeed(mesh.device)
        self.model, self.mesh, self.stage = model, mesh, config.parallel.zero_stage
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.expert_names = model.expert_parameter_names() & self.parameters.keys()
        self.held: list[tuple[str, str, Tensor]] = []
        self.section = ExitStack()
        self._register_groups()
        groups = self._parameter_groups(model.decayed_names(), config.optimizer.weight_decay)
        self.engine, self.zero_optimizer, *_ = deepspeed.initialize(
            model=_Shell(model, has_experts=bool(self.expert_names)),
            optimizer=torch_optimizer(groups, config.optimizer),
            config=deepspeed_settings(config),
        )
        self._create_state()

    def _register_groups(self) -> None:
        """Our process groups under the names DeepSpeed looks for, so that it makes none of its own."""
        from deepspeed.utils import groups

        assert self.mesh.sparse is not None
        assert self.mesh.dense is not None
        self.group_name = f"ep_size_{self.mesh.layout.ep_size}"
        groups._WORLD_GROUP = self.mesh.dense.get_group("dp")  # one pipeline stage: the world is dp
        for axis, registered, ranks in (
            ("ep", groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_PARALLEL_GROUP_RANKS),
            ("edp", groups._EXPERT_DATA_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS),
        ):
            group = self.mesh.sparse.get_group(axis)
            registered.clear()
            ranks.clear()
            registered[self.group_name] = group
            ranks[self.group_name] = torch.distributed.get_process_group_ranks(group)

    def _parameter_groups(self, names: set[str], weight_decay: float) -> list[dict[str, Any]]:
        """Those with these names decay, the rest does not; experts in groups of their own, partitioned over edp."""
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

        names_of_experts = self.model.expert_parameter_names()
        for name, parameter in self.model.named_parameters():
            if name in names_of_experts:  # frozen ones too: DeepSpeed broadcasts all others from the first rank
                marked: Any = parameter
                marked.allreduce, marked.group_name = False, self.group_name
        decayed = [p for name, p in self.parameters.items() if name in names]
        others = [p for name, p in self.parameters.items() if name not in names]
        groups = [
            {"params": decayed, "weight_decay": weight_decay, "name": "decayed"},
            {"params": others, "weight_decay": 0.0, "name": "not decayed"},
        ]
        return [group for group in split(groups) if group["params"]]

    # --- gradients ---

    def zero_grad(self) -> None:
        """Forget gradients, also those of a step that was skipped."""
        zero = self.zero_optimizer
        zero.zero_grad(set_to_none=True)
        for index in range(len(zero.bit16_groups)):
            zero.averaged_gradients[index] = zero.all_grad_tensors[index] = None
        zero.micro_step_id = -1
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
            zero._offload_accumulated_param_ids.clear()

    def before_backward(self, is_last: bool) -> None:
        """Stage 1 reduces once, after the last micro-batch, in the order of parameters; stage 2 as gradients come."""
        if self.stage == 2:
            self.engine.set_gradient_accumulation_boundary(is_last)
        elif not self.engine.inside_no_sync_ctxt:
            self.section.enter_context(self.engine.coalesce_grad_reduction())

    def before_last_backward(self) -> None:
        """Not called: there are no pipelines here."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch. The loss is already divided by the tokens of the global batch."""
        self.engine.backward(self.engine(loss), scale_wrt_gas=False)

    def reduce(self) -> None:
        """Sum over replicas into this rank's partitions."""
        if self.stage == 1:
            for parameter in self.parameters.values():  # all ranks must reduce the same
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.section.close()

    @property
    def partitions(self) -> list[Tensor]:
        """This rank's parts of the reduced gradients; padding is zero."""
        zero = self.zero_optimizer
        if zero.cpu_offload:
            return [partition.grad for partition in zero.single_partition_of_fp32_groups]
        return [part for index in range(len(zero.bit16_groups)) for part in zero.averaged_gradients[index]]

    def norm(self) -> Tensor:
        """L2 norm over every logical parameter once, 0-dim float64, the same number on every rank.

        Partitions of dp and of edp x ep ranks hold every element exactly once.
        """
        squares = torch.stack(torch._foreach_norm(self.partitions)).double().square().sum()
        return self.mesh.sum_over("dp", squares.to(self.mesh.device)).sqrt()

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scale all gradients so that their global norm is at most `max_norm`."""
        parts = self.partitions
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).to(torch.float32)
        torch._foreach_mul_(parts, factor.to(parts[0].device))

    def gradients(self) -> dict[str, Tensor]:
        """Whole ones, gathered (collective)."""
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(parameter) for name, parameter in self.parameters.items()}

    # --- weights and optimizer state ---

    def held_parameters(self, every_name: bool = False) -> dict[str, nn.Parameter]:
        """All of this rank's part of the model: DeepSpeed's stages 1 and 2 keep weights whole."""
        return dict(self.model.named_parameters(remove_duplicate=not every_name))

    def held_bytes(self) -> None:
        """DeepSpeed has its own tensors, and shows gradients only within a step."""

    def step(self, rate: float) -> None:
        """Update this rank's partitions, then gather the weights."""
        for group in self.zero_optimizer.param_groups:
            group["lr"] = rate
        # Called once an optimizer step; DeepSpeed counts calls, and would update at every second one with two
        # accumulation steps.
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()

    @torch.no_grad()
    def _create_state(self) -> None:
        """The state of no step yet, as `LogicalOptimizer` has it."""
        zero = self.zero_optimizer
        kept = [partition.grad for partition in zero.single_partition_of_fp32_groups]
        for partition in zero.single_partition_of_fp32_groups:
            partition.grad = torch.zeros_like(partition)
        with at_rest(zero.optimizer):
            zero.optimizer.step()
        for partition, gradient in zip(zero.single_partition_of_fp32_groups, kept, strict=True):
            partition.grad = gradient

    def named_state(self) -> NamedState:
        """Copies, whole on every rank (collective); `state_loaded` puts them back."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self.held = []
        self._link_state()
        for name, parameter in self.parameters.items():
            flat, state = self._state_of(parameter)
            for key, value in state.items():
                whole = value.shape == flat.shape
                copy = safe_get_full_optimizer_state(parameter, key) if whole else value.clone()
                self.held.append((name, key, copy))
                yield name, key, [copy], False

    @torch.no_grad()
    def state_loaded(self) -> None:
        """After a checkpoint was read into the model's weights and `named_state`: take over both."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.zero_optimizer.refresh_fp32_params()
        for name, key, value in self.held:
            flat, state = self._state_of(self.parameters[name])
            if state[key].shape == flat.shape:
                safe_set_full_optimizer_state(self.parameters[name], value, key)
            else:
                state[key].copy_(value)
        self.held = []

    def _link_state(self) -> None:
        """Let DeepSpeed find each parameter's part of the state. It does so itself when only the first of several
        groups of parameters has been updated, and never again."""
        self.zero_optimizer._hp_optimizer_states_linked = False
        self.zero_optimizer._lazy_init_hp_params_optimizer_state()

    def _state_of(self, parameter: nn.Parameter) -> tuple[Tensor, dict[str, Tensor]]:
        """The flat partition a parameter's group has on this rank, and its state."""
        zero = self.zero_optimizer
        index = zero._get_param_group_idx(parameter)
        flat = zero.single_partition_of_fp32_groups[index]
        return flat, zero.optimizer.state[flat]


def _is_no_doubt_of_optimizers(record: logging.LogRecord) -> bool:
    return "ZeRO with an untested optimizer" not in record.getMessage()


class _Shell(nn.Module):
    """What DeepSpeed takes for the model: it holds the parameters, and "forward" hands the loss through.

    DeepSpeed needs its engine's forward pass only to see a backward pass coming. Experts are known to it by a module
    of its class `MoE` somewhere in the model; ours is an empty one.
    """

    def __init__(self, model: Transformer, has_experts: bool) -> None:
        from deepspeed.moe.layer import MoE

        class Marker(MoE):
            def __init__(self) -> None:
                nn.Module.__init__(self)
                self.num_experts = 1

            def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
                """The groups are registered already."""

        super().__init__()
        self.model = model
        if has_experts:
            self.marker = Marker()

    def forward(self, loss: Tensor) -> Tensor:
        return loss


def import_deepspeed(device: torch.device) -> Any:
    """The package, quiet, on our device, without operators that it would compile and we would not use."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # it insists, but the device is chosen already
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # standard output is for what was asked for, such as JSON
    # It knows an optimizer by its exact class. Those that can be chosen here are all in the proof.
    logger.addFilter(_is_no_doubt_of_optimizers)
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ConfigError(
            "parallel.engine=deepspeed: the package is missing; pip install 'moe-dist[deepspeed]', or set torch"
        ) from None
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # standard output is for what was asked for, such as JSON
    # It knows an optimizer by its exact class. Those that can be chosen here are all in the proof.
    logger.addFilter(_is_no_doubt_of_optimizers)
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})  # probing them would run the compiler
    return deepspeed
