"""The generated code itself: what the processor is told to do in the inner loop, also where it cannot be run."""

import dataclasses
import re

import pytest

from mirrormask.machine.targets import FP16, TARGETS, Target, best_target
from mirrormask.runtime.kernels import sparse, winograd
from mirrormask.runtime.kernels.activation import Activation
from mirrormask.runtime.kernels.layout import map_layout
from mirrormask.runtime.kernels.tile import Tile

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
TRIPLES = {"avx512": X86, "avx2": X86, "avx512fp16": X86, "neon": ARM}
EVERY = {**TARGETS, FP16.name: FP16}


def sparse_kernel(target: Target) -> str:
    """The sparse kernel for a 3x3 convolution of 28x28 maps."""
    layout = dataclasses.replace(map_layout(1, 28, 28, target.lanes, halo=1), channels=1)
    tile = Tile(1, layout.vectors, layout, layout.pitch, (Activation("relu"),), True)
    return sparse.emit(sparse.SparseSpec(target, tile, (-1, 0, 1), True, True), "kernel")


def filtering_kernel(target: Target) -> str:
    """The kernel that filters rows, for six channels of a 3x3 convolution and as many vectors as leave registers."""
    layout = dataclasses.replace(map_layout(1, 64, 64, target.lanes, halo=0, gap=1), channels=1)
    tile = Tile(4, SUMS[target.name], layout, 4096, (Activation("relu"),), True)
    return winograd.emit(winograd.WinogradSpec(target, tile, 6, 3), "kernel")


#: Vectors of sums of six channels.
SUMS = {"avx512": 4, "avx2": 2, "neon": 4}


def assembly(name: str, ir: str, level: int = 3) -> str:
    """A kernel compiled for another machine, if need be."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = EVERY[name]
    try:
        machine = llvm.Target.from_triple(TRIPLES[name]).create_target_machine(features=target.features, opt=3)
    except RuntimeError:
        pytest.skip(f"this LLVM cannot generate code for {TRIPLES[name]}")
    module = llvm.parse_assembly(ir)
    module.verify()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=level))
    builder.getModulePassManager().run(module, builder)
    return str(machine.emit_assembly(module))


def loops(text: str) -> list[str]:
    """The basic blocks that jump back to themselves."""
    blocks = re.split(r"^(\.L\w+):", text, flags=re.MULTILINE)[1:]
    pairs = zip(blocks[::2], blocks[1::2], strict=True)
    return [body for label, body in pairs if re.search(rf"\b(?:j\w+|b(?:\.\w+)?|cb\w+)\b.*{re.escape(label)}\b", body)]


@pytest.mark.parametrize(
    ("name", "multiply_add", "register"),
    [
        ("avx512fp16", r"vfmadd\w+ph", "zmm"),
        ("avx512", r"vfmadd\w+ps", "zmm"),
        ("avx2", r"vfmadd\w+ps", "ymm"),
        ("neon", r"fmla", r"\.4s"),
    ],
)
def test_the_inner_loop_is_one_vector_multiply_add_per_vector_of_the_tile(name, multiply_add, register):
    inner = [body for body in loops(assembly(name, sparse_kernel(EVERY[name]))) if re.search(multiply_add, body)]
    vectors = map_layout(1, 28, 28, EVERY[name].lanes, halo=1).vectors
    assert len(inner) == 3, "one loop for each kernel column"
    for body in inner:
        lines = [line for line in body.splitlines() if re.search(rf"\b{multiply_add}\b", line)]
        assert len(lines) % vectors == 0 and lines
        assert all(re.search(register, line) for line in lines)
        assert "call" not in body and "sp]" not in body and "%rsp" not in body, "spills or calls in the inner loop"


@pytest.mark.parametrize(
    ("name", "multiply_add"), [("avx512", r"vfmadd\w+ps"), ("avx2", r"vfmadd\w+ps"), ("neon", r"fmla")]
)
def test_the_sums_of_filtered_rows_stay_in_registers(name, multiply_add):
    text = assembly(name, filtering_kernel(EVERY[name]), winograd.WINOGRAD.level)
    products = [body for body in loops(text) if len(re.findall(multiply_add, body)) >= 6 * SUMS[name]]
    assert products
    for body in products:
        assert len(re.findall(multiply_add, body)) % (6 * SUMS[name]) == 0
        assert "call" not in body and "sp]" not in body and "%rsp" not in body, "spills or calls in the inner loop"


def test_the_best_instruction_set_is_chosen_and_others_can_be_named():
    assert best_target("scalar").name == "scalar"
    with pytest.raises(ValueError, match="Known: avx2, avx512, neon, scalar"):
        best_target("sse")
    missing = next(name for name in ("neon", "avx512") if TARGETS[name].machine != best_target().machine)
    with pytest.raises(ValueError, match="cannot run"):
        best_target(missing)
