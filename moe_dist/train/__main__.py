"""`python -m moe_dist.train CONFIG [key=value ...]`, also `--config CONFIG`: `moe-dist train`, for torchrun's `-m`."""

from __future__ import annotations

import sys

from moe_dist.__main__ import main

if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["--config"]:
        words = words[1:]
    elif words[:1] and words[0].startswith("--config="):
        words = [words[0].removeprefix("--config="), *words[1:]]
    sys.argv[1:] = ["train", *words]
    main()
