"""Which weights are chosen, and how their zeros are counted."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import mirrormask as mm
from mirrormask.selection import Weights
from mirrormask.storage.reader import read_contents

# What a user's own module is made of: named like Hugging Face's, without transformers.
Conv1D = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})
Experts = type("ToyExperts", (nn.Module,), {"__module__": "transformers.models.toy.modeling_toy"})
Tower = type("Tower", (nn.Module,), {})


def own(kind: type[nn.Module], **shapes: tuple[int, ...]) -> nn.Module:
    """A module of this class with parameters of these shapes."""
    module = kind()
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return module


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3), nn.Embedding(5, 3))


def language_model(*, head_first: bool) -> nn.Module:
    """An embedding and a head that share one tensor, in either order, and a matrix between them."""
    embedding, body, head = nn.Embedding(50, 4), nn.Linear(4, 4), nn.Linear(4, 50, bias=False)
    head.weight = embedding.weight
    model = nn.Module()
    for name, module in sorted({"embedding": embedding, "body": body, "head": head}.items(), reverse=head_first):
        model.add_module(name, module)
    return model


def chosen(model: nn.Module, weights: Weights | None = None) -> list[str]:
    """What is selected, without any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return list(mm.select_weights(model, weights))


def test_default_takes_linear_and_conv_weights_only():
    assert chosen(small()) == ["0.weight", "3.weight"]


RECURRENT = [
    f"weight_{part}_l{layer}{way}" for layer in (0, 1) for way in ("", "_reverse") for part in ("ih", "hh", "hr")
]
LAYERS = {
    "ConvTranspose1d": (nn.ConvTranspose1d(2, 3, 3), ["weight"]),
    "ConvTranspose3d": (nn.ConvTranspose3d(2, 3, 3), ["weight"]),
    "Bilinear": (nn.Bilinear(2, 3, 4), ["weight"]),
    "attention": (nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"]),
    "attention, other keys": (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True),
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
    ),
    "LSTM": (nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2), RECURRENT),
    "GRU": (nn.GRU(3, 4), ["weight_ih_l0", "weight_hh_l0"]),
    "RNN": (nn.RNN(3, 4), ["weight_ih_l0", "weight_hh_l0"]),
    "LSTMCell": (nn.LSTMCell(3, 4), ["weight_ih", "weight_hh"]),
    "Conv1D of transformers": (own(Conv1D, weight=(4, 12), bias=(12,)), ["weight"]),
    "experts of transformers": (own(Experts, gate_up_proj=(2, 8, 4), down_proj=(2, 4, 4), down_bias=(2, 4)), None),
    "a class that inherits": (type("Mine", (nn.Linear,), {})(2, 3), ["weight"]),
    "frozen": (nn.Linear(2, 3).requires_grad_(False), []),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_default_covers_the_matrices_of_every_kind_of_layer_beside_a_linear(kind):
    layer, names = LAYERS[kind]
    names = ["gate_up_proj", "down_proj"] if names is None else names
    assert chosen(nn.Sequential(nn.Linear(2, 2), layer)) == ["0.weight", *(f"1.{name}" for name in names)]


def test_a_conv1d_of_somebody_else_is_not_covered():
    counted = mm.sparsity(nn.Sequential(nn.Linear(2, 2), own(Tower, weight=(4, 12))))
    assert [layer.name for layer in counted.layers] == ["0.weight"]


