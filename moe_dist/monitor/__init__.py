"""Facts to people.

`Collector` sums what the layers saw into `LayerRecord`s; the trainer puts them into a `TrainRecord`; `Sinks`
hands each record to the console, `metrics.jsonl`, TensorBoard and Prometheus; `report` reads the file back. `metrics`
is the one table of all numbers: what they mean, what they are called where, how they are reduced.
`alerts.yml` and `grafana.json` are for the servers of others. `docs/metrics.md` explains every number.
"""
