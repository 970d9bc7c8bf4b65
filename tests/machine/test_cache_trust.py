"""Whom the cache trusts: code that somebody else may have written is not executed."""

import os
import random
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from mirrormask.machine import cache, code, objects
from mirrormask.runtime.graph import known

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


KEY = "1" * 40
OTHER = 4321  # a user that is not this one


@pytest.fixture
def warned(monkeypatch):
    """As in a process that has not been warned; gives what it is warned of."""
    monkeypatch.setattr(cache, "_warned", threading.Lock())
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


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


def damaged(good: bytes) -> dict[str, bytes]:
    """Kinds of what is not, or not wholly, the object that it should be."""
    kinds = {"empty": b"", "text": b"hello" * 40, "half": good[: len(good) // 2], "header": good[:64]}
    kinds |= {
        "start": good[:20],
        "tail": good[:-30],
        "magic": b"MZ" + good[2:],
        "program": good[:16] + b"\2" + good[17:],
    }
    kinds |= {"machine": good[:18] + b"\xb7" + good[19:], "count": good[:60] + b"\xff\xff" + good[62:]}
    return kinds | {"entry": good[:40] + b"\xff" * 8 + good[48:], "name": good.replace(b"good", b"evil")}


@pytest.mark.skipif(not objects.serves(), reason="object code of another kind")
def test_an_object_is_looked_at_before_it_is_loaded():
    from mirrormask.machine.jit import host_engine

    good = host_engine().object_code(IR.replace("NAME", "good"))
    assert objects.defines(good, "good") and not objects.defines(good, "goo")
    for kind, bad in damaged(good).items():
        assert not objects.defines(bad, "good"), kind
        assert objects.load(bad, ["good"]) is None or kind in ("program", "tail"), kind
    generator = random.Random(0)
    for _ in range(2000):
        place, bit = generator.randrange(len(good)), 1 << generator.randrange(8)
        bad = good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :]
        assert objects.defines(bad, "good") in (True, False), "it never raises"
        assert (found := objects.load(bad, ["good"])) is None or "good" in found


@pytest.mark.skipif(not objects.serves(), reason="object code of another kind")
def test_a_step_whose_code_does_not_load_is_compiled_again(folder, monkeypatch):
    assert value("again", monkeypatch, True) == [10, 14, 22]
    (file,) = folder.iterdir()
    for bad in damaged(cache.load_bytes(file.stem)).values():
        cache.store_bytes(file.stem, bad.replace(b"again", b"never"))
        assert value("again", monkeypatch, True) == [10, 14, 22]


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
@pytest.mark.long
def test_a_second_process_steps_alike_without_llvm(folder):
    def run() -> list[str]:
        environment = {**os.environ, "MIRRORMASK_CACHE": str(folder)}
        result = subprocess.run([sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()

    first, second = run(), run()
    assert first[-1] == "True" and second[-1] == "False"
    assert first[:-1] == second[:-1]


def contents(folder):
    """All that lies there, and when it was last written."""
    return {path: (path.lstat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


def neither_read_nor_written(folder, warned, culprit) -> None:
    """The law: object code and JSON alike, one warning that names the culprit and a way out, nothing touched."""
    before = contents(folder)
    for _ in range(2):
        assert cache.load_bytes(NAME) is None and known.load(KEY) is None
        cache.store_bytes(NAME, b"new")
        known.store(KEY, {"new": 1})
        cache.prune(most_bytes=0)
    assert contents(folder) == before
    (warning,) = warned
    text = str(warning.message)
    assert text.startswith(f"{culprit}") and "MIRRORMASK_CACHE" in text and warning.category is RuntimeWarning
    assert warning.filename == __file__, "it points at the user's line"


def filled() -> None:
    cache.store_bytes(NAME, b"code")
    known.store(KEY, {"old": 1})
    assert cache.load_bytes(NAME) == b"code" and known.load(KEY) == {"old": 1}


posix = pytest.mark.skipif(os.name != "posix", reason="no modes")
root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")


@posix
@pytest.mark.parametrize("mode", [0o770, 0o703, 0o1777, 0o720])
def test_a_folder_that_others_may_write_is_neither_read_nor_written(folder, mode, warned):
    filled()
    folder.chmod(mode)
    neither_read_nor_written(folder, warned, folder)


@posix
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_nor_is_one_that_others_may_rename(folder, mode, warned, tmp_path, monkeypatch):
    for parent in (tmp_path / "a", tmp_path / "a" / "b"):
        monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path / "a" / "b" / "cache"))
        filled()
        parent.chmod(mode)
        monkeypatch.setattr(cache, "_is_mine_alone", lambda _: False)
        neither_read_nor_written(tmp_path, warned, parent)
        parent.chmod(0o1777)
        assert cache.load_bytes(NAME) == b"code", "in a sticky folder, as /tmp is, each may rename what is theirs"
        warned.clear()
        monkeypatch.setattr(cache, "_warned", threading.Lock())
    (tmp_path / "a").chmod(mode)
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path / "a" / "new"))
    filled_in_vain = contents(tmp_path)
    assert cache.load_bytes(NAME) is None and not warned, "there is nothing, and so nothing to distrust"
    cache.store_bytes(NAME, b"code")
    assert contents(tmp_path) == filled_in_vain and not (tmp_path / "a" / "new").exists() and len(warned) == 1


@posix
def test_a_parent_that_only_the_users_own_group_may_write_is_none_of_others(folder, tmp_path, monkeypatch):
    grp, pwd = pytest.importorskip("grp"), pytest.importorskip("pwd")
    own = type("Facts", (), {"pw_name": "me", "pw_gid": 77, "gr_name": "me", "gr_mem": []})
    monkeypatch.setattr(pwd, "getpwuid", lambda _: own)
    monkeypatch.setattr(grp, "getgrgid", lambda _: own)
    assert cache._is_mine_alone(77) and not cache._is_mine_alone(78)
    own.gr_mem = ["me", "you"]
    assert not cache._is_mine_alone(77)
    own.gr_mem, own.gr_name = [], "users"
    assert not cache._is_mine_alone(77)
    own.pw_gid, own.gr_name = 0, "me"
    assert not cache._is_mine_alone(0), "containers give root's group to any user"


@root
@pytest.mark.parametrize("whose", ["folder", "code", "json", "parent", "link", "target"])
def test_what_belongs_to_another_is_neither_read_nor_written(folder, whose, warned, tmp_path, monkeypatch):
    parent, link = tmp_path / "parent", tmp_path / "link"
    monkeypatch.setenv("MIRRORMASK_CACHE", str(parent / "cache"))
    filled()
    if whose in ("link", "target"):
        link.symlink_to(parent, target_is_directory=True)
        monkeypatch.setenv("MIRRORMASK_CACHE", str(link / "cache"))
        assert cache.load_bytes(NAME) == b"code", "links of root and of this user are followed"
    places = {"folder": parent / "cache", "parent": parent, "target": parent, "link": link}
    files = {"code": parent / "cache" / f"{NAME}.o", "json": parent / "cache" / f"{KEY}.json"}
    culprit = {**places, **files}[whose]
    os.chown(culprit, OTHER, OTHER, follow_symlinks=False)
    if whose in places:
        neither_read_nor_written(parent, warned, culprit)
        return
    before = culprit.read_bytes()
    filled_again = (cache.load_bytes(NAME), known.load(KEY))
    cache.store_bytes(NAME, b"new")
    known.store(KEY, {"new": 1})
    assert culprit.read_bytes() == before
    assert filled_again == ((None, {"old": 1}) if whose == "code" else (b"code", None))
    assert [str(warning.message).startswith(f"{culprit} belongs to user {OTHER}") for warning in warned] == [True]


@posix
@pytest.mark.parametrize("name", [f"{NAME}.o", f"{KEY}.json"])
@pytest.mark.parametrize("how", ["writable", "link"])
def test_a_file_that_others_may_write_is_left_alone(folder, name, how, warned, tmp_path):
    filled()
    path = folder / name
    if how == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.chmod(0o622)
    before = path.read_bytes()
    assert None in (cache.load_bytes(NAME), known.load(KEY))
    cache.store_bytes(NAME, b"new")
    known.store(KEY, {"new": 1})
    assert path.read_bytes() == before and path.is_symlink() == (how == "link")
    (warning,) = warned
    assert str(path) in str(warning.message)


@posix
def test_links_to_ones_own_place_are_followed_and_to_one_open_to_all_are_not(folder, warned, tmp_path, monkeypatch):
    filled()
    link = tmp_path / "link"
    link.symlink_to("cache")
    again = tmp_path / "again"
    again.symlink_to(tmp_path / "." / "cache" / ".." / "link")
    monkeypatch.setenv("MIRRORMASK_CACHE", str(again))
    assert cache.load_bytes(NAME) == b"code" and not warned
    folder.chmod(0o777)
    neither_read_nor_written(folder, warned, folder)
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    monkeypatch.setenv("MIRRORMASK_CACHE", str(circle))
    cache.store_bytes(NAME, b"code")
    assert cache.load_bytes(NAME) is None


@posix
def test_what_takes_the_folders_place_after_the_look_is_not_used(folder, monkeypatch, tmp_path):
    filled()
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / f"{NAME}.o").write_bytes((folder / f"{NAME}.o").read_bytes())
    walk, opened = cache._walk, os.open

    def exchanged(*arguments):
        real = walk(*arguments)
        folder.rename(tmp_path / "away")
        folder.symlink_to(tmp_path / "evil")
        return real

    monkeypatch.setattr(cache, "_walk", exchanged)
    assert cache.load_bytes(NAME) is None
    monkeypatch.undo()

    def late(path, *arguments, dir_fd=None, **keywords):
        if dir_fd is not None:
            folder.unlink()
            folder.symlink_to(tmp_path / "evil")
        return opened(path, *arguments, dir_fd=dir_fd, **keywords)

    folder.unlink()
    folder.symlink_to(tmp_path / "away")
    monkeypatch.setenv("MIRRORMASK_CACHE", str(folder))
    (tmp_path / "evil" / f"{NAME}.o").write_bytes(b"evil")
    monkeypatch.setattr(os, "open", late)
    assert cache.load_bytes(NAME) == b"code", "files are opened in the folder that was looked at"


