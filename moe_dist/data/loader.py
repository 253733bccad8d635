"""The loader: each replica's micro-batches out of one global order.
 A step takes G = micro_batch_size * num_replicas * gradient_accumulation_steps samples from the stream. They
are cut into runs of micro_batch_size; replica r takes run a * num_replicas + r at accumulation index a. So
the samples of a step depend on the position and G alone, and the set of micro-batches is the same for every
split of one G.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from moe_dist.data.batch import Batch, collate, filling_sample
from moe_dist.data.order import GlobalOrder
from moe_dist.data.packing import PackedDataset, Sample, SampleDataset
from moe_dist.data.streaming import StreamingPackedDataset, StreamPoint


@dataclass(frozen=True)
class _Step:
    """The micro-batches of one step and, for a stream, where it stands after them."""

    batches: list[Batch]
    point: StreamPoint | None


def _check_layout(micro_batch_size: int, num_replicas: int, replica: int, gradient_accumulation_steps: int = 1) -> None:
    sizes = {
        "micro_batch_size": micro_batch_size,
        "num_replicas": num_replicas,
        "gradient_accumulation_steps": gradient_accumulation_steps,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; give at least 1")
    if not 0 <= replica < num_replicas:
        raise ValueError(f"replica is {replica}; with {num_replicas} replicas it is 0 to {num_replicas - 1}")


class GlobalLoader:
    """Endless steps of micro-batches for one data-parallel replica.

    `dataset`: a `PackedDataset`, or what has its `sample` and length (each epoch a new permutation, seeded by
    `seed` and the epoch; in order without `shuffle`) or a `StreamingPackedDataset` (stream order; every
    replica reads the whole stream and keeps its own samples). `num_workers`: number of threads that prepare
    steps ahead, the order staying the same (a stream uses one). `pin_memory`: page-locked tensors, where
    there is an accelerator. Raises ValueError for sizes below 1 or a replica out of range.
    """

    def __init__(
        self,
        dataset: SampleDataset | StreamingPackedDataset,
        *,
        micro_batch_size: int,
        num_replicas: int,
        replica: int,
        gradient_accumulation_steps: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        _check_layout(micro_batch_size, num_replicas, replica, gradient_accumulation_steps)
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; give 0 (prepare steps when asked) or more")
        self._stream = dataset if isinstance(dataset, StreamingPackedDataset) else None
        self._packed = None if isinstance(dataset, StreamingPackedDataset) else dataset
        self._order = GlobalOrder(len(self._packed), seed, shuffle) if self._packed is not None else None
        self._micro_batch_size = micro_batch_size
        self._num_replicas = num_replicas
        self._replica = replica
        self._num_accumulation = gradient_accumulation_steps
        self._seed = seed
        self._shuffle = shuffle
        self._pin_memory = pin_memory
        self._num_workers = num_workers if self._stream is None else min(num_workers, 1)
        self._executor: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[_Step]] = deque()
        self._point = self._stream.point() if self._stream is not None else None
        self._samples_consumed = self._point.samples if self._point is not None else 0

    @property
    def global_batch_size(self) -> int:
        """G: samples a step over all replicas."""
        return self._micro_batch_size * self._num_replicas * self._num_accumulation

    @property
    def samples_consumed(self) -> int:
        """Samples that all replicas together have taken from the stream."""
        return self._samples_consumed

    @property
    def epoch(self) -> float:
        """How often the dataset has been gone through; for a stream, the number of finished passes."""
        if self._packed is None:
            return float(self._point.passes) if self._point is not None else 0.0
        return self._samples_consumed / len(self._packed)

    @property
    def samples_per_epoch(self) -> int | None:
        """Samples in one pass over the data; None for a stream."""
        return None if self._packed is None else len(self._packed)

    def next_step(self) -> list[Batch]:
        """The next `gradient_accumulation_steps` micro-batches of this replica.

        Raises ValueError when a stream built without `repeat` ends.
        """
        if self._num_workers == 0:
            step = self._build(self._samples_consumed)
        else:
            self._submit_ahead()
            step = self._ahead.popleft().result()
        self._samples_consumed += self.global_batch_size
        self._point = step.point
        return step.batches

    def state_dict(self) -> dict[str, Any]:
        """Where the global order stands: the same on every replica, and good for any number of them.

        `samples_consumed` is all that is needed; the other keys are checked on loading, and `stream` saves a
        stream from being read again from its start.
        """
        state: dict[str, Any] = {"samples_consumed": self._samples_consumed}
        if self._packed is not None:
            state |= {"num_samples": len(self._packed), "seed": self._seed, "shuffle": self._shuffle}
        elif self._stream is not None:
            state["stream"] = self._stream.state_dict(self._point)
        return state

    def order_change(self, state: dict[str, Any]) -> str | None:
        """In what the order of a saved state is not this loader's (other data, sequence length or seed), in words."""
        if self._stream is not None:
            saved = state.get("stream", {})
            mine: dict[str, Any] = {"max_seq_length": self._stream.max_seq_length}
        else:
            assert self._packed is not None
            saved = state
            mine = {"num_samples": len(self._packed), "seed": self._seed, "shuffle": self._shuffle}
        other = [name for name, value in mine.items() if saved.get(name, value) != value]
        words = "; ".join(f"{name} {saved[name]}, now {mine[name]}" for name in other)
        return f"the data was read in another order ({words})" if other else None

    def recounted(self, state: dict[str, Any]) -> dict[str, Any]:
        """A saved state of another order, counted in samples of this one: after as large a part of the epoch, in a
        stream at the same token."""
        consumed = int(state["samples_consumed"])
        if self._packed is not None:
            return {
                "samples_consumed": round(
                    Fraction(consumed * len(self._packed), state.get("num_samples", len(self._packed)))
                )
            }
        assert self._stream is not None
        if "stream" not in state:
            return {"samples_consumed": consumed}
        length = self._stream.max_seq_length
        consumed = consumed * state["stream"]["max_seq_length"] // length
        return {
            "samples_consumed": consumed,
            "stream": state["stream"] | {"samples": consumed, "max_seq_length": length},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at `samples_consumed`, whatever layout saved it.

        Raises ValueError when the saved order was another one: going on would repeat some samples and leave out
        others. A state that holds `samples_consumed` alone goes on in the new order.
        """
        change = self.order_change(state)
        if change is not None:
            raise ValueError(change)
        self.close()
        self._samples_consumed = int(state["samples_consumed"])
        if self._stream is not None:
            if "stream" in state:
                self._stream.load_state_dict(state["stream"])
            else:
                self._stream.reset()
                self._stream.skip(self._samples_consumed)
            self._point = self._stream.point()

    def close(self) -> None:
        """Stop preparing steps ahead; the next `next_step` starts it again where the loader stands."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None
        self._ahead.clear()
        if self._stream is not None and self._point is not None and self._point.samples != self._stream.samples:
            self._stream.load_state_dict(self._stream.state_dict(self._point))  # undo what was read ahead

    def _submit_ahead(self) -> None:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self._num_workers, thread_name_prefix="data-loader")
        while len(self._ahead) < self._num_workers + 1:
            position = self._samples_consumed + len(self._ahead) * self.global_batch_size
            self._ahead.append(self._executor.submit(self._build, position))

    def _build(self, position: int) -> _Step:
        if self._stream is not None:
            return self._build_from_stream(self._stream)
        assert self._packed is not None
        assert self._order is not None
        ids = self._order.take(position, self.global_batch_size)
        batches = []
        for accumulation in range(self._num_accumulation):
            index = accumulation * self._num_replicas + self._replica
            mine = ids[index * self._micro_batch_size : (index + 1) * self._micro_batch_size].tolist()
            batches.append(collate([self._packed.sample(id_) for id_ in mine], mine, index, self._pin_memory))
        return _Step(batches, None)

    def _build_from_stream(self, stream: StreamingPackedDataset) -> _Step:
        batches = []
        for index in range(self._num_accumulation * self._num_replicas):
            if index % self._num_replicas != self._replica:
                stream.skip(self._micro_batch_size)
                continue
            first = stream.samples
            samples = [sample for _, sample in zip(range(self._micro_batch_size), stream, strict=False)]
            if len(samples) < self._micro_batch_size:
                raise ValueError(
                    f"the stream ended after {stream.samples} samples, within a step: build it with repeat=True"
                )
            batches.append(collate(samples, range(first, stream.samples), index, self._pin_memory))
        return _Step(batches, stream.point())


