"""Small runs that are made to be interrupted, and what one leaves."""

import json
import os
import sys
import traceback
import warnings

from mirrormask.train import Data, Method, Model, Recipe, log

COMPARED = ("model.safetensors", "distributions.json", "predictions.json")
#: Of a result, what is allowed to differ.
OWN = ("seconds", "folder", "environment", "recipe")
#: What each data set has of its own: an epoch is some 45 steps of 1,437 digits, and 117 of 60,000 articles of clothing.
SETTINGS = {
    "digits": {"data": {"crop": 1, "flip": True}, "checkpoint_every": "20steps"},
    "fashion-mnist": {"data": {"crop": 2, "flip": True}, "checkpoint_every": "40steps", "batch_size": 512},
}


def recipe(folder, method, *, data="digits", root="data", parallel=None):
    """Two epochs of a small network, with augmentation and a checkpoint every few steps."""
    setting = dict(SETTINGS[data])
    return Recipe(
        data=Data(name=data, root=str(root), **setting.pop("data")),
        model=Model("mlp", {"hidden": [32]}),
        method=Method(method),
        sparsity=0.8,
        epochs=2,
        threads=1,
        log_every=10,
        figure=False,
        parallel=parallel,
        out=str(folder),
        **setting,
    )


def traces(folder):
    """Everything that a finished run leaves and that must not depend on how often it was interrupted."""
    records = [{k: v for k, v in r.items() if k != "seconds"} for r in log.read(folder)]
    result = json.loads((folder / "result.json").read_text())
    kept = {k: v for k, v in result.items() if k not in OWN}
    return records, kept, *((folder / name).read_bytes() for name in COMPARED)


def forked(work):
    """Run ``work()`` in a fork of this process; its exit status, or minus the signal that killed it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        status = 70
        try:
            warnings.simplefilter("ignore")
            work()
            status = 0
        except OSError:
            status = 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