@posix
def test_folders_are_made_for_the_user_alone_whatever_the_umask(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path / "a" / "b"))
    before = os.umask(0)
    try:
        filled()
    finally:
        os.umask(before)
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        assert path.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a" / "b").iterdir()} == {0o600}


@posix
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_not_waited_for(folder, kind):
    filled()
    path = folder / f"{NAME}.o"
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    assert cache.load_bytes(NAME) is None
    cache.store_bytes(NAME, b"code")


def test_the_variables_decide_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path / "own"))
    assert cache.cache_folder() == tmp_path / "own"
    monkeypatch.setenv("MIRRORMASK_CACHE", "")
    assert cache.cache_folder() is None
    monkeypatch.delenv("MIRRORMASK_CACHE")
    assert cache.cache_folder() == tmp_path / "xdg" / "mirrormask"
    for not_set in ("", "cache", "./cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", not_set)
        assert cache.cache_folder() == tmp_path / ".cache" / "mirrormask"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.cache_folder() == tmp_path / "Library" / "Caches" / "mirrormask"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "mirrormask"


def test_an_empty_name_is_no_cache_and_a_relative_one_stays_where_it_began(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIRRORMASK_CACHE", "")
    cache.store_bytes(NAME, b"code")
    assert cache.load_bytes(NAME) is None and cache.prune() == 0 and not list(tmp_path.iterdir())
    monkeypatch.setenv("MIRRORMASK_CACHE", "here")
    cache._absolute.cache_clear()
    filled()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    filled()
    assert not list(Path.cwd().iterdir()) and cache.cache_folder() == tmp_path / "here"
    cache._absolute.cache_clear()


HOMELESS = """
import os, sys, warnings
warnings.simplefilter("error")
for name in ("HOME", "USER", "LOGNAME", "MIRRORMASK_CACHE", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
import torch, mirrormask as mm
from mirrormask.machine import cache, code

def compiled():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
    x = torch.randn(1, 3, 8, 8)
    assert torch.allclose(mm.compile(model, x, force=True, tune=False)(x), model(x), atol=1e-5)

def stepped():
    model = torch.nn.Linear(40, 30)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = mm.sparsify(model, sgd, mm.methods.mirror(0.5), steps=9)
    model(torch.randn(8, 40)).square().sum().mul(1e-3).backward()
    optimizer.step()
    assert type(optimizer._steps[0]).__name__ == "FusedCPU" and optimizer._steps[0]._table is not None

os.environ["MIRRORMASK_CACHE"] = ""
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    compiled()  # torch reads its own files late, and this user's Python may be in root's home
del os.environ["MIRRORMASK_CACHE"]
for home in HOMES:
    if home is not None:
        os.environ["HOME"] = home
        assert home or cache.cache_folder() is None
    elif os.geteuid() == 0:
        os.setgid(54321)
        os.setuid(54321)
    else:
        import pwd
        def unknown(_):
            raise KeyError("uid not found")
        pwd.getpwuid = unknown
    compiled()
    stepped()
for home in ("/nonexistent", "/dev/null", ""):
    assert not os.path.exists(os.path.join(home, ".cache/mirrormask")), home
print("done")
"""


@posix
@pytest.mark.parametrize("homes", [[None], ["/nonexistent", "/dev/null", "", "/proc"]], ids=["no entry", "no folder"])
@pytest.mark.cases(1)
def test_without_a_home_all_works_and_nothing_is_said(homes):
    script = HOMELESS.replace("HOMES", repr(homes))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "done\n", result.stderr
    assert not Path("/nonexistent").exists()


@posix
@pytest.mark.parametrize("error", ["EROFS", "ENOSPC", "EDQUOT", "EACCES"])
@pytest.mark.parametrize("call", ["mkdir", "open", "fsync", "replace", "write"])
def test_a_disk_that_is_full_or_read_only_is_no_error(folder, error, call, monkeypatch, warned):
    import errno

    def fails(*_, **__):
        raise OSError(getattr(errno, error), error)

    if call != "mkdir":
        filled()
    before = contents(folder)
    with monkeypatch.context() as patched:
        if call == "write":
            patched.setattr(cache, "open", lambda *_, **__: fails(), raising=False)
        else:
            patched.setattr(os, call, fails)
        cache.store_bytes(NAME, b"new")
        known.store(KEY, {"new": 1})
    assert contents(folder) == before, "no part is left"
    assert not warned
    filled()
