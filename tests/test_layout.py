"""Who may import whom, and what importing may do. The rules are read from the sources, so that no module escapes."""

import ast
import graphlib
import json
import shutil
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

PACKAGES = {"fastvid": ROOT / "fastvid", "fastvid_kernels": ROOT / "kernels" / "fastvid_kernels"}
# A limit to be far from: half of it is a sign to look for a second subject. No layout of the code changes it.
MOST_STATEMENTS = 290

MOST_AT_THE_TOP = 19  # files of fastvid/ itself: what a user types, and the ground that all stand on

COMMANDS = {
    "train",
    "extract",
    "embed",
    "chat",
    "serve",
    "demo",
    "evaluate",
    "convert",
    "validate",
    "inspection",
    "export",
    "doctor",
}
GROUND = {"config", "flags", "batch", "files", "signals", "provenance", "dist"}
# What each part of fastvid may import of ours, beside itself and the ground; a name stands for all that is below it.
# Everybody may ask for `fastvid` itself (the version). Commands join the parts, and nobody but cli imports a command.
MAY_IMPORT = {
    **{name: set() for name in GROUND - {"batch"}},
    "batch": {"fastvid_kernels"},
    "features": set(),
    "video": {"features", "fastvid_kernels"},
    "data": {"features"},
    "model": {"fastvid_kernels"},
    "checkpoints": set(),
    "weights": {
        "model",
        "checkpoints",
        "data.exported_template",
        "data.names",
        "data.tokenizer",
        "features.towers",
        "video.towers",
    },
    "online": {"features", "video", "data"},
    "training": {"data", "model", "weights", "checkpoints", "fastvid_kernels"},
    "inference": {"features", "video", "data", "model", "weights", "checkpoints"},
    "evaluation": {"features", "data", "inference"},
    "serving": {"features", "video", "inference", "page"},
    "page": {"features", "video"},
    "validation": {"features", "video", "data", "online"},
    "cli": COMMANDS,
    "__main__": {"cli"},
    "fastvid": {"config", "extract", "inference", "train"},  # for type checkers alone: `import fastvid` imports nothing
}
PARTS = set(MAY_IMPORT) - {"cli", "__main__", "fastvid"}

KERNELS_MAY_IMPORT = {"torch", "triton"}
# The one home of a heavy or optional package. The doctor asks PyAV for its version.
HOMES = {
    "av": ("fastvid.video.decode", "fastvid.doctor"),
    "nvidia": ("fastvid.video.decode",),
    "bitsandbytes": ("fastvid.training.adamw8bit", "fastvid.model.quantize"),
    "flash_attn": ("fastvid.model.flash",),
    "flash_attn_interface": ("fastvid.model.flash",),
    "httpx2": ("fastvid.serving.upstream",),
    "jinja2": ("fastvid.data.templates",),
    "liger_kernel": ("fastvid.model.decoder",),
    "pyarrow": ("fastvid.data.parquet",),
    "matplotlib": ("fastvid.training.plots",),
    "prometheus_client": ("fastvid.serving.metrics",),
    "starlette": ("fastvid.serving",),
    "tensorboard": ("fastvid.training.reporters",),
    "uvicorn": ("fastvid.serving.server",),
    "trackio": ("fastvid.training.reporters",),
    "wandb": ("fastvid.training.reporters",),
    "mlflow": ("fastvid.training.reporters",),
}


