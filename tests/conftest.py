"""Shared set-up: one thread a process, so that results do not depend on how many tests run side by side."""

import os

# Read when torch is imported. Threads of OpenMP that wait for their next share would turn on a core that another test,
# or the very thread they wait for, could use.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
