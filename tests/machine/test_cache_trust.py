"""Whom the cache trusts: code that somebody else may have written is not executed."""

import os
import subprocess
import sys

import pytest

from mirrormask.machine import cache, code, objects

NAME = f"test_{'0' * 24}"
IR = """
@table = internal constant [3 x i64] [i64 5, i64 7, i64 11]
define internal i64 @entry(i64 %i) noinline {
  %p = getelementptr i64, ptr @table, i64 %i
  %v = load i64, ptr %p
  ret i64 %v
}
define i64 @NAME(i64 %i) {
  %v = call i64 @entry(i64 %i)
  %w = mul i64 %v, 2
  ret i64 %w
}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def value(kind: str, monkeypatch, compiles: bool) -> list[int]:
    """What the function gives, called by its address."""
    import ctypes

    engine = code.host_engine
    made = []
    monkeypatch.setattr(code, "host_engine", lambda: made.append(1) or engine())
    address = code.functions(kind, IR.replace("NAME", kind), [kind])[kind]
    monkeypatch.setattr(code, "host_engine", engine)
    assert bool(made) == compiles
    function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address)
    return [function(i) for i in range(3)]


@pytest.mark.skipif(not objects.serves(), reason="object code of another kind")
def test_code_is_compiled_once_and_loaded_from_then_on(folder, monkeypatch):
    assert value("once", monkeypatch, True) == [10, 14, 22]
    assert value("once", monkeypatch, False) == [10, 14, 22]
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert value("once", monkeypatch, True) == [10, 14, 22]


@pytest.mark.skipif(os.name != "posix", reason="no modes")
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_not_executed(folder, mode, monkeypatch):
    cache.store_bytes(NAME, b"code")
    assert cache.load_bytes(NAME) == b"code"
    os.chmod(folder / f"{NAME}.o", mode)
    assert cache.load_bytes(NAME) is None


@pytest.mark.skipif(os.name != "posix", reason="no modes")
@pytest.mark.parametrize("mode", [0o770, 0o703, 0o1777])
def test_a_folder_that_others_may_write_is_not_trusted(folder, mode):
    cache.store_bytes(NAME, b"code")
    os.chmod(folder, mode)
    assert cache.load_bytes(NAME) is None


@pytest.mark.skipif(os.name != "posix", reason="no users")
def test_what_another_user_owns_is_not_trusted(folder, monkeypatch):
    cache.store_bytes(NAME, b"code")
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert cache.load_bytes(NAME) is None


@pytest.mark.skipif(not objects.serves(), reason="object code of another kind")
@pytest.mark.parametrize("how", ["not trusted", "not loadable", "not of this machine"])
def test_code_is_compiled_where_it_cannot_be_taken_from_the_cache(folder, how, monkeypatch):
    kind = how.replace(" ", "_")
    assert value(kind, monkeypatch, True) == [10, 14, 22]
    if how == "not trusted":
        os.chmod(folder, 0o777)
    elif how == "not loadable":
        monkeypatch.setattr(objects, "load", lambda *_: None)
    else:
        monkeypatch.setattr(objects, "serves", lambda: False)
    assert value(kind, monkeypatch, True) == [10, 14, 22]


@pytest.mark.skipif(not objects.serves(), reason="object code of another kind")
def test_objects_that_need_others_or_are_none_are_refused():
    from mirrormask.machine.jit import host_engine

    needy = (
        "declare i64 @elsewhere(i64)\ndefine i64 @here(i64 %i) {\n %v = call i64 @elsewhere(i64 %i)\n ret i64 %v\n}\n"
    )
    made = host_engine().object_code(needy)
    assert objects.load(made, ["here"]) is None
    good = host_engine().object_code(IR.replace("NAME", "good"))
    assert objects.load(good, ["good"]) and objects.load(good, ["bad"]) is None
    for broken in (b"", b"\x7fELF", good[:100], good[:-200], b"MZ" + good[2:]):
        assert objects.load(broken, ["good"]) is None


STEPS = """
import sys, torch, mirrormask as mm
for factors in (True, False):
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 30)
    optimizer = mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
                            mm.methods.mirror(0.5, factors=factors), steps=9)
    for _ in range(9):
        model(torch.randn(8, 40)).square().sum().mul(1e-3).backward()
        optimizer.step()
    assert type(optimizer._steps[0]).__name__ == "FusedCPU" and optimizer._steps[0]._table is not None
    print(model.weight.double().sum().item())
print("llvmlite.binding" in sys.modules)
"""


@pytest.mark.skipif(not objects.serves(), reason="object code of another kind")
def test_a_second_process_steps_alike_without_llvm(folder):
    def run() -> list[str]:
        environment = {**os.environ, "MIRRORMASK_CACHE": str(folder)}
        result = subprocess.run([sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()

    first, second = run(), run()
    assert first[-1] == "True" and second[-1] == "False"
    assert first[:-1] == second[:-1]
