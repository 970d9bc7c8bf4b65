"""The phases of a run: how long each call of one takes, and a SIGKILL in the middle of it."""

import os
import signal
import threading
import time

from mirrormask.optimizer.mask_changes import MaskChanges
from mirrormask.train import loop
from mirrormask.train.checkpoint import Checkpoints
from mirrormask.train.session import Session

#: Phase -> the functions whose calls it is made of.
PHASES = {
    "start": [(loop, "run")],
    "step": [(Session, "train_epoch")],
    "mask": [(MaskChanges, "prune"), (MaskChanges, "exchange")],
    "evaluation": [(Session, "evaluate")],
    "checkpoint": [(Checkpoints, "save")],
    "finish": [(loop._Run, "_finish")],
}


def watched(phase, after_call):
    """Call ``after_call(number, seconds | None)`` before and after each call of a phase."""
    calls = 0
    for owner, name in PHASES[phase]:
        original = getattr(owner, name)

        def call(*args, _original=original, **kwargs):
            nonlocal calls
            number, calls = calls, calls + 1
            after_call(number, None)
            start = time.perf_counter()
            try:
                return _original(*args, **kwargs)
            finally:
                after_call(number, time.perf_counter() - start)

        setattr(owner, name, call)


def timed(run):
    """Call ``run()``; phase -> seconds of each call. It stays watched, so only in a fork."""
    times = {phase: {} for phase in PHASES}
    begun = time.perf_counter()
    for phase in PHASES:
        watched(phase, lambda at, s, phase=phase: s is not None and times[phase].setdefault(at, s))
    original = Session.train_epoch

    def first(*args, **kwargs):
        times["start"].setdefault(0, time.perf_counter() - begun)  # before the call itself, the whole run, has ended
        return original(*args, **kwargs)

    Session.train_epoch = first
    run()
    return {phase: list(calls.values()) for phase, calls in times.items()}


def kill_in(phase, number, delay):
    """Kill this process so many seconds after the call of that number begins."""

    def shoot():
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def after_call(at, seconds):
        if at == number and seconds is None:
            threading.Thread(target=shoot, daemon=True).start()

    watched(phase, after_call)
