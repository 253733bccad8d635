"""The names that `parallel.engine` chooses an engine by."""

from __future__ import annotations

from collections.abc import Callable

from moe_dist.config import Config
from moe_dist.models.registry import Registry
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.engines.base import Engine
from moe_dist.parallel.mesh import Mesh

BuildEngine = Callable[[Transformer, Config, Mesh], Engine]
ENGINES: Registry[BuildEngine] = Registry("parallel.engine", "engine")


@ENGINES.register("torch")
def _torch(model: Transformer, config: Config, mesh: Mesh) -> Engine:
    if config.parallel.zero_stage and mesh.sparse is not None:  # a single process has nothing to cut
        from moe_dist.parallel.engines.fsdp import FSDPEngine

        return FSDPEngine(model, config, mesh)
    from moe_dist.parallel.engines.replicated import ReplicatedEngine

    return ReplicatedEngine(model, config, mesh)


@ENGINES.register("deepspeed")
def _deepspeed(model: Transformer, config: Config, mesh: Mesh) -> Engine:
    from moe_dist.parallel.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(model, config, mesh)


def build_engine(model: Transformer, config: Config, mesh: Mesh) -> Engine:
    """The engine that `parallel.engine` names, for a model with its initial weights, which it may cut or cast.

    Raises ValueError for a name that is neither registered nor can be imported, and for what is no engine.
    """
    name = config.parallel.engine
    engine = ENGINES.resolve(name)(model, config, mesh)
    if missing := [method for method in vars(Engine) if method[0] != "_" and not hasattr(engine, method)]:
        raise ValueError(f"parallel.engine={name}: it has no {', '.join(missing)}; docs/extending.md shows an engine")
    return engine
