"""The code has floors and imports go down; and a few things are done in one place only, or nowhere.

The checker reads source, it runs nothing, and it counts every import: lazy ones, those for type checkers and
`importlib.import_module("...")`. Below it stand its own tests: each rule broken once, by a few more lines in a module.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Rooms, each with its floor. Inside a room everything may import everything, but in no circle; between rooms only down.
# A wing (the launcher, each folder of moe_dist) may have floors of its own, such as 4.1; wings of one floor know
# nothing of each other.
ROOMS: tuple[tuple[float, tuple[str, ...]], ...] = (
    (10, ("tests",)),
    (9, ("tools",)),
    (8.7, ("moe_dist.__main__", "moe_dist.train.__main__")),  # `python -m moe_dist`
    (8.5, ("launcher.cli",)),
    (8.4, ("launcher.sweep",)),
    (8.3, ("launcher.backends",)),
    (8.2, ("launcher.rank",)),
    (8.1, ("launcher.supervise",)),
    (8.0, ("launcher.connect",)),
    (8.6, ("launcher",)),  # `python -m launcher`
    (7, ("moe_dist.finetune",)),
    (7, ("moe_dist.evaluate",)),
    (7, ("moe_dist.serve",)),
    (7, ("moe_dist.plan",)),
    (7, ("moe_dist.verify",)),
    (6, ("moe_dist.train",)),
    (5, ("moe_dist.pretrained",)),
    (5, ("moe_dist.tasks",)),  # which evaluation asks, and training
    (4.2, ("moe_dist.checkpoint.tools",)),
    (4.0, ("moe_dist.checkpoint.storage",)),
    (4.1, ("moe_dist.checkpoint",)),
    (4.3, ("moe_dist.monitor.report",)),
    (4.2, ("moe_dist.monitor.sinks",)),
    (4.1, ("moe_dist.monitor.health",)),
    (4.0, ("moe_dist.monitor",)),
    (4, ("moe_dist.generate",)),  # the engine alone, which training samples with; models are opened above
    (3.1, ("moe_dist.parallel.engines",)),
    (3.0, ("moe_dist.parallel",)),
    (2, ("moe_dist.data",)),
    (1, ("moe_dist.models",)),
    (0, ("moe_dist.config",)),
    (-1, ("moe_dist.versions",)),
    (-1, ("moe_dist",)),  # the package itself: a version, and no import that everybody would pay for
)
# `moe-dist --help` and `moe-dist check` answer at once because these load nothing heavy, however indirectly.
LIGHT = (
    "moe_dist.config",
    "moe_dist.versions",
    *(f"moe_dist.checkpoint.{name}" for name in ("config_diff", "lock", "ownership", "reading", "retention")),
    *(f"moe_dist.checkpoint.{name}" for name in ("run_folder", "shapes", "storage", "tools.listing")),
    *(f"moe_dist.models.{name}" for name in ("counts", "shapes")),
    *(f"moe_dist.parallel.{name}" for name in ("layout", "state_bytes", "status")),
    *(f"moe_dist.plan.{name}" for name in ("cluster", "elastic", "failures", "machine", "measured", "search", "words")),
    *(f"moe_dist.train.{name}" for name in ("interrupts", "run_summary")),
    *(
        f"moe_dist.verify.{name}"
        for name in ("cases", "design", "features", "layouts", "life", "scenarios", "verdicts")
    ),
    "launcher.cli",
    *(
        f"launcher.backends.{name}"
        for name in ("command", "kubernetes", "local", "mpirun", "ray", "ray_rank", "shipped")
    ),
    *(f"launcher.backends.{name}" for name in ("slurm", "torchrun")),
    *(f"launcher.sweep.{name}" for name in ("plan", "trial")),
    "launcher.rank",
    *(f"launcher.supervise.{name}" for name in ("agent", "exit_status", "hang", "heartbeat", "oom_advice")),
    *(f"launcher.supervise.{name}" for name in ("processes", "rank_channel")),
    *(f"launcher.connect.{name}" for name in ("environment", "exit_codes", "mpi", "rank_job")),
)
HEAVY = (
    *("torch", "numpy", "transformers", "datasets", "tokenizers", "tensorboard"),
    *("plotly", "pyarrow", "pandas", "deepspeed", "ray", "mpi4py"),
    *("fastapi", "uvicorn", "argon2"),
    *("lm_eval", "sacrebleu", "sklearn"),
)
WITHOUT_COLLECTIVES = ("moe_dist.models", "moe_dist.monitor")
ALL_TO_ALL_AT = "moe_dist.parallel.row_exchange"
VERSIONS_AT = "moe_dist.versions"
VERSIONS = ("torch.__version__", "torch.version", "importlib.metadata.version")
ALL_TO_ALL = re.compile(r"all_?to_?all(_(single|base|tensor)\w*)?")
# Ways for a file from elsewhere to run code here.
FORBIDDEN = (
    *("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch.load"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *(
        f"torch.distributed.{name}"
        for name in (
            *("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"),
            *("send_object_list", "recv_object_list"),
        )
    ),
)
UNSAFE = ("shell", "trust_remote_code", "allow_pickle")


@dataclass(frozen=True)
class Import:
    line: int
    name: str
    """With what is taken out of it: `from a import b` is a.b."""
    at_start: bool
    """Runs when the module is imported."""


@dataclass(frozen=True)
class Facts:
    imports: tuple[Import, ...]
    names: tuple[tuple[int, str], ...]
    """What is imported and each use of it, by full name: after `import a as b`, `b.c` is a.c."""
    arguments: tuple[tuple[int, str], ...]
    """Keyword arguments of calls, but for those that are plainly False."""


@cache
def within(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


@cache
def is_all_to_all(name: str) -> bool:
    return ALL_TO_ALL.fullmatch(name.rpartition(".")[2]) is not None


def facts_of(text: str, package: str) -> Facts:
    """What a module imports, names and passes; `package` is the one its relative imports start from."""
    imports: list[Import] = []
    bound: dict[str, str] = {}

    def gather(node: ast.AST, at_start: bool) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                imports.append(Import(node.lineno, alias.name, at_start))
                first = alias.name.partition(".")[0]
                bound[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            for alias in node.names:
                name = ".".join([*above, *filter(None, [node.module]), alias.name])
                imports.append(Import(node.lineno, name, at_start))
                bound[alias.asname or alias.name] = name
        elif isinstance(node, ast.Call) and full_name(node.func).endswith(("import_module", "__import__")):
            named = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            imports.extend(Import(node.lineno, str(name), at_start) for name in named)
        waits: list[ast.AST] = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waits = list(ast.iter_child_nodes(node))
        elif isinstance(node, ast.If) and full_name(node.test).endswith("TYPE_CHECKING"):
            waits = list(node.body)
        for child in ast.iter_child_nodes(node):
            gather(child, at_start and child not in waits)

    def full_name(node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            return bound.get(node.id, node.id)
        return f"{full_name(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"

    tree = ast.parse(text)
    gather(tree, True)
    nodes = list(ast.walk(tree))
    named = [(node.lineno, full_name(node)) for node in nodes if isinstance(node, (ast.Name, ast.Attribute))]
    roots = {name.partition(".")[0] for name in bound.values()}
    used = {item for item in named if item[1].partition(".")[0] in roots or is_all_to_all(item[1])}
    arguments = [
        (keyword.value.lineno, keyword.arg)
        for node in nodes
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
    ]
    used |= {(item.line, item.name) for item in imports}
    return Facts(tuple(imports), tuple(used), tuple(arguments))


Modules = dict[str, tuple[str, Facts]]
"""Every module of the project by name: its file, and what is in it."""


def module_of(path: Path, text: str) -> Modules:
    """The one module in `path`, relative to the project."""
    is_package = path.name == "__init__.py"
    name = ".".join(path.parent.parts if is_package else path.with_suffix("").parts)
    return {name: (path.as_posix(), facts_of(text, name if is_package else name.rpartition(".")[0]))}


@cache
def the_tree() -> Modules:
    """The project as it is."""
    modules: Modules = {}
    for folder in ("moe_dist", "launcher", "tools", "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            modules |= module_of(file.relative_to(ROOT), file.read_text("utf-8"))
    return modules


def with_more(path: str, lines: str) -> Modules:
    """The project with these lines (; for a new one) at the end of a file, which need not be there yet."""
    before = (ROOT / path).read_text("utf-8") if (ROOT / path).exists() else ""
    return the_tree() | module_of(Path(path), before + "\n" + lines.replace(";", "\n") + "\n")


@cache
def room_of(name: str) -> tuple[int, tuple[str, ...]] | None:
    return next((room for room in ROOMS if within(name, *room[1])), None)


def _wing(name: str) -> str:
    return "launcher" if int((room_of(name) or (0, ()))[0]) == 8 else ".".join(name.split(".")[:2])


def violations(modules: Modules) -> list[str]:
    """All that is against the rules, each as `file:line: what`."""
    helpers = {name.rpartition(".")[2] for name in modules if re.fullmatch(r"tests\.\w+", name)}
    found = set(_not_light(modules)) | set(_circles(modules))
    for module, (path, facts) in modules.items():
        floor, room = room_of(module) or (-1, ())
        if room == ("moe_dist",) and module != "moe_dist":
            found.add(f"{path}:1: on no floor")
        for item in facts.imports:
            # pytest puts tests/ on the path, so its helpers are imported by their bare names.
            name = f"tests.{item.name}" if item.name.partition(".")[0] in helpers else item.name
            where = f"{path}:{item.line}: "
            target = room_of(name)
            if target is None:
                continue
            if target[1] == room:
                if room == ("tests",) and re.search(r"\.test_\w+", name):
                    found.add(f"{where}a test imports a test: {name}")
            elif target[1] in (("tools",), ("tests",)) and (room, target[1]) != (("tests",), ("tools",)):
                found.add(f"{where}nothing imports {target[1][0]}: {name}")
            elif target[0] >= floor or (int(target[0]) == int(floor) and _wing(name) != _wing(module)):
                found.add(f"{where}floor {floor} imports floor {target[0]}: {name}")
            elif within(module, "moe_dist.data"):
                found.add(f"{where}data stands alone, yet imports {name}")
        if within(module, "tests"):
            continue
        for line, name in facts.names:
            if within(module, *WITHOUT_COLLECTIVES) and within(name, "torch.distributed"):
                found.add(f"{path}:{line}: {'.'.join(room)} is to know nothing of torch.distributed")
            if is_all_to_all(name) and module != ALL_TO_ALL_AT:
                found.add(f"{path}:{line}: all-to-all outside {ALL_TO_ALL_AT}")
            if within(name, *VERSIONS) and within(module, "moe_dist", "launcher") and module != VERSIONS_AT:
                found.add(f"{path}:{line}: a version asked for outside {VERSIONS_AT}")
            if within(name, *FORBIDDEN):
                found.add(f"{path}:{line}: {name} runs what a file says")
        for line, name in facts.arguments:
            if name in UNSAFE:
                found.add(f"{path}:{line}: {name}= must be False")
    return sorted(found)


def _circles(modules: Modules) -> Iterator[str]:
    """Modules that import each other, directly or around corners; of a package, its own `__init__` is meant."""
    graph = {
        module: {name if (name := item.name) in modules else name.rpartition(".")[0] for item in facts.imports}
        & modules.keys() - {module}
        for module, (_, facts) in modules.items()
        if not within(module, "tests")
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        first, *_ = error.args[1]
        yield f"{modules[first][0]}:1: {first} imports itself by way of {' '.join(reversed(error.args[1]))}"


def _not_light(modules: Modules) -> Iterator[str]:
    """Heavy packages that importing a light module loads, also by way of other modules and of packages."""
    waiting = [name for name in modules if within(name, *LIGHT)]
    seen: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        path, facts = modules[module]
        names = [item.name for item in facts.imports if item.at_start]
        for item in facts.imports:
            if item.at_start and within(item.name, *HEAVY):
                yield f"{path}:{item.line}: {item.name} on the way of a module that is to load fast"
        for name in [module, *names]:
            parts = name.split(".")
            above = [".".join(parts[:size]) for size in range(1, len(parts) + 1)]
            waiting += [part for part in above if part in modules]


@cache
def violations_now() -> list[str]:
    return violations(the_tree())


def heavy_after_start(root: Path) -> list[str]:
    """Heavy packages that are there once all light modules have been imported for real."""
    code = f"import sys, {', '.join(LIGHT)}; print(*[name for name in {HEAVY} if name in sys.modules])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_floors_stand() -> None:
    assert violations_now() == []


def test_every_named_module_is_there() -> None:
    assert {*LIGHT, *WITHOUT_COLLECTIVES, ALL_TO_ALL_AT, VERSIONS_AT} <= the_tree().keys()


def test_light_modules_load_nothing_heavy() -> None:
    assert heavy_after_start(ROOT) == []


# File, what is written at its end (; new line), and what the checker must say.
PLANTS = """
moe_dist/parallel/mesh.py | from moe_dist.train import loss | floor 3.0 imports floor 6: moe_dist.train.loss
moe_dist/parallel/mesh.py | from ..train.loss import x | floor 3.0 imports floor 6: moe_dist.train.loss.x
moe_dist/parallel/mesh.py | def f():;    import moe_dist.monitor.records | floor 3.0 imports floor 4
moe_dist/models/moe.py | if TYPE_CHECKING:;    import moe_dist.parallel.mesh | floor 1 imports floor 3
moe_dist/models/moe.py | importlib.import_module("moe_dist.train") | floor 1 imports floor 6: moe_dist.train
moe_dist/models/moe.py | from moe_dist.data.batch import Batch | floor 1 imports floor 2
moe_dist/train/loss.py | import launcher.rank.worker | floor 6 imports floor 8
moe_dist/monitor/records.py | from moe_dist.checkpoint import plain | floor 4.0 imports floor 4.1
moe_dist/monitor/report/page.py | from moe_dist.checkpoint.storage import Storage | floor 4.3 imports floor 4.0
moe_dist/monitor/health/rules.py | import moe_dist.monitor.sinks.text | floor 4.1 imports floor 4.2
moe_dist/checkpoint/storage/base.py | def f():;    import moe_dist.checkpoint.manager | floor 4.0 imports floor 4.1
moe_dist/parallel/mesh.py | from moe_dist.parallel.engines import fsdp | floor 3.0 imports floor 3.1
launcher/supervise/hang.py | import launcher.rank.worker | floor 8.1 imports floor 8.2
launcher/connect/addresses.py | from launcher.cli.paths import expanded | floor 8.0 imports floor 8.5
moe_dist/train/schedule.py | def f():;    import moe_dist.train.trainer | imports itself by way of
moe_dist/monitor/sinks/base.py | if TYPE_CHECKING:;    import moe_dist.monitor.sinks.console | imports itself by way of
moe_dist/pretrained/export.py | def f():;    import moe_dist.train.step | floor 5 imports floor 6: moe_dist.train.step
moe_dist/checkpoint/manager.py | import moe_dist.pretrained.export | floor 4.1 imports floor 5
moe_dist/serve/extra.py | import moe_dist.evaluate | floor 7 imports floor 7
moe_dist/config/tree.py | from moe_dist.models import counts | floor 0 imports floor 1
moe_dist/__init__.py | from moe_dist.config import Config | floor -1 imports floor 0
moe_dist/extras.py | import os | on no floor
moe_dist/data/order.py | from moe_dist.config import Config | data stands alone, yet imports
moe_dist/models/moe.py | import torch.distributed | moe_dist.models is to know nothing
moe_dist/models/moe.py | from torch import distributed | moe_dist.models is to know nothing
moe_dist/models/moe.py | import torch as t;t.distributed.get_rank() | moe_dist.models is to know nothing
moe_dist/monitor/sinks/text.py | def f():;    import torch.distributed.nn | moe_dist.monitor.sinks is to
moe_dist/models/counts.py | import torch | torch on the way of a module that is to load fast
moe_dist/parallel/__init__.py | from numpy import array | numpy.array on the way
moe_dist/config/extra.py | try:;    import ray;except ImportError:;    pass | ray on the way
moe_dist/train/run_summary.py | import moe_dist.models.precision | precision.py
moe_dist/parallel/mesh.py | dist.all_to_all_single(a, b) | all-to-all outside
moe_dist/train/step.py | from torch.distributed import all_to_all | all-to-all outside
moe_dist/train/step.py | group.alltoall_base(a, b) | all-to-all outside
moe_dist/train/step.py | import tools.train_tokenizer | nothing imports tools
launcher/connect/process_groups.py | from tools.bench import moe_layer | nothing imports tools
launcher/cli/main.py | def f():;    import tests.tiny | nothing imports tests
tools/train_tokenizer.py | from tiny import tiny_config | nothing imports tests: tests.tiny.tiny_config
tests/ranks.py | from test_machines import SIZES | a test imports a test
moe_dist/parallel/mesh.py | if torch.__version__ < "2.12":;    x = 1 | a version asked for outside
launcher/cli/main.py | from importlib.metadata import version | a version asked for outside
moe_dist/config/checks.py | from importlib import metadata;metadata.version("torch") | a version asked for outside
moe_dist/train/step.py | import pickle | pickle runs what
tools/train_tokenizer.py | from pickle import loads | pickle.loads runs what
moe_dist/checkpoint/shards.py | import shelve, marshal;from dill import loads;import joblib as j | runs what
moe_dist/checkpoint/manager.py | torch.load("x") | torch.load runs what
moe_dist/checkpoint/manager.py | from torch import load as read | torch.load runs what
launcher/backends/local.py | import yaml as y;y.load(text, y.SafeLoader) | yaml.load runs what
launcher/backends/local.py | subprocess.run("ls", shell=True) | shell= must be False
moe_dist/data/tokenizer.py | load("x", trust_remote_code=True) | trust_remote_code= must be False
moe_dist/data/cache.py | np.load("x", allow_pickle=flag) | allow_pickle= must be False
"""


@pytest.mark.parametrize("plant", PLANTS.strip().splitlines())
def test_the_checker_sees(plant: str) -> None:
    path, line, said = plant.split(" | ")
    found = set(violations(with_more(path, line))) - set(violations_now())
    assert any(said in text for text in found)
    # What imports upwards often closes a circle, too.
    assert [text for text in found if said not in text and "imports itself" not in text] == []


ALLOWED = """
moe_dist/train/step.py | import torch.distributed;from moe_dist.monitor import records;record.all_to_all_share
moe_dist/parallel/layout.py | def f():;    import torch
moe_dist/parallel/layout.py | if TYPE_CHECKING:;    import torch
moe_dist/data/tokenizer.py | load("x", trust_remote_code=False);yaml.safe_load("x")
tests/parallel/test_layout.py | import pickle, tiny
tools/train_tokenizer.py | import launcher.rank.worker
"""


@pytest.mark.parametrize("plant", ALLOWED.strip().splitlines())
def test_the_checker_lets_pass(plant: str) -> None:
    path, line = plant.split(" | ")
    assert violations(with_more(path, line)) == violations_now()


def test_what_a_light_module_loads_for_real_is_seen(tmp_path: Path) -> None:
    for folder in ("moe_dist", "launcher"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "moe_dist/models/counts.py").open("a") as end:
        end.write("\n__import__('num' + 'py')\n")
    assert heavy_after_start(tmp_path) == ["numpy"]
