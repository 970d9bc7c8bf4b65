"""The weights that a network starts from: which tensor of a file goes where, and what is refused."""

import json

import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.train import init


def net(classes=5, width=8):
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Linear(width, classes))


class Other(nn.Module):
    """The same network, written by someone else."""

    def __init__(self, classes=5):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, classes)


def same(a, b, *names):
    return all(torch.equal(a.state_dict()[name], b.state_dict()[name]) for name in names)


BODY = ("0.weight", "0.bias", "1.weight", "1.running_mean")


#: What wrappers and trainers write before the names, and what they write beside them.
WRAPPED = {
    "wrapped": ("module", {}),
    "wrapped twice": ("_orig_mod.module", {}),
    "a module's network": ("module.model", {}),
    "averaged": ("module", {"n_averaged": torch.tensor(3)}),
    "lightning": ("model", {"loss.weight": torch.ones(5)}),
}
#: And within them: a layer that was compiled, sharded or checkpointed by itself.
WITHIN = {"0.": "0._orig_mod.", "1.": "1._fsdp_wrapped_module._checkpoint_wrapped_module."}


@pytest.mark.parametrize("first", ["", "module.", "model._orig_mod."])
def test_wrappers_within_the_names_are_seen_through(tmp_path, first):
    source, model = net(), net()
    names = {name: first + WITHIN.get(name[:2], name[:2]) + name[2:] for name in source.state_dict()}
    torch.save({names[name]: value for name, value in source.state_dict().items()}, tmp_path / "net.pt")
    said = init.initialise(model, str(tmp_path / "net.pt"), name="net", classes=5)
    assert same(model, source, *source.state_dict())
    assert "wrappers within their names" in said and "nothing asked for" not in said


