"""A short run of each reader's fuzz target on random inputs, without coverage; ``make fuzz`` has the long ones."""

import random

import fuzz_readers
import pytest


@pytest.mark.parametrize("name", sorted(fuzz_readers.INSTRUMENTED))
def test_random_files_are_read_or_refused(name, monkeypatch, tmp_path):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path))
    check, rng = fuzz_readers.target(name), random.Random(7)
    assert check(b"\0" + check.sound) == "read"
    found = {
        check(bytes([rng.randrange(3)]) + rng.randbytes(rng.randrange(1, 24))).partition(":")[0] for _ in range(200)
    }
    assert "refused" in found and found <= {"read", "refused", "refused later"}
