"""Facts to people.

`Collector` sums what the layers saw into `LayerRecord`s; the trainer puts them into a `TrainRecord`; `Sinks`
hands each record to the console, `metrics.jsonl` and TensorBoard. `docs/metrics.md` explains every number.
"""
