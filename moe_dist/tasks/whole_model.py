"""One model over all ranks, asked by rank 0 alone: how likely texts are, and what it writes.

Whoever asks (a task, lm-evaluation-harness) runs on rank 0; the other ranks wait for what it asks and compute their
part. So nothing that a task does between two questions need be the same on every rank.

Shape suffixes: B batch, S sequence, D hidden, V vocabulary, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.data.tokenizer import Tokenizer
from moe_dist.generate.engine import MoEInferenceEngine
from moe_dist.generate.options import SamplingOptions
from moe_dist.models.context import RoutingContext
from moe_dist.models.counts import loss_chunk
from moe_dist.models.precision import full
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.engines.eval_mode import evaluating
from moe_dist.parallel.mesh import Mesh

Answer = TypeVar("Answer")
Scored = tuple[list[int], int]
"""Token ids, and how many of the last ones are to be scored."""
Command = tuple[str, list[Any], Any]


class WholeModel:
    """`model`: this rank's part. `batch_size`: rows of a pass on each replica. `bf16`: compute so by autocast.
    `chat_template`: what is asked is what a user says, by the tokenizer's template. Raises ValueError where it has
    none.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        batch_size: int = 4,
        bf16: bool = False,
        chat_template: bool = False,
    ) -> None:
        if chat_template and not getattr(tokenizer, "has_chat_template", False):
            raise ValueError(f"tokenizer {tokenizer.name!r} has no chat template, by which tasks could be asked")
        self.model, self.tokenizer, self.mesh, self.batch_size, self.bf16 = model, tokenizer, mesh, batch_size, bf16
        self.chat_template = chat_template
        inner = getattr(tokenizer, "inner", None)
        bos = None if inner is None else inner.bos_token_id
        self.first_id = tokenizer.eos_id if bos is None else int(bos)
        """What stands before a text that nothing stands before."""
        self._bos = None if inner is None or bos is None else str(inner.decode(bos))

    @property
    def max_length(self) -> int:
        """Tokens of a sequence at most."""
        return self.model.config.max_position_embeddings

    def asked(self, text: str) -> str:
        """How this model is asked for what comes behind `text`. Raises ValueError for what a template refuses."""
        return self.rendered([{"role": "user", "content": text}]) if self.chat_template else text

    def rendered(self, messages: Sequence[Mapping[str, str]], *, goes_on: bool = False) -> str:
        """A conversation by the chat template, up to where the assistant begins; `goes_on`: in its last message."""
        try:
            found = self.tokenizer.inner.apply_chat_template(  # type: ignore[attr-defined]
                list(messages), tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
            )
        except Exception as error:  # of jinja, in the words of whoever wrote the template
            raise ValueError(f"the chat template of {self.tokenizer.name!r} refuses this: {error}") from error
        return str(found)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids. `special`: with the marks that the tokenizer itself sets around a text, as a model of Hugging
        Face expects them, unless they are there."""
        inner = getattr(self.tokenizer, "inner", None)
        if inner is None or not special or (self._bos and text.startswith(self._bos)):
            return [int(token) for token in self.tokenizer.encode(text)]
        return [int(token) for token in inner.encode(text)]

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Both as one text, and how many of its tokens are the continuation's, blanks at the context's end among them.

        Raises ValueError for a continuation without a token.
        """
        stripped = context.rstrip()
        continuation, context = context[len(stripped) :] + continuation, stripped
        if context:
            whole = self.encode(context + continuation)
            count = len(whole) - len(self.encode(context))
        else:
            ids = self.encode(continuation, special=False)
            whole = ids if ids[:1] == [self.first_id] else [self.first_id, *ids]
            count = len(whole) - 1
        if count < 1:
            raise ValueError(f"a continuation without a token: {continuation!r} after {context[-40:]!r}")
        return whole, count

    def score(self, requests: Sequence[Scored]) -> list[tuple[float, bool]]:
        """Of the last tokens of each: log-probability (nats), and whether each of them is the likeliest. What is longer
        than the model has positions loses its beginning. On rank 0 alone, inside `on_rank_zero`.

        Raises ValueError where more tokens are to be scored than the model has positions.
        """
        kept = []
        for ids, count in requests:
            if not 1 <= count < len(ids) or count > self.max_length:
                raise ValueError(
                    f"{count} tokens to score of {len(ids)}: at most {self.max_length} (max_position_embeddings), "
                    "and one before them"
                )
            kept.append((ids[-(self.max_length + 1) :], count))
        return self._do(self._from_rank_zero(("score", kept, None)))

    def write(self, prompts: Sequence[Sequence[int]], options: Sequence[SamplingOptions]) -> list[str]:
        """A continuation of each prompt. What leaves no room for its answer loses its beginning. As `score`."""
        kept = []
        for prompt, one in zip(prompts, options, strict=True):
            room = self.max_length - one.max_tokens
            if room < 1:
                raise ValueError(
                    f"answers of {one.max_tokens} tokens leave no room for a prompt: the model has {self.max_length} "
                    "positions (max_position_embeddings)"
                )
            kept.append(list(prompt[-room:]))
        return self._do(self._from_rank_zero(("write", kept, list(options))))

    def on_rank_zero(self, work: Callable[[], Answer]) -> Answer:
        """What `work` gives, which runs on rank 0 and asks this model; on every rank. A collective.

        A ValueError or OSError that it raises is raised on every rank.
        """
        if self.mesh.group("world") is None:
            return work()
        found: list[Answer] = []
        failure: ValueError | OSError | None = None
        if self.mesh.rank == 0:
            try:
                found.append(work())
            except (ValueError, OSError) as error:
                failure = error
            self._from_rank_zero(("end", [], None))
        else:
            self._follow()

        def tell() -> Answer:
            if failure is not None:
                raise failure
            return found[0]

        return self.mesh.ask_rank_zero(tell)

    def _from_rank_zero(self, command: Command) -> Command:
        """What rank 0 wants, on every rank. Token ids travel as two tensors."""
        verb, rows, more = command
        if self.mesh.group("world") is None:
            return command
        if verb == "score":
            rows, more = [ids for ids, _ in rows], [count for _, count in rows]
        flat = torch.tensor([token for ids in rows for token in ids], dtype=torch.int64)
        sent = self.mesh.ask_rank_zero(lambda: (verb, flat, torch.tensor([len(ids) for ids in rows]), more))
        verb, flat, lengths, more = sent
        ids = [part.tolist() for part in flat.split(lengths.tolist())] if len(lengths) else []
        return (verb, list(zip(ids, more, strict=True)), None) if verb == "score" else (verb, ids, more)

    def _follow(self) -> None:
        while (command := self._from_rank_zero(("", [], None)))[0] != "end":
            try:
                self._do(command)
            except ValueError:
                continue  # on rank 0 too, which tells it

    def _do(self, command: Command) -> list[Any]:
        verb, rows, options = command
        if not rows:
            return []
        with evaluating(self.model), torch.autocast(self.mesh.device.type, torch.bfloat16, enabled=self.bf16):
            return self._score(rows) if verb == "score" else self._write(rows, options)

    def _write(self, prompts: list[list[int]], options: list[SamplingOptions]) -> list[str]:
        engine = MoEInferenceEngine(self.model, self.tokenizer, mesh=self.mesh)
        return [answer.text for answer in engine.generate(prompts, options)]

    def _score(self, requests: list[Scored]) -> list[tuple[float, bool]]:
        layout, size = self.mesh.layout, self.batch_size
        found = torch.zeros(len(requests), 2, dtype=torch.float64, device=self.mesh.device)
        # Longest first: rows of a batch are alike, and memory that is not there is missed at once.
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][0]))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        # Every replica takes part in as many passes as the others: experts of their tokens are on it.
        for index in range(self.mesh.dp_rank, -(-len(batches) // layout.dp_size) * layout.dp_size, layout.dp_size):
            mine = batches[index] if index < len(batches) else []
            scores = self._pass([requests[number] for number in mine])
            if scores is not None and mine:
                found[mine] = scores
        self.mesh.sum_over("world", found)
        return [(logprob, num_others == 0) for logprob, num_others in found.tolist()]

    def _pass(self, rows: list[Scored]) -> Tensor | None:
        """(B, 2) float64: log-probability, and how many are not the likeliest; None where there is no head."""
        device = self.mesh.device
        inputs = [ids[:-1] for ids, _ in rows] or [[0]]
        width = max(map(len, inputs))
        ids_BS = torch.tensor([[*row, *[0] * (width - len(row))] for row in inputs], device=device)
        lengths = torch.tensor([len(row) if rows else 0 for row in inputs], device=device)
        valid_BS = torch.arange(width, device=device) < lengths[:, None]
        row_N = torch.tensor([row for row, (_, count) in enumerate(rows) for _ in range(count)], device=device)
        positions = [position for ids, count in rows for position in range(len(ids) - 1 - count, len(ids) - 1)]
        target_N = torch.tensor([token for ids, count in rows for token in ids[-count:]], device=device)

        def scores(hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
            found = torch.zeros(len(inputs), 2, dtype=torch.float64, device=device)
            if not rows:
                return found
            hidden_ND = hidden_BSD[row_N, torch.tensor(positions, device=device)]
            step = loss_chunk("auto", device.type, len(weight_VD))
            for start in range(0, len(hidden_ND), step):
                part = slice(start, start + step)
                logs_NV = full(F.linear(hidden_ND[part].to(weight_VD.dtype), weight_VD)).log_softmax(-1)
                found[:, 0].index_add_(0, row_N[part], logs_NV.gather(1, target_N[part, None])[:, 0].double())
                found[:, 1].index_add_(0, row_N[part], (logs_NV.argmax(-1) != target_N[part]).double())
            return found

        context = RoutingContext(valid_BS=None if bool(valid_BS.all()) else valid_BS)
        given = self.model(ids_BS, context=context, head_function=scores)
        return None if self.model.lm_head is None else given
