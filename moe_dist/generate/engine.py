"""The engine: requests join and leave a batch between two passes of the model (continuous batching).

A step is one forward pass, of new prompts or of one more token for everybody, and what it chooses. Ranks of one
pipeline have the same requests; replicas (`dp`) share requests out, and one without any still takes part in every pass,
because experts of the others' tokens are on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moe_dist.data.tokenizer import Tokenizer
from moe_dist.generate.choice import choose, chosen_pairs, chosen_token, num_numbers
from moe_dist.generate.expert_cache import CachePolicy, ExpertCache, ExpertCacheStats
from moe_dist.generate.json_schema import JsonAnswer, JsonSchemas
from moe_dist.generate.options import SamplingOptions
from moe_dist.generate.paged_cache import BLOCK, BlockPool, StepCache
from moe_dist.generate.requests import Completion, Event, Live, Occupied
from moe_dist.generate.sampling import BeamSearch
from moe_dist.generate.text_stream import TextStream
from moe_dist.models.context import RoutingContext
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.mesh import Mesh

GREEDY = SamplingOptions()


class MoEInferenceEngine:
    """Answers requests with a model.

        engine = MoEInferenceEngine(model, tokenizer)
        [answer] = engine.generate(["def "], SamplingOptions(max_tokens=32))

    `model`: a `Transformer` with weights, or this rank's part of one on `mesh`. Without a `tokenizer` prompts are
    token ids and answers have no text. `vocab_size`: only ids below it are chosen; None: the tokenizer's, or all.
    `expert_cache_size_gb`: experts move to host memory, or to files in `expert_folder`, and so much of them is kept
    where the model computes, by `cache_policy`; None: all experts stay where they are. `cache_tokens`: room for
    tokens of all live requests together. `max_rows`: sequences of a batch; `max_prompt_tokens`: of prompts
    read in one pass.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        mesh: Mesh | None = None,
        vocab_size: int | None = None,
        expert_cache_size_gb: float | None = None,
        cache_policy: CachePolicy = "lru",
        expert_folder: str | None = None,
        prefetch: bool = False,
        cache_tokens: int = 131_072,
        max_rows: int = 32,
        max_prompt_tokens: int = 4096,
    ) -> None:
        self.model, self.tokenizer, self.mesh = model, tokenizer, mesh or Mesh.single(_device_of(model))
        known = model.config.vocab_size if tokenizer is None else tokenizer.vocab_size
        self.vocab_size = min(model.config.vocab_size, vocab_size or known)
        self.eos_ids = frozenset() if tokenizer is None else frozenset((tokenizer.eos_id,))
        self.max_rows, self.max_prompt_tokens = max_rows, max_prompt_tokens
        self.pool = BlockPool(max(1, cache_tokens // BLOCK))
        self.expert_cache: ExpertCache | None = None
        if expert_cache_size_gb is not None:
            self.expert_cache = ExpertCache(
                model, int(expert_cache_size_gb * 2**30), cache_policy, folder=expert_folder, prefetch=prefetch
            )
        scaling: dict[str, Any] = dict(model.config.rope_scaling or {})
        self._longrope = (
            int(scaling["original_max_position_embeddings"]) if scaling.get("rope_type") == "longrope" else None
        )
        # Cheaper, but what engines of training keep between passes must not be made so.
        self._is_frozen = not any(parameter.requires_grad for parameter in model.parameters())
        self._waiting: deque[Live] = deque()
        self._live: list[Live] = []
        self._next_number = 0
        self._cancelled: list[Event] = []
        self._occupied: Occupied | None = None

    @property
    def expert_cache_stats(self) -> ExpertCacheStats | None:
        """Hits, misses and bytes so far; None without an expert cache."""
        return None if self.expert_cache is None else self.expert_cache.stats

    @property
    def occupied(self) -> Occupied:
        """Of all replicas, as it was after the last pass; of a single one as it is."""
        return self._occupied or self._own

    @property
    def _own(self) -> Occupied:
        return Occupied(len(self._live), len(self._waiting), self.pool.num_used, self.pool.max_blocks)

    def add(self, prompt: str | Sequence[int], options: SamplingOptions = GREEDY) -> int:
        """A request, and its number. On several ranks each calls this alike, in the same order; one replica does it.

        Raises ValueError for a prompt without tokens or with unknown ones, and for more than the model has positions
        or the cache has room for.
        """
        tokens = self.encode(prompt)
        limit = self.model.config.max_position_embeddings
        if len(tokens) >= limit:
            raise ValueError(f"a prompt of {len(tokens)} tokens: at most {limit - 1} (max_position_embeddings={limit})")
        options = replace(options, max_tokens=min(options.max_tokens, limit - len(tokens)))
        blocks = options.num_beams * (-(-(len(tokens) + options.max_tokens) // BLOCK) + 1)
        if blocks > self.pool.max_blocks:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens, max_tokens={options.max_tokens} and num_beams={options.num_beams} "
                f"need {blocks * BLOCK} tokens of the cache: it has {self.pool.max_blocks * BLOCK} (cache_tokens)"
            )
        if options.num_beams > self.max_rows:
            raise ValueError(f"num_beams={options.num_beams}: at most max_rows={self.max_rows}")
        json = self.json_answer(options)
        number = self._next_number
        self._next_number += 1
        if number % self.mesh.layout.dp_size == self.mesh.dp_rank:
            eos_ids = frozenset() if options.ignore_eos else self.eos_ids
            generator = None
            if options.temperature:
                generator = torch.Generator()
                _ = generator.seed() if options.seed is None else generator.manual_seed(options.seed)
            beams = None
            if options.num_beams > 1:
                beams = BeamSearch(options.num_beams, options.length_penalty, options.max_tokens, eos_ids)
            decode = self.tokenizer.decode if self.tokenizer is not None else lambda ids: ""
            stream = TextStream(decode, options.stop)
            self._waiting.append(Live(number, options, [tokens], len(tokens), stream, blocks, generator, beams, json))
        return number

    def json_answer(self, options: SamplingOptions) -> JsonAnswer | None:
        """Where an answer by the schema of `options` begins; None without one. Raises ValueError: without a tokenizer
        or llguidance, for a schema that cannot be followed, and where no answer is so short.
        """
        if options.json_schema is None:
            return None
        return self._json_schemas.answer(options.json_schema, options.max_tokens)

    @cached_property
    def _json_schemas(self) -> JsonSchemas:
        if self.tokenizer is None:
            raise ValueError("an answer by a JSON schema needs a tokenizer: MoEInferenceEngine(model, tokenizer)")
        return JsonSchemas(self.tokenizer, self.vocab_size)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt; an empty text begins where a document ends. Raises ValueError."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("a prompt of text needs a tokenizer: MoEInferenceEngine(model, tokenizer)")
            return [int(token) for token in self.tokenizer.encode(prompt)] or [self.tokenizer.eos_id]
        tokens = [int(token) for token in prompt]
        if not tokens or not all(0 <= token < self.model.config.vocab_size for token in tokens):
            raise ValueError(f"a prompt of token ids needs one or more, each below {self.model.config.vocab_size}")
        return tokens

    def cancel(self, number: int) -> None:
        """Forget a request, whose client has gone; its last event says so. On several ranks each calls this alike."""
        for live in [*self._waiting, *self._live]:
            if live.number == number:
                if live in self._live:
                    self._end(live)
                else:
                    self._waiting.remove(live)
                self._cancelled.append(Event(number, (), "", "cancelled"))

    def generate(
        self, prompts: Iterable[str | Sequence[int]], options: SamplingOptions | Sequence[SamplingOptions] = GREEDY
    ) -> list[Completion]:
        """Answers in the order of the prompts, on every rank. With a seed each prompt draws from its own generator, so
        that what else is in the batch changes nothing.
        """
        prompts = list(prompts)
        each = [options] * len(prompts) if isinstance(options, SamplingOptions) else list(options)
        numbers = [self.add(prompt, one) for prompt, one in zip(prompts, each, strict=True)]
        answers = {number: Completion(len(self.encode(p))) for number, p in zip(numbers, prompts, strict=True)}
        for event in self.run():
            if event.request in answers:
                answers[event.request].add(event)
        return [answers[number] for number in numbers]

    def run(self) -> Iterator[Event]:
        """Step until no replica has anything to do."""
        busy = True
        while busy:
            events, busy = self.step()
            yield from events

    def step(self) -> tuple[list[Event], bool]:
        """One pass of the model, on all ranks together: what is new for all requests of all replicas, and whether any
        replica has work left.
        """
        with torch.inference_mode() if self._is_frozen else torch.no_grad():
            return self._step()

    def _step(self) -> tuple[list[Event], bool]:
        was_training = self.model.training
        if was_training:
            self.model.eval()
        try:
            rows = self._plan()
            logits = self._forward(rows)
        finally:
            if was_training:
                self.model.train()
        events, self._cancelled = self._cancelled, []
        events += self._choose(rows, logits)
        is_busy = bool(self._live or self._waiting)
        if self.mesh.group("dp") is None:
            return events, is_busy
        replicas = self.mesh.from_all((events, is_busy, self._own), "dp")
        every = [own for _, _, own in replicas]
        self._occupied = Occupied(*(sum(getattr(own, one.name) for own in every) for one in fields(Occupied)))
        return [event for found, _, _ in replicas for event in found], any(busy for _, busy, _ in replicas)

    def _plan(self) -> list[tuple[Live, int]]:
        """What goes through the model now: (request, tokens of each of its sequences). Prompts go first."""
        reserved = sum(live.reserved for live in self._live)
        num_rows = sum(live.options.num_beams for live in self._live)
        while self._waiting:
            first = self._waiting[0]
            num_rows += first.options.num_beams
            reserved += first.reserved
            if num_rows > self.max_rows or reserved > self.pool.max_blocks:
                break
            self._live.append(self._waiting.popleft())
        for live in self._live:
            if self._longrope is not None and 0 < live.num_cached <= self._longrope < len(live.sequences[0]):
                live.num_cached = 0  # past this length every position is turned by another angle
        room, rows = self.max_prompt_tokens, []
        for live in self._live:
            if live.num_waiting > 1 or not live.num_cached:
                count = live.num_waiting if self._longrope is not None else min(live.num_waiting, room)
                if count > 0:
                    rows.append((live, count))
                    room -= count * live.num_rows
        return rows or [(live, 1) for live in self._live]

    def _forward(self, rows: list[tuple[Live, int]]) -> Tensor | None:
        """Logits (rows, V) of the last token of each; None where no logits are made."""
        device = self.mesh.device
        if not rows:
            if self.mesh.layout.world_size > 1:
                # One token of padding: it goes to no expert, but those of others come here.
                nobody = torch.zeros(1, 1, dtype=torch.bool, device=device)
                context = RoutingContext(valid_BS=nobody)
                self.model(torch.zeros(1, 1, dtype=torch.int64, device=device), context=context)
            return None
        tables, starts, counts, tokens = [], [], [], []
        for live, count in rows:
            end = live.num_cached + count
            for index, sequence in enumerate(live.sequences):
                if index == len(live.tables):
                    live.tables.append([])
                table = live.tables[index]
                table += self.pool.take(max(0, -(-end // BLOCK) - len(table)))
                tables.append(table)
                starts.append(live.num_cached)
                counts.append(count)
                tokens.append(sequence[live.num_cached : end])
            live.num_cached = end
        step = StepCache(self.pool, tables, starts, counts, device)
        width = max(counts)
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in tokens], device=device)
        is_full = min(counts) == width
        context = RoutingContext(valid_BS=None if is_full else step.valid)
        logits = self.model(ids, position_ids=step.positions, context=context, cache=step)
        if self.model.lm_head is None:
            return None
        last = torch.tensor(counts, device=device) - 1
        return logits[torch.arange(len(counts), device=device), last][:, : self.vocab_size]

    def _choose(self, rows: list[tuple[Live, int]], logits: Tensor | None) -> list[Event]:
        """Take the next token of everybody whose tokens have all been through the model."""
        ready, first_row = [], 0
        for live, _ in rows:
            if live.num_waiting == 0:
                ready.append((live, first_row))
            first_row += len(live.sequences)
        sizes = [num_numbers(live) for live, _ in ready]
        # On several stages only the last one has logits; the others add zeros.
        chosen = torch.zeros(sum(sizes), dtype=torch.float64)
        if logits is not None and ready:
            likeliest = logits.argmax(-1).tolist()
            chosen = torch.cat([choose(live, logits, row, likeliest) for live, row in ready])
        if self.mesh.group("pp") is not None:
            chosen = self.mesh.sum_over("pp", chosen.to(self.mesh.device)).cpu()
        events: list[Event] = []
        for (live, _), numbers in zip(ready, chosen.split(sizes), strict=True):
            event = self._take_beams(live, numbers) if live.beams is not None else self._take(live, numbers)
            if event is not None:
                events.append(event)
        return events

    def _take(self, live: Live, numbers: Tensor) -> Event:
        token, logprobs = chosen_token(live, numbers)
        sequence = live.sequences[0]
        sequence.append(token)
        is_end = token in self.eos_ids and not live.options.ignore_eos
        is_last = is_end or len(sequence) - live.num_prompt >= live.options.max_tokens
        text = live.stream.push((token,), last=is_last) if self.tokenizer is not None else ""
        finished = "stop" if is_end or live.stream.stopped else "length" if is_last else None
        if finished:
            self._end(live)
        return Event(live.number, (token,), text, finished, logprobs)

    def _take_beams(self, live: Live, numbers: Tensor) -> Event | None:
        beams = live.beams
        assert beams is not None
        parents, is_over = beams.take(*chosen_pairs(numbers), self.vocab_size)
        if is_over:
            tokens = tuple(beams.best)
            text = live.stream.push(tokens, last=True) if self.tokenizer is not None else ""
            is_end = bool(tokens) and tokens[-1] in beams.eos_ids
            self._end(live)
            return Event(live.number, tokens, text, "stop" if is_end or live.stream.stopped else "length")
        prompt = live.sequences[0][: live.num_prompt]
        parents = [min(parent, len(live.tables) - 1) for parent in parents]
        tables, used = [], set()
        for parent in parents:
            old = live.tables[parent]
            tables.append(self.pool.fork(old, live.num_cached) if parent in used else old)
            used.add(parent)
        for index, table in enumerate(live.tables):
            if index not in used:
                self.pool.give_back(table)
        live.tables, live.sequences = tables, [prompt + new for new in beams.running]
        return None

    def _end(self, live: Live) -> None:
        for table in live.tables:
            self.pool.give_back(table)
        self._live.remove(live)


def _device_of(model: Any) -> torch.device:
    return next(model.parameters()).device
