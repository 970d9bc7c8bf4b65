"""The fused step writing x past the caches: the same numbers as through them, whatever the sizes and places."""

import re

import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.machine.targets import TARGETS
from mirrormask.optimizer.steps.fused_cpu import table
from mirrormask.optimizer.steps.fused_cpu.dual import Dual
from mirrormask.optimizer.steps.fused_cpu.plain import Plain
from mirrormask.optimizer.steps.fused_cpu.product import Product

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
TRIPLES = {"avx512": X86, "avx2": X86, "scalar": X86, "neon": ARM}


class Odd(nn.Module):
    """Parameters of odd sizes, at odd places, in both layouts, and one longer than a block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(1, 1), nn.Linear(7, 5), nn.Linear(37, 53), nn.Conv2d(3, 5, 3)])
        whole = torch.randn(4096)
        for place, shape in ((1, (3, 5)), (67, (31, 33)), (2055, (17, 1))):
            layer = nn.Linear(1, 1)
            view = whole[place : place + shape[0] * shape[1]].view(shape)
            layer.weight = nn.Parameter(view)
            assert layer.weight.data_ptr() % 64
            self.layers.append(layer)
        self.layers[3].weight.data = self.layers[3].weight.data.contiguous(memory_format=torch.channels_last)


def trained(factors: bool, fused: bool, streamed: bool, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    monkeypatch.setattr(table, "STREAMED_ELEMENTS", 0 if streamed else 1 << 62)
    model = Odd()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = mm.sparsify(model, base, mm.methods.mirror(0.6, factors=factors), steps=20, fused=fused)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        for p in model.parameters():
            p.grad = torch.empty_like(p).normal_(generator=generator).mul_(0.1)
        optimizer.step()
    if fused:
        assert optimizer._steps[0]._table._task[-1] == streamed
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("factors", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_streamed_weights_are_the_stored_ones_bit_for_bit(factors, threads, monkeypatch):
    monkeypatch.setattr(table, "ELEMENTS_PER_THREAD", 50)
    monkeypatch.setattr(table, "ELEMENTS_PER_OWN_THREAD", 50)
    torch.set_num_threads(threads)
    streamed = trained(factors, True, True, monkeypatch)
    stored = trained(factors, True, False, monkeypatch)
    plain = trained(factors, False, False, monkeypatch)
    for a, b, c in zip(streamed, stored, plain, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=2e-3, atol=2e-5)


def test_threads_take_over_from_one_another_at_cache_lines(monkeypatch):
    monkeypatch.setattr(table, "ELEMENTS_PER_THREAD", 50)
    torch.set_num_threads(5)
    model = Odd()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = mm.sparsify(model, base, mm.methods.mirror(0.6), steps=20)
    own = optimizer.parts
    made = table.Table(Product(), own.weights, own.base, list(own.weights.values()))
    pieces, starts = made._cut()
    assert len(starts) == 5
    assert all(first % table.LINE == 0 for _, first, _ in pieces)
    for index, x in enumerate(own.weights.values()):
        parts = [(first, count) for of, first, count in pieces if of == index]
        assert sum(count for _, count in parts) == x.numel()
        assert [first for first, _ in parts] == [sum(count for _, count in parts[:i]) for i in range(len(parts))]


@pytest.mark.parametrize(
    ("name", "store"),
    [("avx512", "vmovntps"), ("avx2", "vmovntps"), ("scalar", "movntps"), ("neon", "stnp")],
)
@pytest.mark.parametrize(
    "update",
    [Product(), Dual(), Plain(), Product(narrow=True), Dual(narrow=True)],
    ids=lambda update: update.name + "_narrow" * update.narrow,
)
def test_every_instruction_set_has_the_vectors_and_stores(update, name, store):
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple(TRIPLES[name])
        machine = target.create_target_machine(features=TARGETS[name].features, opt=3)
    except RuntimeError:
        pytest.skip(f"this LLVM cannot generate code for {TRIPLES[name]}")
    for nesterov in (False, True):
        for masked in {False, isinstance(update, Dual)}:
            momenta = nesterov or update.name == "plain"
            module = llvm.parse_assembly(update.ir("step", nesterov=nesterov, masked=masked, momenta=momenta))
            module.verify()
            builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
            builder.getModulePassManager().run(module, builder)
            text = str(machine.emit_assembly(module))
            assert bool(re.search(rf"\b{store}\b", text)) == update.streams
            if name != "scalar":  # which calls a function for a fused multiply-add
                register = {"avx512": r"vfmadd\w+ps.*[yz]mm", "avx2": r"vfmadd\w+ps.*ymm", "neon": r"fmla.*\.4s"}[name]
                assert re.search(register, text), "the loop over a block is not vectorized"