@pytest.mark.parametrize("layout", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_a_file_of_sparse_tensors(tmp_path, layout):
    source, model = net(), net()
    state = {name: layout(value) if value.dim() == 2 else value for name, value in source.state_dict().items()}
    torch.save(state, tmp_path / "net.pt")
    init.initialise(model, str(tmp_path / "net.pt"), name="net", classes=5)
    assert same(model, source, *source.state_dict())


@pytest.mark.parametrize("kind", ["pt", "within", "own key", *WRAPPED, "safetensors", "sharded", "sparse"])
def test_each_kind_of_file(tmp_path, kind):
    torch.manual_seed(0)
    source, model = net(), net()
    path = tmp_path / ("net.safetensors" if kind in ("safetensors", "sparse") else "net.pth")
    state = source.state_dict()
    if kind == "pt":
        torch.save(state, path)
    elif kind == "within":
        torch.save({"epoch": 3, "state_dict": state}, path)
    elif kind == "own key":  # beside an optimizer's state, as scripts save it
        optimizer = {"state": {i: {"momentum_buffer": value} for i, value in enumerate(state.values())}}
        torch.save({"net": state, "acc": torch.tensor(9.0), "optimizer": {**optimizer, "param_groups": []}}, path)
    elif kind == "sharded":
        places = {name: f"part-{i % 2}.bin" for i, name in enumerate(state)}
        for part in set(places.values()):
            torch.save({name: value for name, value in state.items() if places[name] == part}, tmp_path / part)
        path = tmp_path / "net.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    elif kind in WRAPPED:
        first, beside = WRAPPED[kind]
        torch.save({**{f"{first}.{name}": value for name, value in state.items()}, **beside}, path)
    elif kind == "safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        mm.save(source, path)
    said = init.initialise(model, str(path), name="net", classes=5)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert "9 tensors" in said
    first, beside = WRAPPED.get(kind, ("", {}))
    assert ("without the" in said) == bool(first)
    assert repr(first) in said or not first
    assert all(f"nothing asked for {name}" in said for name in beside)


def test_another_number_of_classes_keeps_the_model_s_own_head_and_says_so(tmp_path):
    source, model, before = net(1000), net(5), net(5)
    before.load_state_dict(model.state_dict())
    torch.save(source.state_dict(), tmp_path / "net.pt")
    said = init.initialise(model, str(tmp_path / "net.pt"), name="net", classes=5)
    assert "2.weight, 2.bias keep their first, random weights: a head for 5 classes" in said
    assert same(model, source, *BODY)
    assert same(model, before, "2.weight", "2.bias")


def test_a_file_without_a_head_and_one_with_more(tmp_path):
    state = {name: value for name, value in net().state_dict().items() if not name.startswith("2.")}
    torch.save({**state, "aux.weight": torch.zeros(2)}, tmp_path / "net.pt")
    said = init.initialise(net(), str(tmp_path / "net.pt"), name="net", classes=5)
    assert "2.weight, 2.bias keep their first" in said
    assert "nothing asked for aux.weight" in said


def test_the_same_network_under_other_names_goes_by_order_and_says_so(tmp_path):
    source, model = Other(7), net(5)
    torch.save(source.state_dict(), tmp_path / "net.pt")
    said = init.initialise(model, str(tmp_path / "net.pt"), name="net", classes=5)
    assert "by their order and shapes, since the names differ: look at the first accuracy" in said
    assert torch.equal(model[0].weight, source.stem.weight)
    assert torch.equal(model[1].running_var, source.norm.running_var)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(3, 4).state_dict(), "none of the names in .* is one of this model's: it has weight, bias"),
        (lambda: net(5, 9).state_dict(), r"does not fit: 0.weight is \(9, 6\) there, \(8, 6\) here"),
        (lambda: {k: v for k, v in net().state_dict().items() if k != "0.bias"}, "lacks 0.bias of this model"),
        (lambda: {("0.bia" if k == "0.bias" else k): v for k, v in net().state_dict().items()},
         "lacks 0.bias of this model; the file has left over 0.bia"),
        (lambda: {k: v.to(torch.int8) if v.dim() == 2 else v for k, v in net().state_dict().items()},
         "has 0.weight, 2.weight as torch.int8, where the model computes with torch.float32"),
        (lambda: {k: v / 0 if k == "1.bias" else v for k, v in net().state_dict().items()}, "nan or inf in 1.bias"),
        (lambda: {k: v.to(torch.float8_e5m2) if v.dim() == 2 else v for k, v in net().state_dict().items()},
         "has 0.weight, 2.weight as torch.float8_e5m2, where the model computes with torch.float32"),
        (lambda: {k: v.double() * 1e300 if k == "0.weight" else v for k, v in net().state_dict().items()},
         "numbers in 0.weight that pass torch.float32"),
        (lambda: {k: v.to("meta") for k, v in net().state_dict().items()}, "without values, on the meta device"),
        (lambda: {"student": net().state_dict(), "teacher": net().state_dict()}, r"its keys: student, teacher"),
        (lambda: [1, 2], "holds a list without tensors by name"),
        (lambda: {"model": 3}, "without tensors by name"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_listed_and_nothing_changes(tmp_path, make, message):
    torch.save(make(), tmp_path / "net.pt")
    model, before = net(), net()
    before.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=message):
        init.initialise(model, str(tmp_path / "net.pt"), name="net", classes=5)
    assert same(model, before, *before.state_dict())


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_a_file_that_would_run_code_and_one_that_is_none(tmp_path, capsys):
    torch.save({"0.weight": Evil()}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="holds no plain state dict"):
        init.initialise(net(), str(tmp_path / "net.pt"), name="net", classes=5)
    torch.save(Other(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"holds no plain state dict but a \S+\.Other of Python's"):
        init.initialise(net(), str(tmp_path / "net.pt"), name="net", classes=5)
    for junk in (b"", b"junk", b"PK\3\4", b"\x80\2"):
        (tmp_path / "net.pt").write_bytes(junk)
        with pytest.raises(ValueError, match=r"net.pt' holds no plain state dict but"):
            init.read(tmp_path / "net.pt")
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"is not a file; give a state dict"):
        init.initialise(net(), str(tmp_path / "no.pt"), name="net", classes=5)
    with pytest.raises(ValueError, match=r"is not a file; it is a folder; name a file in it: net.pt"):
        init.initialise(net(), str(tmp_path), name="net", classes=5)
    for written, message in (("[]", "is no index"), ('{"weight_map": {"0.bias": "../x.bin"}}', "names ../x.bin; ")):
        (tmp_path / "net.json").write_text(written)
        with pytest.raises(ValueError, match=message):
            init.read(tmp_path / "net.json")
    with pytest.raises(ValueError, match="asks timm: or torchvision: for their weights"):
        init.initialise(net(), "pretrained", name="mlp", classes=5)
