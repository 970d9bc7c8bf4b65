"""The named methods: a geometry, a decay and a mask together, and what follows the step; a few lines each."""

from mirrormask.methods.at_start import erk, grasp, random, snip, synflow, uniform
from mirrormask.methods.base import Method, Row, get, named, names, table
from mirrormask.methods.dynamic import rigl, set, sparseopt
from mirrormask.methods.ham import acdc_ham, erk_ham, gmp_ham, ham, rigl_ham, str_ham
from mirrormask.methods.iterative import lrr, lth, wr
from mirrormask.methods.magnitude import acdc, dense, gmp, magnitude
from mirrormask.methods.mirror import mirror
from mirrormask.methods.penalized import cs, elsa, l1, powerprop
from mirrormask.methods.penalized import soft_threshold as str
from mirrormask.methods.pilot import pilot, pilot_init, pilot_lrr, pilot_wr
from mirrormask.methods.product import dwf, sign_in, spred

__all__ = [
    "Method",
    "Row",
    "acdc",
    "acdc_ham",
    "cs",
    "dense",
    "dwf",
    "elsa",
    "erk",
    "erk_ham",
    "get",
    "gmp",
    "gmp_ham",
    "grasp",
    "ham",
    "l1",
    "lrr",
    "lth",
    "magnitude",
    "mirror",
    "named",
    "names",
    "pilot",
    "pilot_init",
    "pilot_lrr",
    "pilot_wr",
    "powerprop",
    "random",
    "rigl",
    "rigl_ham",
    "set",
    "sign_in",
    "snip",
    "sparseopt",
    "spred",
    "str",
    "str_ham",
    "synflow",
    "table",
    "uniform",
    "wr",
]
