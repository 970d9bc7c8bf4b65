"""Which weights live: schedules (one file each), scores, allocations and patterns."""

from mirrormask.masks.allocations import ALLOCATIONS, FLOOR, allocate, floors, keep_count
from mirrormask.masks.alternating import Alternating
from mirrormask.masks.at_start import AtStart
from mirrormask.masks.base import Mask
from mirrormask.masks.exchange import exchange
from mirrormask.masks.gradual import Gradual
from mirrormask.masks.iterative import Iterative
from mirrormask.masks.lamp import select_lamp
from mirrormask.masks.magnitudes import Magnitudes
from mirrormask.masks.never import Never
from mirrormask.masks.one_shot import OneShot
from mirrormask.masks.patterns import protect
from mirrormask.masks.regrow import Regrow
from mirrormask.masks.saliency import DATA_SCORES
from mirrormask.masks.scores import SCORES
from mirrormask.masks.selection import largest, select

__all__ = [
    "ALLOCATIONS",
    "DATA_SCORES",
    "FLOOR",
    "SCORES",
    "Alternating",
    "AtStart",
    "Gradual",
    "Iterative",
    "Magnitudes",
    "Mask",
    "Never",
    "OneShot",
    "Regrow",
    "allocate",
    "exchange",
    "floors",
    "keep_count",
    "largest",
    "protect",
    "select",
    "select_lamp",
]