def modules():
    """{module name: path} of every module of ours."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imports(name, source, known, but_under=("__name__",)):
    """Names of the modules that a module imports, at its top or in a function; not under an `if` of these names."""
    package = name if known.get(name, "") == "package" else name.rpartition(".")[0]
    tree = ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if not (
            isinstance(node, ast.If)
            and {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}.intersection(but_under)
        )
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base


def below(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def allowed(name):
    """What a module of ours may import, as full names."""
    if below(name, "fastvid_kernels"):
        return {"fastvid_kernels"}
    part = name.removeprefix("fastvid.").partition(".")[0]
    own = MAY_IMPORT.get(part, PARTS | {"fastvid_kernels"})  # of a command: all but commands
    return {each if each == "fastvid_kernels" else f"fastvid.{each}" for each in {part, *GROUND, *own}}


def faults(sources, packages=()):
    """What breaks the rules, one line each, in {module name: source}."""
    known = {name: "package" if name in packages else "module" for name in sources}
    graph = {name: set() for name in sources}
    for name, source in sources.items():
        when_run = set(imports(name, source, known, but_under=("__name__", "TYPE_CHECKING")))
        for imported in imports(name, source, known):
            top = imported.partition(".")[0]
            if top not in PACKAGES:
                if below(name, "fastvid_kernels") and top not in KERNELS_MAY_IMPORT | sys.stdlib_module_names:
                    yield f"{name} imports {imported}: kernels import torch and triton alone"
                if top in HOMES and not any(name.startswith(home) for home in HOMES[top]):
                    yield f"{name} imports {imported}, whose home is {', '.join(HOMES[top])}"
            elif imported != "fastvid":
                if imported in when_run:
                    graph[name].add(imported)
                if not any(below(imported, each) for each in allowed(name)):
                    yield f"{name} imports {imported}"
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield f"a circle of imports: {' imports '.join(reversed(error.args[1]))}"


@pytest.mark.slow
def test_imports_keep_to_the_layers():
    found = modules()
    packages = [name for name, path in found.items() if path.name == "__init__.py"]
    assert list(faults({name: path.read_text() for name, path in found.items()}, packages)) == []


@pytest.mark.parametrize(
    "name, source",
    [
        ("fastvid_kernels.pool", "import numpy"),
        ("fastvid_kernels.pool", "from fastvid.batch import PackedBatch"),
        ("fastvid.batch", "import fastvid.features.file"),
        ("fastvid.dist.world", "from fastvid.training import memory"),
        ("fastvid.video.sampling", "from ..data import records"),
        ("fastvid.data.features", "def f():\n    from fastvid.model import decoder"),
        ("fastvid.data.features", "from ..model.decoder import Decoder"),
        ("fastvid.video.encoder", "from fastvid import train"),
        ("fastvid.model.decoder", "from fastvid.video.sampling import frame_indices"),
        ("fastvid.training.adam", "from fastvid.features.file import load_features"),
        ("fastvid.weights.export", "from fastvid.data.records import place"),
        ("fastvid.chat", "from fastvid.extract import extract"),
        ("fastvid.chat", "from fastvid.cli import run"),
        ("fastvid.data.features", "import av"),
        ("fastvid.chat", "import nvidia.dali"),
        ("fastvid.train", "from bitsandbytes.optim import AdamW8bit"),
        ("fastvid.model.decoder", "def f():\n    import flash_attn"),
        ("fastvid.train", "import matplotlib.pyplot"),
        ("fastvid.video.sampling", "def f():\n    from fastvid.video import encoder"),
        ("fastvid.video.sampling", "if TYPE_CHECKING:\n    from fastvid.data.records import place"),
    ],
)
def test_a_broken_rule_is_seen(name, source):
    known = dict.fromkeys(
        [
            "fastvid",
            "fastvid.data",
            "fastvid.video",
            "fastvid.model",
            "fastvid.batch",
            "fastvid.cli",
            "fastvid.train",
            "fastvid.extract",
            "fastvid.features.file",
            "fastvid.model.decoder",
            "fastvid.video.sampling",
            "fastvid.data.records",
            "fastvid.training.memory",
        ],
        "",
    )
    known["fastvid.video.encoder"] = "from fastvid.video.sampling import frame_indices"
    packages = ["fastvid", "fastvid.data", "fastvid.video", "fastvid.model"]
    assert list(faults(known, packages)) == []
    assert len(list(faults(known | {name: source}, packages))) == 1


def test_what_the_rules_allow():
    sources = {
        "fastvid": "",
        "fastvid.data": "",
        "fastvid.weights.export": "",
        "fastvid.features.file": "",
        "fastvid.training.recovery": "from fastvid.weights.export import export",
        "fastvid.chat": "from fastvid import __version__, data\nif __name__ == '__main__':\n"
        "    from fastvid.cli import run",
        "fastvid.export": "from fastvid.features import file",
        "fastvid.cli": "import fastvid.chat",
        "fastvid.video.encoder": "from fastvid.video.passes import Passes",
        "fastvid.video.passes": "if TYPE_CHECKING:\n    from fastvid.video.encoder import FeatureEncoder",
    }
    assert list(faults(sources, ["fastvid", "fastvid.data"])) == []


def test_the_top_is_for_commands_and_the_ground():
    names = {path.stem for path in (ROOT / "fastvid").glob("*.py")}
    assert len(names) <= MOST_AT_THE_TOP
    assert names - {"__init__", "__main__", "cli"} == COMMANDS | GROUND - {"config", "flags", "dist"}


def test_tests_lie_where_their_subject_does():
    folders = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    subjects = {path.name for path in (ROOT / "fastvid").iterdir() if path.is_dir()}
    assert folders <= subjects | {"kernels", "bench"}
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert len(set(names)) == len(names)  # tests import helpers by name


@pytest.mark.slow
def test_a_folder_of_tests_runs_alone():
    """What tests of several folders use lies in support/."""
    folders = {path.stem: path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    for name, folder in folders.items():
        used = set(imports(name, (folder / f"{name}.py").read_text(), {}))
        assert {other for other in used & folders.keys() if folders[other] != folder} == set(), f"{name}.py"


@pytest.mark.slow
def test_files_are_short():
    paths = [*modules().values(), *(ROOT / "scripts").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}
    counts = {path: sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) for path, tree in trees.items()}
    assert {path: count for path, count in counts.items() if count > MOST_STATEMENTS} == {}


def untyped(source):
    """The parameters of a module's public functions and methods that have no type, and their results without one."""

    def public(node, inside):
        for child in node.body:
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                yield from public(child, f"{inside}{child.name}.")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and (
                not child.name.startswith("_") or child.name.endswith("__")
            ):
                yield f"{inside}{child.name}", child, bool(inside)

    for name, function, is_method in public(ast.parse(source), ""):
        if any(ast.unparse(mark).startswith("triton.jit") for mark in function.decorator_list):
            continue  # Triton's language
        takes = function.args
        parameters = [*takes.posonlyargs, *takes.args]
        if is_method and not any(
            isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in function.decorator_list
        ):
            parameters = parameters[1:]
        parameters += [*takes.kwonlyargs, *filter(None, (takes.vararg, takes.kwarg))]
        yield from (f"{name}: {parameter.arg}" for parameter in parameters if parameter.annotation is None)
        if function.returns is None and not name.endswith("__init__"):
            yield f"{name}: its result"


