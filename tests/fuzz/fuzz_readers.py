"""Coverage-guided fuzz targets for the readers of all else that a stranger can hand over, with atheris (libFuzzer).

    python tests/fuzz/fuzz_readers.py READER [--seconds N | -runs=N] [corpus folder]

READER is one of: recipe, checkpoint, log, result, distributions, predictions, bench, structure. The first byte of an
input chooses how the rest is used: as the whole file; as changes to a sound file; or as changes to the values of a
sound one, written, and signed where files are, anew. Whatever happens, a reader must return what it promises or raise
what it promises.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "report")]
INSTRUMENTED = {
    "recipe": ["mirrormask.train.plain_yaml", "mirrormask.train.recipe_file", "mirrormask.train.recipe"],
    "checkpoint": ["mirrormask.train.checkpoint_file", "mirrormask.train.tree", "mirrormask.storage.container"],
    "log": ["mirrormask.train.log", "mirrormask.train.schema", "mirrormask.report.curves"],
    "result": ["mirrormask.train.run_folder", "mirrormask.train.schema", "mirrormask.train.recipe_file"],
    "distributions": ["mirrormask.report.distributions", "mirrormask.train.schema"],
    "predictions": ["mirrormask.report.changes", "mirrormask.train.schema"],
    "bench": ["mirrormask.compare.runs", "mirrormask.train.schema"],
    "structure": [
        "mirrormask.runtime.graph.known",
        "mirrormask.runtime.graph.blueprint",
        "mirrormask.runtime.graph.ir",
    ],
}

if __name__ == "__main__":
    import atheris

    if len(sys.argv) < 2 or sys.argv[1] not in INSTRUMENTED:
        sys.exit(__doc__)
    with atheris.instrument_imports(include=INSTRUMENTED[sys.argv[1]]):
        for module in INSTRUMENTED[sys.argv[1]]:
            __import__(module)

import torch  # noqa: E402
from synthetic_runs import make_run  # noqa: E402
from torch import nn  # noqa: E402

from mirrormask.compare import measured  # noqa: E402
from mirrormask.report import changes, curves, distributions  # noqa: E402
from mirrormask.runtime.graph import known  # noqa: E402
from mirrormask.runtime.graph.blueprint import Blueprint  # noqa: E402
from mirrormask.runtime.graph.program import module_of  # noqa: E402
from mirrormask.storage.container import build_header  # noqa: E402
from mirrormask.train import RunResult, checkpoint_file, log, recipe_file  # noqa: E402
from mirrormask.train.checkpoint_file import CheckpointError  # noqa: E402

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
RUN = FOLDER / "run"
RESULT = make_run(RUN, timed=True, epochs=2)
STATE = {"session": {"epoch": 1, "step": 3, "model": {"w": torch.arange(4.0)}}, "last": {"loss": 0.5}, "best": None,
         "rates": [(0.1, float("inf"))]}  # fmt: skip
#: What takes the place of a value: of every kind, and at the ends of each.
ODD = [None, True, 0, -1, 2**53 + 1, 2**63, 10**400, 0.5, -0.0, 1e308, "", "x", "\ud800", "../x", [], {}, [[]], [None],
       {"tensor": "0"}, {"tuple": []}, {"dict": [[None, 0], [None, 1]]}, {"float": "nan"}]  # fmt: skip
REFUSED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
NAMES = {"recipe": "recipe.yaml", "log": "log.jsonl", "result": "result.json", "distributions": "distributions.json",
         "predictions": "predictions.json", "bench": "bench.json"}  # fmt: skip


def changed_bytes(sound: bytes, data: bytes) -> bytes:
    """The sound file with bytes replaced at the places that ``data`` names, and perhaps cut."""
    file = bytearray(sound)
    for index in range(0, len(data) - 2, 3):
        file[int.from_bytes(data[index : index + 2], "little") % len(file)] = data[index + 2]
    return bytes(file[: len(file) - data[0] if data and data[0] < 128 else None])


def changed_values(tree, data: bytes):
    """A copy of a tree with values replaced, removed or nested where ``data`` says."""
    tree, copies = json.loads(json.dumps(tree)), 1
    for index in range(0, len(data) - 5, 6):
        *way, what = data[index : index + 6]
        holder, key = None, None
        for turn in way:
            inner = tree if holder is None else holder[key]
            keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
            if not keys:
                break
            holder, key = inner, list(keys)[turn % len(keys)]
        if holder is None:
            tree = copy.deepcopy(ODD[what % len(ODD)])
        elif what % 16 == 15:
            del holder[key]
        elif what % 16 == 14 and copies <= 64:  # copies of copies would fill all memory
            copies *= what // 16 + 1
            holder[key] = [copy.deepcopy(holder[key]) for _ in range(what // 16 + 1)]
        else:
            holder[key] = copy.deepcopy(ODD[what % len(ODD)])
    return tree


def text_of(tree) -> bytes:
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def made(sound: bytes, values, data: bytes, write=text_of) -> bytes:
    """The file that an input stands for."""
    kind, rest = (data[0] % 3, data[1:]) if data else (0, b"")
    if kind == 0:
        return rest
    return changed_bytes(sound, rest) if kind == 1 else write(changed_values(values, rest))


# -- the readers -------------------------------------------------------------------------------------------------------


class Reader:
    """A file of a run: its sound text, and what is done with another one."""

    def __init__(self, name: str) -> None:
        self.name, self.path = name, RUN / NAMES[name]
        self.sound = self.path.read_bytes()
        self.values = recipe_file.read(self.path) if name == "recipe" else None
        if name == "log":
            self.values = [json.loads(line) for line in self.sound.splitlines()]
        elif self.values is None:
            self.values = json.loads(self.sound)

    def __call__(self, data: bytes) -> str:
        lines = self.name == "log"
        self.path.write_bytes(made(self.sound, self.values, data, lines_of if lines else text_of))
        return "read" if getattr(self, self.name)() else "refused"

    def recipe(self) -> bool:
        try:
            recipe = recipe_file.from_dict(recipe_file.read(self.path))
        except (ValueError, TypeError) as error:
            str(error)
            return False
        recipe.fingerprint()
        return True

    def log(self) -> bool:
        records = log.read(RUN)
        assert all(isinstance(record, dict) for record in records)
        curves.curves(RUN, 40)
        return bool(records)

    def result(self) -> bool:
        try:
            result = RunResult.read(RUN)
        except ValueError as error:
            assert len(str(error)) < 5000
            return False
        assert result.numel < 2**63 and isinstance(result.recipe["method"]["name"], str)
        return True

    def distributions(self) -> bool:
        return distributions.read(RUN) is not None

    def predictions(self) -> bool:
        found = changes.read(RUN)
        return found is not None and changes.changes(found, found) is not None

    def bench(self) -> bool:
        found = measured(RESULT)
        return found is not None and found["seconds"]["mirrormask"] > 0


def lines_of(tree) -> bytes:
    records = tree if isinstance(tree, list) else [tree]
    return b"".join(text_of(record) + b"\n" for record in records)


class Checkpoint:
    """Forged trees come under right checksums."""

    def __init__(self) -> None:
        self.path = FOLDER / "checkpoint"
        checkpoint_file.write(self.path, "f", STATE)
        self.sound = self.path.read_bytes()
        length = int.from_bytes(self.sound[:8], "little")
        header = json.loads(self.sound[8 : 8 + length])
        start, stop = header["tree"]["data_offsets"]
        self.tree = json.loads(self.sound[8 + length :][start:stop])

    def signed(self, tree) -> bytes:
        text, values = text_of(tree), torch.arange(4.0).numpy().tobytes()
        parts = {"0": ("F32", [4], values), "tree": ("U8", [len(text)], text)}
        digests = {name: hashlib.sha256(raw).hexdigest() for name, (_, _, raw) in parts.items()}
        own = checkpoint_file
        metadata = {own.VERSION_KEY: own.VERSION, own.RECIPE_KEY: "f", own.DIGESTS_KEY: json.dumps(digests)}
        header = build_header([(name, kind, shape) for name, (kind, shape, _) in parts.items()], metadata)
        return header + values + text

    def __call__(self, data: bytes) -> str:
        self.path.write_bytes(made(self.sound, self.tree, data, self.signed))
        try:
            checkpoint_file.read(self.path, "f")
        except CheckpointError as error:
            str(error)
            return "refused"
        return "read"


class Structure:
    """What the runtime keeps of a captured model; forged bodies come under right checksums."""

    def __init__(self) -> None:
        import mirrormask as mm

        os.environ["MIRRORMASK_CACHE"] = str(FOLDER / "cache")
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
        mm.compile(model, torch.randn(1, 1, 6, 6))
        for path in (FOLDER / "cache").glob("*.json"):
            if '"program"' in path.read_text():
                self.path, self.sound = path, path.read_bytes()
        stored = json.loads(self.sound)
        self.key, self.body = stored["key"], stored["body"]

    def signed(self, body) -> bytes:
        body = json.loads(json.dumps(body))
        return text_of({"key": self.key, "checksum": known._checksum(self.key, body), "body": body})

    def __call__(self, data: bytes) -> str:
        self.path.write_bytes(made(self.sound, self.body, data, self.signed))
        body = known.load(self.key)
        if body is None:
            return "refused"
        try:
            module_of(Blueprint.from_plain(body), {})
        except REFUSED as error:  # the build captures anew; see runtime/model/parts.py
            return f"refused later: {type(error).__name__}"
        return "read"


def target(name: str):
    return {"checkpoint": Checkpoint, "structure": Structure}.get(name, lambda: Reader(name))()


def main() -> None:
    name, arguments = sys.argv[1], [sys.argv[0], *sys.argv[2:]]
    if "--seconds" in arguments:
        index = arguments.index("--seconds")
        arguments[index : index + 2] = [f"-max_total_time={int(arguments[index + 1])}"]
    check = target(name)
    with tempfile.TemporaryDirectory() as corpus:
        if not any(Path(argument).is_dir() for argument in arguments[1:]):
            seeds = [b"\0" + check.sound, b"\1\xff\xff\0", bytes([2, 0, 1, 2, 3, 4, 5])]
            for index, seed in enumerate(seeds):
                (Path(corpus) / str(index)).write_bytes(seed)
            arguments += [corpus, "-max_len=4096"]
        atheris.Setup(arguments, lambda data: (check(data), None)[1])
        with contextlib.suppress(KeyboardInterrupt):
            atheris.Fuzz()


if __name__ == "__main__":
    main()
