"""A training (its features) in a layout, and the same training in one process beside it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from pydantic import ValidationError

from moe_dist.config import Config, ConfigError, ParallelConfig, checks
from moe_dist.config.sections.model import check_model
from moe_dist.config.sections.training import check_balance, check_optimizer, check_train
from moe_dist.parallel.layout import Layout
from moe_dist.verify.bugs import BUGS
from moe_dist.verify.features import (
    LOW_PRECISION,
    PLAIN,
    Batches,
    Choice,
    batches_of,
    choice,
    setting_of,
    words_in_order,
)
from moe_dist.verify.layouts import Case, reason, shrunken
from moe_dist.versions import compiles_float64

Precision = Literal["float64", "float32", "bfloat16"]
COMPARED = ("initial", "losses", "gradients", "norms", "weights", "biases", "loads", "evaluation")
"""What is held against one process: initial weights, the first step's gradients, all steps' losses, norms and facts
about the load, the loss of an evaluation before the last step, weights and selection biases at the end. In bfloat16
also `digits`, the share of weights, and of gradients but those of experts, that bfloat16 could hold: after sums in full
precision a small one."""
TOLERANCES: dict[Precision, dict[str, float]] = {
    "float64": {**dict.fromkeys(COMPARED, 1e-9), "initial": 0.0},
    "float32": dict.fromkeys(COMPARED, 1e-5)
    | {"initial": 0.0, "gradients": 5e-5, "norms": 5e-5, "loads": 1e-4, "weights": 1e-3},
    "bfloat16": {"initial": 0.0, "losses": 0.02, "norms": 0.1, "gradients": 0.3, "evaluation": 0.02, "digits": 0.1},
}
"""Largest relative differences, of the tensor that differs most. float64 leaves rounding at 1e-13: any mistake is
above. In float32 AdamW makes full steps out of gradients that are only rounding, and the second norm is of weights that
made them. In bfloat16 both sides round, and send
a token to another expert here and there: what follows an update is shown, not judged, and only large bugs are above."""
DEEP: dict[Precision, dict[str, float]] = {
    "float64": TOLERANCES["float64"],
    "float32": dict.fromkeys(COMPARED, 1e-3)
    | {"initial": 0.0, "gradients": 1e-2, "norms": 1e-2, "loads": 0.1, "weights": 0.1, "biases": 0.1},
    "bfloat16": {name: bound * (1 if name == "digits" else 2) for name, bound in TOLERANCES["bfloat16"].items()},
}
"""Of ten layers: each rounds what the one before has rounded, and in float32 a token may go to another expert, too."""
NUM_STEPS = 2
"""Of a trial: the second has moments of the first, and comes after an evaluation."""
DEPTH = 10
"""Layers of the model with the feature `deep`: past 8, which nothing small has."""


@dataclass(frozen=True)
class Training:
    """A configuration to be trained in a layout, and the same training alone: in one process, nothing sharded."""

    config: Config
    alone: Config
    batches: Batches


@dataclass(frozen=True)
class Scenario:
    """`features` None: those of the run file. Named like `ep2-zero3-acc2` (the run file's), `ep2-zero3-acc2+plain`,
    `pp2-1f1b-ep2-zero0-acc4+tied+z_loss`.
    """

    layout: Case
    features: Choice | None = None

    @property
    def name(self) -> str:
        if self.features is None:
            return self.layout.name
        return "+".join([self.layout.name, *(words_in_order(self.features) or ["plain"])])

    @staticmethod
    def named(name: str) -> Scenario:
        """Raises ConfigError for a word that is neither an axis of the layout nor a feature."""
        layout, *words = name.split("+")
        return Scenario(Case.named(layout), choice(word for word in words if word != "plain") if words else None)

    @property
    def precision(self) -> Precision:
        """What it is computed in. float64 shows mistakes of any size; DeepSpeed knows none."""
        features = self.features or frozenset()
        if self.layout.dtype == "bf16" or features & LOW_PRECISION:
            return "bfloat16"
        single = self.layout.dtype == "float32" or self.layout.engine == "deepspeed"
        return "float32" if single or ("compiled" in features and not compiles_float64()) else "float64"

    def check(self, small: Smallness) -> None:
        """Raises ConfigError when it cannot be."""
        small.training(self)

    def passes(self, worst: dict[str, float]) -> bool:
        """Whether these deviations are rounding."""
        return all(worst[name] <= tolerance for name, tolerance in self.tolerances.items())

    @property
    def tolerances(self) -> dict[str, float]:
        """Largest relative difference of each column that is judged."""
        features = self.features or frozenset()
        judged = (DEEP if "deep" in features else TOLERANCES)[self.precision]
        if "half_reduction" in features:  # sums on the way have no more digits
            judged = {name: tolerance for name, tolerance in judged.items() if name != "digits"}
        return judged

    @property
    def num_layers(self) -> int:
        """Of the small model: one for each stage at least, one more where stages are to differ."""
        chosen = self.features or frozenset()
        if "deep" in chosen:
            return DEPTH
        return max(4, _num_stages(self.layout.pp_size, self.layout.schedule) + ("uneven_stages" in chosen))


class Smallness:
    """The small models of one run file (`shrunken`), by their number of layers. `plant`: a bug that will be planted;
    what it needs to have an effect is switched on.
    """

    def __init__(self, config: Config, world_size: int, plant: str | None = None) -> None:
        self.config, self.world_size, self.plant = config, world_size, plant
        self._by_layers: dict[int, Config] = {}
        self._plain_by_layers: dict[int, Config] = {}

    def of(self, num_layers: int) -> Config:
        if num_layers not in self._by_layers:
            self._by_layers[num_layers] = shrunken(self.config, self.world_size, num_layers)
        return self._by_layers[num_layers]

    def training(self, scenario: Scenario) -> Training:
        """Raises ConfigError with the reason `moe-dist check` would give when it cannot be."""
        try:
            tree = self._put_together(scenario).model_dump()
            config = Config.model_validate(tree)
            Layout.of(config, self.world_size)
            tree["parallel"] = ParallelConfig().model_dump()
            tree["train"] |= {"gradient_accumulation_steps": 1, "gradient_checkpointing": "none"}
            # Compiled code rounds otherwise, and draws other noise: it is held against itself where that matters.
            draws = config.model.attention_dropout > 0 or (config.lora.r > 0 and config.lora.dropout > 0)
            same = scenario.precision == "bfloat16" or draws
            tree["train"]["torch_compile"] &= same
            if scenario.precision != "bfloat16":
                tree["train"]["kernels"] = "torch"
            if scenario.precision != "bfloat16":  # sums of chunks have more digits than one bfloat16 product
                tree["train"]["loss_chunk_tokens"] = 0
            batches = replace(self._batches(scenario), pairs=config.learns_preferences)
            return Training(config, Config.model_validate(tree), batches)
        except (ValidationError, ConfigError) as error:
            raise ConfigError(f"--layouts {scenario.name}: {reason(error)}") from None

    def refusal(self, scenario: Scenario) -> str | None:
        """Why the configuration's own rules do not allow it, or None. Quick: thousands are asked about."""
        try:
            config = self._put_together(scenario)
            check_model(config.model)
            check_train(config.train)
            check_balance(config.balance)
            check_optimizer(config.optimizer)
            checks.check_sections(config)
            Layout.of(config, self.world_size)
        except ValueError as error:  # a ConfigError is one
            return reason(error)
        return None

    def _batches(self, scenario: Scenario) -> Batches:
        planted = BUGS[self.plant].words if self.plant is not None else ()
        return batches_of((scenario.features or frozenset()).union(planted))

    def _put_together(self, scenario: Scenario) -> Config:
        """The configuration, without a look at whether it fits together."""
        layers, words = scenario.num_layers, scenario.features
        other = sorted({"all_gather", "dedup", "hierarchical"} & words) if words and words & LOW_PRECISION else []
        if other:
            raise ConfigError(
                f"parallel.dispatcher={other[0]}: it sums in another order than one process, which in bfloat16 sends "
                "tokens to other experts; allowed: all_to_all"
            )
        if "fp8_experts" in (words or ()) and (
            scenario.layout.engine == "deepspeed" or scenario.precision == "float32"
        ):
            raise ConfigError(
                "train.expert_precision=fp8: its rounding makes steps of that of float32, in which DeepSpeed computes; "
                "allowed: parallel.engine=torch, in float64 or bfloat16"
            )
        if words and words & LOW_PRECISION and "hot_experts" in words:
            raise ConfigError(
                "parallel.replicated_experts: a token's sum over experts has another order than in one process, which "
                "in bfloat16 sends tokens to other experts; allowed: 0"
            )
        small = self.of(layers) if words is None else self._plain(layers)
        changes = {
            "train": dict(scenario.layout.train_settings),
            "parallel": dict(scenario.layout.parallel_settings),
        }
        settings = {key: value for word in words or () for key, value in setting_of(word).items()}
        if self.plant is not None:  # what the bug needs to have an effect stays
            settings |= BUGS[self.plant].options
        if settings.pop("parallel.stages", None):
            changes["parallel"]["stages"] = _uneven_stages(scenario)
        return _changed(small, changes, settings)

    def _plain(self, num_layers: int) -> Config:
        """With the plain value of every feature."""
        if num_layers not in self._plain_by_layers:
            self._plain_by_layers[num_layers] = _changed(self.of(num_layers), {}, PLAIN)
        return self._plain_by_layers[num_layers]


def _changed(config: Config, changes: Mapping[str, dict[str, Any]], settings: Mapping[str, Any]) -> Config:
    """With these values by section, and those by `section.key`. Nothing is validated."""
    changes = {section: dict(values) for section, values in changes.items()}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        if section != "batch":
            changes.setdefault(section, {})[name] = value
    sections = {name: getattr(config, name).model_copy(update=update) for name, update in changes.items() if update}
    return config.model_copy(update=sections)


@cache
def _num_stages(pp_size: int, schedule: str) -> int:
    return ParallelConfig.model_validate({"pp_size": pp_size, "schedule": schedule}).num_stages


def _uneven_stages(scenario: Scenario) -> list[int]:
    """Layers of each stage, one stage longer than it would be and its neighbour shorter; three stages a rank for an
    interleaved schedule with layers enough.
    """
    layout, layers = scenario.layout, scenario.num_layers
    stages = _num_stages(layout.pp_size, layout.schedule)
    if layout.schedule == "interleaved_1f1b" and layers >= 3 * layout.pp_size:
        stages = 3 * layout.pp_size
    sizes = [layers // stages + (stage < layers % stages) for stage in range(stages)]
    longest = max(range(stages), key=lambda stage: (sizes[stage], stage))
    if sizes[longest] > 1:
        sizes[longest] -= 1
        sizes[(longest + 1) % stages] += 1
    return sizes