def test_public_functions_have_types():
    assert [f"{path.name}: {what}" for path in modules().values() for what in untyped(path.read_text())] == []


@pytest.mark.parametrize(
    "source, found",
    [
        ("def f(a: int, *, b: int = 0) -> None: ...", []),
        ("def f(a, /, b: int, *c, d=0, **e): ...", ["f: a", "f: d", "f: c", "f: e", "f: its result"]),
        ("def _f(a): ...", []),
        ("class A:\n    def __init__(self, a): ...", ["A.__init__: a"]),
        ("class A:\n    def __call__(self): ...", ["A.__call__: its result"]),
        ("class A:\n    @staticmethod\n    def f(a) -> int: ...", ["A.f: a"]),
        ("class A:\n    def _f(self, a): ...", []),
        ("class _A:\n    def f(self, a): ...", []),
        ("async def f(a) -> int: ...", ["f: a"]),
        ("@triton.jit\ndef f(a): ...", []),
    ],
)
def test_a_missing_type_is_seen(source, found):
    assert list(untyped(source)) == found


@pytest.mark.slow
def test_kernels_folder_is_no_package():
    """transformers would take it for Hugging Face's package of that name, and fail to import a model."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    subprocess.run([sys.executable, "-c", "from transformers import LlamaForCausalLM"], cwd=ROOT, check=True)


IMPORT_ALL = textwrap.dedent("""
    import importlib, json, os, sys
    names, roots, third_party = json.loads(sys.argv[1])
    for name in third_party:
        importlib.import_module(name)
    import torch

    seen, current = [], None
    packages = [os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, *roots)]

    def note(what):
        if current:
            seen.append(f"{current}: {what}")

    def audit(event, arguments):
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path, flags = os.path.realpath(os.fsdecode(arguments[0])), arguments[2] or 0
            if flags & (os.O_WRONLY | os.O_RDWR) or not any(path.startswith(root + os.sep) for root in packages):
                note(f"opens {path}")
        elif event.startswith("socket.") or event in (
                "os.putenv", "os.unsetenv", "os.mkdir", "os.remove", "os.rename", "subprocess.Popen", "os.fork"):
            note(event)

    def ours(frame):
        while frame.f_globals.get("__name__") in ("os", "collections.abc"):
            frame = frame.f_back
        return frame.f_globals.get("__name__", "").partition(".")[0] in ("fastvid", "fastvid_kernels")

    read = os._Environ.__getitem__
    def watched(self, key):
        if ours(sys._getframe(1)):
            note(f"reads the environment variable {key}")
        return read(self, key)
    os._Environ.__getitem__ = watched

    for function in ("is_available", "device_count", "current_device", "get_device_properties"):
        def asked(*arguments, _function=function, **options):
            note(f"asks torch.cuda.{_function}")
            return 0
        setattr(torch.cuda, function, asked)

    sys.addaudithook(audit)
    for current in names:
        importlib.import_module(current)
    current = None
    print(json.dumps(seen))
