"""Which layout a model should have on a cluster, what it needs and how fast it will be, before anything is started.

`cluster` (devices and links) and a run file go in; `memory` and `step_time` say what a layout costs on its most loaded
rank; `search` tries all that are legal; `failures` turns a rate into days. No torch.
"""