class Chosen:
    """Some samples of a dataset, by their numbers."""

    rows_per_sample = 1

    def __init__(self, samples: PackedDataset, numbers: Sequence[int]) -> None:
        self._samples, self._numbers = samples, numbers
        self.max_seq_length, self.pad_id, self.domains = samples.max_seq_length, samples.pad_id, samples.domains

    def __len__(self) -> int:
        return len(self._numbers)

    def sample(self, index: int) -> Sample:
        """As `PackedDataset.sample`."""
        return self._samples.sample(self._numbers[index])


def eval_batches(
    dataset: SampleDataset,
    micro_batch_size: int,
    num_replicas: int,
    replica: int,
    max_batches: int | None = None,
) -> Iterator[Batch]:
    """Each sample of `dataset` exactly once over all replicas, in order.

    Every replica yields the same number of batches, all of the same shape, so collectives stay matched: rows
    and batches that are left over are padding without a label. `max_batches` ends after so many micro-batches
    *over all replicas together*, so that every layout evaluates the same samples. Raises ValueError for sizes
    below 1 or a replica out of range.
    """
    _check_layout(micro_batch_size, num_replicas, replica)
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches is {max_batches}; give at least 1, or None for the whole dataset")
    num_batches = -(-len(dataset) // micro_batch_size)
    num_batches = num_batches if max_batches is None else min(num_batches, max_batches)
    num_samples = min(len(dataset), num_batches * micro_batch_size)
    filling: Sample = filling_sample(dataset.max_seq_length, dataset.pad_id, dataset.rows_per_sample)

    def generate() -> Iterator[Batch]:
        for index in range(replica, -(-num_batches // num_replicas) * num_replicas, num_replicas):
            mine = list(range(index * micro_batch_size, min((index + 1) * micro_batch_size, num_samples)))
            samples = [dataset.sample(id_) for id_ in mine]
            yield collate(samples + [filling] * (micro_batch_size - len(samples)), mine, index)

    return generate()