""")
THIRD_PARTY = [
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch._dynamo",
    "numpy",
    "safetensors.torch",
    "sentencepiece",
    "tokenizers",
    "tqdm.contrib.logging",
    "matplotlib.figure",
    "triton",
    "triton.language",
    "yaml",
    "prometheus_client",
    "starlette.applications",
    "uvicorn.protocols.http.h11_impl",
]


def import_watched(names, roots, third_party=()):
    """What importing modules does beside defining things."""
    command = [sys.executable, "-B", "-c", IMPORT_ALL, json.dumps([names, list(map(str, roots)), third_party])]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(str(root.parent) for root in roots)}
    result = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_importing_touches_nothing():
    assert import_watched(list(modules()), PACKAGES.values(), THIRD_PARTY) == []


@pytest.mark.slow
def test_touching_something_is_seen(tmp_path):
    folder = tmp_path / "fastvid_kernels"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    for name, line in {
        "reads": "open('/etc/hostname').read()",
        "writes": "open(__file__ + '.txt', 'w')",
        "environment": "import os; os.environ.get('HOME')",
        "sets": "import os; os.environ['X'] = '1'",
        "gpu": "import torch; torch.cuda.is_available()",
        "network": "import socket; socket.socket()",
    }.items():
        (folder / f"{name}.py").write_text(line)
    seen = import_watched([f"fastvid_kernels.{path.stem}" for path in sorted(folder.glob("*.py"))], [folder])
    assert {line.partition(":")[0] for line in seen} == {
        f"fastvid_kernels.{name}" for name in ("reads", "writes", "environment", "sets", "gpu", "network")
    }


@pytest.mark.slow
def test_lint():
    ruff = shutil.which("ruff", path=f"{sys.prefix}/bin")
    if ruff is None:
        pytest.skip("ruff is not installed: pip install -e '.[test]'")
    for command in (["check"], ["format", "--check"]):
        result = subprocess.run([ruff, *command, "--no-cache", "."], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout
