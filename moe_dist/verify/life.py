"""The life of a run: what happens to a training between its first step and its last. Imports no torch.

A life passes through several layouts. In each of them things happen: training, an evaluation, a sample of text, a step
skipped for a number that is not finite, a save, a save behind training; then a stop signal comes in the middle of a
step, and the next layout goes on from what was saved. In one layout a third of all events come after each other, in the
next another third; the lives of `lives` together have every event after every other with every engine, ZeRO stage, ep
and pp size.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from moe_dist.config import Config, ConfigError
from moe_dist.verify.features import LOW_PRECISION, Choice, choice, words_in_order
from moe_dist.verify.layouts import Case, reason
from moe_dist.verify.scenarios import Precision, Scenario, Smallness

STEPS = ("train", "skip")
EVENTS = (*STEPS, "evaluate", "sample", "save", "save_behind")
PARTS = 3
"""Layouts in which every event has come after every other."""
_KINDS = {"save": "save", "save_behind": "save", "evaluate": "evaluate"}
BRIEF = ("train", "skip", "evaluate", "save_behind")
COLUMNS = ("losses", "norms", "loads", "evaluation", "weights", "moments", "state", "resumed")
"""What is held against one process: losses, norms and facts about the load of every step, losses of evaluations, every
tensor of every checkpoint, and what else is in it: counters, the position in the data, what a stop depends on. And
against the start before: every tensor that a start begins with, which in any precision is what that one ended with."""
_EXACT = {"state": 0.0, "resumed": 0.0}
TOLERANCES: dict[Precision, dict[str, float]] = {
    "float64": dict.fromkeys(COLUMNS, 1e-9) | _EXACT,
    # Two dozen steps: a near-tie of the router may go the other way in one of them.
    "float32": {"losses": 1e-3, "norms": 1e-2, "loads": 1e-1, "evaluation": 1e-3, "weights": 1e-1} | _EXACT,
    "bfloat16": {"losses": 0.05, "norms": 0.25, "evaluation": 0.05} | _EXACT,
}
GLOBAL_BATCH = 8
EVAL_BATCHES = 5
"""No multiple of any number of replicas: some of them evaluate padding."""
_NAME = re.compile(r"(life|brief)(\d*):([^+]+)(?:\+(.*))?")


@dataclass(frozen=True)
class Life:
    """Named like `life:ep2-zero1>pp2-1f1b-ep1-zero0+bias`; `brief:` has fewer events. `seed`, a number after that word,
    says which part of them the first layout has.
    """

    layouts: tuple[Case, ...]
    features: Choice
    events: tuple[str, ...] = EVENTS
    seed: int = 0

    @property
    def name(self) -> str:
        kind = "brief" if self.events == BRIEF else "life"
        words = words_in_order(self.features) or ["plain"]
        return "+".join([f"{kind}{self.seed or ''}:{'>'.join(layout.name for layout in self.layouts)}", *words])

    @staticmethod
    def named(name: str) -> Life:
        """Raises ConfigError for what is not such a name."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ConfigError(f"--layouts {name}: a life is named like life:ep2-zero1>ep4-zero3+bias")
        kind, seed, layouts, words = match.groups()
        return Life(
            tuple(Case.named(layout) for layout in layouts.split(">")),
            choice(word for word in (words or "plain").split("+") if word != "plain"),
            BRIEF if kind == "brief" else EVENTS,
            int(seed or 0),
        )

    @property
    def precision(self) -> Precision:
        if self.features & LOW_PRECISION:
            return "bfloat16"
        return "float32" if any(layout.engine == "deepspeed" for layout in self.layouts) else "float64"

    def passes(self, worst: dict[str, float]) -> bool:
        """Whether these deviations are rounding."""
        return all(worst[name] <= tolerance for name, tolerance in self.tolerances.items())

    @property
    def tolerances(self) -> dict[str, float]:
        """Largest relative difference of each column that is judged."""
        return TOLERANCES[self.precision]

    def check(self, small: Smallness) -> None:
        """Raises ConfigError when it cannot be."""
        for layout in self.layouts:
            self.config(small, layout)

    def config(self, small: Smallness, layout: Case | None) -> Config:
        """Of a run in this layout; None: in one process, the same global batch."""
        training = small.training(Scenario(layout or self.layouts[0], self.features))
        tree: dict[str, Any] = (training.config if layout else training.alone).model_dump()
        replicas = small.world_size // layout.pp_size if layout else 1
        needed = max(small.world_size // layout.pp_size * layout.accumulation for layout in self.layouts)
        batch = max(needed, 0 if self.events == BRIEF else GLOBAL_BATCH)
        tree["model"] |= {"vocab_size": 272, "num_hidden_layers": self._num_layers}
        tree["data"] |= {"source": "memory", "max_seq_length": 16, "validation_split": 0.2}
        tree["data"] |= {"dataloader_num_workers": 1 if layout else 0}
        tree["train"] |= {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": batch // replicas,
            "max_steps": sum(event in STEPS or event == "stop" for script in self.scripts for event in script),
            "on_nonfinite": "skip",
            "sample_tokens": 2,
        } | dict.fromkeys(("eval_steps", "early_stopping_patience"), 0)
        tree["train"] |= dict.fromkeys(("max_time", "divergence_loss", "per_device_eval_batch_size"))
        tree["train"]["eval_batches"] = EVAL_BATCHES
        rate = 3e-3
        if self.precision == "bfloat16":  # dozens of steps, each from rounded gradients
            rate = 3e-4
            tree["train"]["early_stopping_threshold"] = 1e3  # which of two losses is better may be rounding, too
        tree["optimizer"] |= {"learning_rate": rate, "min_learning_rate": rate / 30, "adam_epsilon": 1e-6}
        if tree["balance"]["router_temperature_steps"]:  # as long as the life: every resume comes in the middle
            tree["balance"]["router_temperature_steps"] = tree["train"]["max_steps"]
        tree["checkpoint"] = {"save_steps": 10**6}
        tree["monitor"] |= {"logging_steps": 1, "tensorboard": False, "progress": "none"}
        try:
            return Config.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(f"--layouts {self.name}: {reason(error)}") from None

    @property
    def _num_layers(self) -> int:
        return max(Scenario(layout, self.features).num_layers for layout in self.layouts)

    @property
    def scripts(self) -> list[list[str]]:
        """Events of each layout. All but the last end with a stop signal."""
        drawn = random.Random(f"{self.name}")
        last = len(self.layouts) - 1
        return [
            [*_real(walk_through(self.events, self.seed + number, drawn)), *(["stop"] if number < last else [])]
            for number in range(len(self.layouts))
        ]


def walk_through(events: tuple[str, ...], part: int, drawn: random.Random) -> list[str]:
    """A sequence in which a third of all pairs of an event and the next come (`part` modulo 3 says which third, and few
    others), in an order of `drawn`.
    """
    ways: dict[str, list[str]] = {
        event: [other for there, other in enumerate(events) if (here + there - part) % PARTS == 0]
        for here, event in enumerate(events)
    }
    walk: list[str] = []
    for start in drawn.sample(events, len(events)):
        if not ways[start]:
            continue
        for following in ways.values():
            drawn.shuffle(following)
        path, circuit = [start], []
        while path:  # Hierholzer's algorithm: whatever follows an event is followed by it, so every walk comes back
            if ways[path[-1]]:
                path.append(ways[path[-1]].pop())
            else:
                circuit.append(path.pop())
        walk += circuit[::-1]
    return walk


def _real(walk: list[str]) -> list[str]:
    """A step is saved once and evaluated once. Where an event would do nothing, a step comes before the one it is to
    follow.
    """
    events, done = [], {"save"}  # what a run goes on from is saved
    for before, event in zip(["train", *walk], walk, strict=False):
        if _KINDS.get(event) in done:
            events.append("train")
            done = set()
            if _KINDS.get(before) != _KINDS[event]:
                events.append(before)
                done = {_KINDS.get(before, "")}
        events.append(event)
        done = set() if event in STEPS else done | {_KINDS.get(event, "")}
    return events


_QUICK = ("ep2-zero1", "pp2-1f1b-ep1-zero1-acc2", "ep1-zero0")
_WIDE = (
    (0, "ep2-zero1", "ep1-zero2", "ep4-zero3", "pp2-1f1b-ep2-zero1-acc2", "ep4-zero0"),
    (1, "ep1-zero1", "pp2-zero_bubble-ep2-zero0-acc4", "ep2-zero3-shard2", "pp4-interleaved_1f1b-ep1-zero3-acc4"),
    (0, "ep4-zero2-full", "pp2-dualpipe_v-ep1-zero1-acc4", "ep1-zero3", "pp4-gpipe-ep1-zero0-acc4-selective"),
)
"""Chains of layouts, and the part of all pairs of events that comes in the first of each."""
_EXPERTS = ("ep2-zero3", "ep1-zero1", "pp4-1f1b-ep1-zero1-acc4", "ep4-zero2")
_DEEPSPEED = ("ep2-zero1-deepspeed", "ep1-zero2-deepspeed", "ep4-zero1-deepspeed", "ep2-zero1")


def lives(small: Smallness, which: str, seed: int = 0) -> list[Life]:
    """A brief life for `quick`; otherwise lives in which every event comes after every other with every engine, ZeRO
    stage, ep and pp size (tested), and, for a few events, other optimizers and what is seldom in a life.
    """
    words = frozenset({"bias", "sequence_scope", "cosine", "attention_dropout", "expert_dropout", "z_loss"})
    if which == "quick":
        return _feasible(small, _QUICK, words | {"biased_experts", "moved_experts"}, BRIEF, PARTS * seed)
    found: list[Life] = []
    for part, *chain in _WIDE:
        found += _feasible(small, chain, words, EVENTS, PARTS * seed + part)
    experts = frozenset({"biased_experts", "label_smoothing", "linear", "shared_expert"})
    found += _feasible(small, _EXPERTS, experts, EVENTS, PARTS * seed)
    found += _feasible(small, _DEEPSPEED, frozenset({"bias", "cosine"}), EVENTS, PARTS * seed + 1)
    half = frozenset({"pure_bf16", "moved_experts"})
    found += _feasible(small, ("ep2-zero0", "ep2-zero2", "ep1-zero0"), half, EVENTS, PARTS * seed)
    others = frozenset({"sgd", "annealing", "own_router", "noisy_experts", "jitter"})
    found += _feasible(small, ("ep2-zero3", "pp2-1f1b-ep1-zero0-acc2"), others, BRIEF, PARTS * seed)
    whole = frozenset({"adafactor", "fallback", "tied", "capacity", "attention_bias"})
    return found + _feasible(small, ("ep4-zero0", "ep2-zero0"), whole, BRIEF, PARTS * seed + 1)


def _feasible(small: Smallness, chain: Sequence[str], words: Choice, events: tuple[str, ...], seed: int) -> list[Life]:
    """A life in those layouts of the chain that the ranks can have, where there are two or more."""
    layouts = []
    for name in chain:
        layout = Case.named(name)
        engine = layout.engine == "torch" or _has_deepspeed()
        if engine and small.refusal(Scenario(layout, words)) is None:
            layouts.append(layout)
    return [Life(tuple(layouts), words, events, seed)] if len(layouts) > 1 else []


def _has_deepspeed() -> bool:
    from importlib.util import find_spec

    return find_spec("deepspeed") is not None
