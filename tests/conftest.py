"""Shared set-up: one thread a process, so that results do not depend on how many tests run side by side."""

import os
import zlib

# Read when torch is imported. Threads of OpenMP that wait for their next share would turn on a core that another test,
# or the very thread they wait for, could use.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


#: Of a law's cases, how many ``make test`` tries; ``make test-all`` tries all.
CASES = 2


def pytest_addoption(parser):
    parser.addoption("--sample", action="store_true", help=f"of each law's cases at most {CASES}, and no long tests")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes more than five seconds on a quiet machine; left out by --sample")
    config.addinivalue_line("markers", "early: takes ten seconds and more; begins first, so that no worker ends late")
    config.addinivalue_line("markers", "cases(number): how many cases of this law, or module, --sample keeps")


def pytest_collection_modifyitems(config, items):
    """With ``--sample`` each law keeps a few of its cases, evenly spread; where they start differs from law to law.

    So no law is left out, and what is a case of many laws (a method, a base, an operation) is tried by some of them.
    The choice goes by names alone: it is the same for every worker, and in every run until a case is added.
    """
    if not config.getoption("sample"):
        return
    laws = {}
    for item in items:
        if item.get_closest_marker("long") is None:
            laws.setdefault((item.module.__name__, getattr(item, "originalname", item.name)), []).append(item)
    kept = set()
    for (module, law), cases in laws.items():
        marker = cases[0].get_closest_marker("cases")
        number = min(len(cases), marker.args[0] if marker else CASES)
        start = zlib.crc32(f"{module}.{law}".encode()) % len(cases)
        kept.update(cases[(start + i * len(cases) // number) % len(cases)].nodeid for i in range(number))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]
    items.sort(key=lambda item: item.get_closest_marker("early") is None)