@pytest.mark.parametrize(
    ("layer", "run"),
    [
        (nn.LSTM(6, 8, proj_size=4), lambda m, x: m(x)[0]),
        (nn.GRUCell(6, 8), lambda m, x: m(x)),
        (nn.MultiheadAttention(6, 2), lambda m, x: m(x, x, x)[0]),
        (nn.Bilinear(6, 6, 3), lambda m, x: m(x, x)),
        (nn.ConvTranspose1d(6, 4, 3), lambda m, x: m(x.T)),
        (parametrizations.spectral_norm(nn.Linear(6, 8)), lambda m, x: m(x)),
        (torch.nn.utils.spectral_norm(nn.Linear(6, 8)), lambda m, x: m(x)),
    ],
    ids=["lstm", "gru cell", "attention", "bilinear", "transposed", "spectral", "spectral, hook"],
)
def test_what_is_covered_is_trained_to_the_sparsity_asked_for(layer, run):
    base = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9)
    optimizer = mm.sparsify(layer, base, mm.methods.mirror(0.75), steps=6)
    for _ in range(6):
        run(layer, torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.finalize()
    counted = mm.sparsity(layer)
    assert counted.nonzeros == round(0.25 * counted.numel)
    assert run(layer.eval(), torch.randn(5, 6)).isfinite().all()


# -- parametrized layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "trained", "made"),
    [
        (parametrizations.weight_norm, "parametrizations.weight.original1", "weight"),
        (torch.nn.utils.weight_norm, "weight_v", "weight"),
        (parametrizations.spectral_norm, "parametrizations.weight.original", "weight"),
        (torch.nn.utils.spectral_norm, "weight_orig", "weight"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_under_a_norm_the_chosen_zeros_are_zeros_of_the_weight(norm, trained, made):
    layer = norm(nn.Linear(3, 4))
    selected = mm.select_weights(layer)
    assert list(selected) == [trained]
    with torch.no_grad():
        selected[trained][:, 1] = 0.0
    layer(torch.randn(2, 3))  # hooks make the weight anew
    assert (getattr(layer, made) == 0).tolist() == [[False, True, False]] * 4
    assert mm.sparsity(layer).nonzeros == 8


@pytest.mark.filterwarnings("ignore")
def test_a_recurrent_layer_under_weight_norm():
    layer = torch.nn.utils.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    assert list(mm.select_weights(layer)) == ["weight_ih_l0", "weight_hh_l0_v"]
    parametrized = parametrizations.weight_norm(nn.GRU(3, 4), "weight_ih_l0")
    assert list(mm.select_weights(parametrized)) == ["weight_hh_l0", "parametrizations.weight_ih_l0.original1"]


def test_weight_norm_warns_of_rows_that_vanish():
    with pytest.warns(UserWarning, match=r"divides each row of 1.parametrizations.weight.original1 by its norm"):
        mm.select_weights(nn.Sequential(nn.Linear(3, 3), parametrizations.weight_norm(nn.Linear(3, 3))))


class Symmetric(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).T


@pytest.mark.parametrize("how", ["orthogonal", "own", "spectral first", "prune"])
def test_a_matrix_whose_zeros_do_not_come_from_the_original_is_left_out_and_named(how):
    layer, name = nn.Linear(3, 3), "1.parametrizations.weight.original"
    if how == "orthogonal":
        parametrizations.orthogonal(layer)
    elif how == "prune":
        prune.l1_unstructured(layer, "weight", amount=3)
        name = "1.weight_orig"
    else:
        if how == "spectral first":
            parametrizations.spectral_norm(layer)
        parametrize.register_parametrization(layer, "weight", Symmetric(), unsafe=True)
    reason = {"orthogonal": "under _Orthogonal a zero", "prune": "torch.nn.utils.prune masks it"}
    why = reason.get(how, "under Symmetric a zero")
    model = nn.Sequential(nn.Linear(40, 3), layer)  # most of it is covered, and still it is named
    with pytest.warns(UserWarning, match=f"these matrices stay dense: {re.escape(name)}: {why}"):
        assert list(mm.select_weights(model)) == ["0.weight"]
    assert chosen(model, [name]) == [name]  # a user may ask for it
    with pytest.raises(ValueError, match=rf"no sparsifiable weight; {name[2:]} is not chosen: {why}"):
        mm.select_weights(layer)


# -- what the default leaves out -------------------------------------------------------------------------------


def towers(layers: int = 3) -> nn.Module:
    return nn.ModuleDict(
        {
            "blocks": nn.ModuleList(own(Tower, mixer=(6, 6), position=(1, 2)) for _ in range(layers)),
            "head": nn.Linear(6, 2),
            "embedding": nn.Embedding(100, 6),
        }
    )


def test_a_default_that_takes_less_than_half_names_the_largest_and_the_exact_weights():
    model = towers()
    with pytest.warns(UserWarning) as caught:
        mm.select_weights(model)
    (warning,) = caught
    text = str(warning.message)
    assert "by default 12 of the 126 elements (9.5%) of the trainable parameters of ModuleDict" in text
    assert "the largest left out: blocks.*.mixer (108), blocks.*.position (6); to take them in" in text
    assert warning.filename == __file__
    weights = eval(text.partition("weights=")[2])
    assert chosen(model, weights) == [
        *(f"blocks.{block}.{name}" for block in range(3) for name in ("mixer", "position")),
        "head.weight",
    ]


def test_mm_sparsify_warns_at_the_users_own_line():
    model = towers()
    with pytest.warns(UserWarning, match="by default 12 of the 126") as caught:
        mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), mm.methods.magnitude(0.5), steps=2)
    assert [warning.filename for warning in caught] == [__file__]


def test_layers_that_are_frozen_and_more_than_what_becomes_sparse_are_named():
    """A head that is trained alone at first, or adapters: the backbone stays dense, which nothing else would tell."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3))
    model[:2].requires_grad_(False)

    def wrap(**options):
        mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), mm.methods.gmp(0.5), steps=2, **options)

    with pytest.warns(UserWarning, match="48 weights become sparse, and 384 of frozen layers stay") as caught:
        wrap()
    assert [warning.filename for warning in caught] == [__file__]
    assert "1.weight (256), 0.weight (128)" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(weights="2.weight")
        model[1].requires_grad_(True)  # now more becomes sparse than is frozen
        wrap()


def test_a_pattern_of_the_warning_takes_in_nothing_that_was_not_named():
    model = nn.Sequential(nn.Linear(2, 2), own(Tower, x=(9, 9)), own(Tower, x=(9,)), own(Tower, x=(9, 8)))
    model.add_module("a[b]", own(Tower, x=(8, 8)))
    with pytest.warns(UserWarning, match="to take them in") as caught:
        mm.select_weights(model)
    weights = eval(str(caught[0].message).partition("weights=")[2])
    assert chosen(model, weights) == ["0.weight", "1.x", "3.x", "a[b].x"]  # not the vector 2.x


def test_layers_of_a_stack_go_under_one_pattern_unless_something_else_fits_it():
    model = nn.ModuleDict({"body": nn.ModuleList(own(Tower, x=(4, 4), y=(5, 5)) for _ in range(9))})
    model["body"][3].add_module("inner", own(Tower, y=(2,)))  # body.*.y would take in this vector
    with pytest.raises(ValueError, match="such as weights=") as caught:
        mm.select_weights(model)
    weights = eval(str(caught.value).partition("weights=[")[2].join("[]")[:-1])
    assert weights == ["body.*.x", *(f"body.{block}.y" for block in range(4))]


def test_at_half_or_with_weights_of_ones_own_nothing_is_said():
    assert chosen(nn.Sequential(nn.Linear(4, 4), own(Tower, x=(4, 4)))) == ["0.weight"]
    assert chosen(towers(), ["head.weight"]) == ["head.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mm.sparsity(towers())


def test_no_sparsifiable_weight():
    with pytest.raises(ValueError, match="ReLU has no sparsifiable weight; pass weights="):
        mm.select_weights(nn.ReLU())
    with pytest.raises(ValueError, match=r"or a predicate to choose other parameters, such as weights=\['mixer'\]"):
        mm.select_weights(own(Tower, mixer=(3, 3)))
    with pytest.raises(ValueError, match=r"weight and what else would be are frozen; call requires_grad_\(True\)"):
        mm.select_weights(nn.Linear(2, 2).requires_grad_(False))


def test_quantized_layers_have_nothing_to_choose():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert mm.sparsity(nn.Sequential(nn.Linear(2, 2), layer)).numel == 4


# -- ties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_first", [False, True])
def test_a_head_tied_to_an_embedding_is_an_embedding_in_any_order_and_everywhere(head_first, tmp_path):
    model = language_model(head_first=head_first)
    with torch.no_grad():
        model.body.weight[0] = 0.0
        model.embedding.weight[:40] = 0.0
    assert chosen(model) == ["body.weight"]
    assert mm.sparsity(model).total == 0.25
    mm.save(model, tmp_path / "model.safetensors")
    assert read_contents(tmp_path / "model.safetensors").metadata["mirrormask.sparsity"] == "0.25"


def test_the_metadata_of_a_file_is_mm_sparsity_for_all_kinds_of_layers(tmp_path):
    model = nn.Sequential(*(layer for layer, _ in LAYERS.values()), small())
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter[: index % 3] = 0.0
    mm.save(model, tmp_path / "model.safetensors")
    metadata = read_contents(tmp_path / "model.safetensors").metadata
    assert float(metadata["mirrormask.sparsity"]) == pytest.approx(mm.sparsity(model).total, abs=1e-15)


def test_the_sparsity_of_a_state_dict_counts_a_tied_tensor_once(tmp_path):
    matrix = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    mm.save({"a": matrix, "b": matrix, "c": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert read_contents(tmp_path / "model.safetensors").metadata["mirrormask.sparsity"] == "0.375"


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("pattern", ["head.weight", "embedding.weight"])
def test_a_pattern_may_name_a_tied_tensor_by_any_of_its_names(head_first, pattern):
    model = language_model(head_first=head_first)
    first, later = ("head.weight", "embedding.weight") if head_first else ("embedding.weight", "head.weight")
    if pattern == first:
        assert chosen(model, pattern) == [first]
    else:
        with pytest.warns(UserWarning, match=rf"'{later}' chooses {first} \(tied to {later}\): one tensor"):
            assert list(mm.select_weights(model, pattern)) == [first]
    assert mm.sparsity(model, pattern).numel == 200


@pytest.mark.parametrize("head_first", [False, True])
def test_a_predicate_is_asked_about_every_owner_of_a_tied_tensor(head_first):
    model = language_model(head_first=head_first)
    names = chosen(model, lambda name, module: isinstance(module, nn.Linear) and name.endswith("weight"))
    assert {id(model.get_parameter(name)) for name in names} == {id(model.head.weight), id(model.body.weight)}


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert chosen(model) == ["0.weight"]
    assert mm.sparsity(model).numel == 9


def test_names_and_order_are_those_of_named_parameters_in_shared_and_cyclic_modules():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(nn.Linear(2, 3), shared, nn.Sequential(shared, nn.Linear(3, 2)))
    model[2].add_module("above", model)
    assert chosen(model, "*") == [name for name, _ in model.named_parameters()]


# -- patterns and what they must not match ---------------------------------------------------------------------


def test_patterns_and_predicates_select():
    assert chosen(small(), "3.*") == ["3.weight", "3.bias"]
    assert chosen(small(), lambda name, module: isinstance(module, nn.Embedding)) == ["4.weight"]


def test_a_pattern_that_matches_nothing_names_the_parameters_and_their_ties():
    with pytest.raises(ValueError, match=r"'fc\*' matches no parameter of the model; it has: 0.weight"):
        mm.select_weights(small(), ["3.*", "fc*"])
    with pytest.raises(ValueError, match=r"it has: .*embedding.weight \(tied to head.weight\)"):
        mm.select_weights(language_model(head_first=False), "lm_head.weight")


@pytest.mark.parametrize(("weights", "why"), [([], "weights= holds no pattern"), (lambda *_: False, "returned False")])
def test_weights_that_choose_nothing(weights, why):
    with pytest.raises(ValueError, match=f"Sequential has no sparsifiable weight; .*{why}"):
        mm.select_weights(small(), weights)


@pytest.mark.parametrize("count", [mm.select_weights, mm.sparsity])
def test_what_is_no_model_or_no_choice_is_refused_with_the_remedy(count):
    model = small()
    with pytest.raises(TypeError, match=r"model is a OrderedDict, not an nn.Module; load the state dict into its"):
        count(model.state_dict())
    with pytest.raises(TypeError, match=r"model is a class, Linear, not an nn.Module; pass an instance"):
        count(nn.Linear)
    with pytest.raises(TypeError, match=r"weights is a dict; the sparsity is one of all weights together; pass names"):
        count(model, {"0.weight": 0.5})
    for weights, got in [(3, "is a int"), (b"0.weight", "is a bytes"), (model[0], "is a "), (model[0].weight, "is a ")]:
        with pytest.raises(TypeError, match=rf"weights {got}.*pass names or patterns, such as"):
            count(model, weights)
    for weights in ([model[0].weight], [model[0]], ["0.weight", 3]):
        with pytest.raises(TypeError, match=r"weights= holds a .*, not names alone; pass names or patterns"):
            count(model, weights)


@pytest.mark.parametrize("count", [mm.select_weights, mm.sparsity])
def test_what_cannot_become_sparse_is_refused_with_the_remedy(count):
    model = small()
    model.register_parameter("counts", nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False))
    model.register_parameter("phase", nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)))
    with pytest.raises(ValueError, match=r"counts has dtype torch.int64; choose floating-point parameters"):
        count(model, "counts")
    with pytest.raises(ValueError, match=r"phase is complex .* its real and imaginary part .*torch.view_as_real"):
        count(model, lambda name, module: name == "phase")
    with pytest.raises(ValueError, match=r"'\*.running_\*' matches no parameter of the model, only 1.running_mean, "):
        count(model, "*.running_*")
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)))
    parts = "0.parametrizations.weight.original0, 0.parametrizations.weight.original1"
    made = f"'0.weight' matches 0.weight, which is no parameter but made from {parts} in every forward pass; "
    with pytest.raises(ValueError, match=f"{made}choose '0.parametrizations.weight.original1' instead"):
        count(normed, "0.weight")
    with pytest.raises(
        ValueError, match=r"made from 0.parametrizations.weight.original in .* under _Orthogonal a zero"
    ):
        count(nn.Sequential(parametrizations.orthogonal(nn.Linear(2, 2))), "0.weight")


@pytest.mark.parametrize("count", [mm.select_weights, mm.sparsity])
@pytest.mark.parametrize("weights", [None, "*", "0.weight"])
def test_weights_without_shape_or_values_are_refused_with_the_remedy(count, weights):
    with pytest.raises(ValueError, match=r"0.weight has no shape yet: its layer is lazy; run one batch through"):
        count(nn.Sequential(nn.LazyLinear(3)), weights)
    with pytest.raises(ValueError, match=r"0.weight is on the meta device and has no values; .*model.to_empty"):
        count(nn.Sequential(nn.Linear(3, 3, device="meta")), weights)


def test_a_complex_layer_is_left_out_and_named():
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(3, 3, dtype=torch.complex64))
    with pytest.warns(UserWarning, match="these matrices stay dense: 1.weight: it is complex"):
        assert list(mm.select_weights(model)) == ["0.weight"]
    assert mm.sparsity(model).numel == 81


# -- counting --------------------------------------------------------------------------------------------------


def test_sparsity_counts_exact_zeros_and_prints_a_table():
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 1e-30, 0.0, 2.0], [0.0, 0.0, 0.0, -0.0]]))
        model[1].weight.fill_(1.0)
    report = mm.sparsity(model)
    assert (report.numel, report.nonzeros) == (12, 6)
    assert report.total == float(report) == 0.5
    assert [layer.sparsity for layer in report.layers] == [0.75, 0.0]
    assert str(report).splitlines()[-1].split() == ["total", "12", "6", "50.000%"]


def test_sparsity_says_which_share_of_the_model_it_speaks_of():
    report = mm.sparsity(towers())
    assert (report.numel, report.parameters) == (12, 728)
    assert report.share == 12 / 728
    assert str(report).splitlines()[0] == "zeros among 12 of the model's 728 parameters (1.6%)"


def test_sparsity_of_ones_own_weights_is_what_was_asked_for():
    model, mine = towers(), ["blocks.*.mixer"]
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = mm.sparsify(model, base, mm.methods.magnitude(0.75), steps=1, weights=mine)
    optimizer.finalize()
    assert mm.sparsity(model, mine).total == 0.75
