"""mm.distill: the loss by its formulas, one teacher's pass, hooks that go."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.distillation import feature_loss, logit_loss


class Counted(nn.Sequential):
    def __init__(self, *parts):
        super().__init__(*parts)
        self.passes = []

    def forward(self, x):
        self.passes.append((self.training, torch.is_grad_enabled()))
        return super().forward(x)


def pair(dropout=0.0):
    student = Counted(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))
    teacher = copy.deepcopy(student)
    for p in teacher.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return student, teacher


def hooks(*models):
    return sum(len(m._forward_hooks) for model in models for m in model.modules())


def test_the_loss_by_its_formulas():
    student, teacher = pair()
    x = torch.randn(5, 6)
    distill = mm.distill(student, teacher, temperature=3.0, features=["0", "1"], feature_weight=0.5)
    loss = distill(student(x), x)
    p = (teacher(x) / 3).softmax(1)
    expected = 9 * (p * (p.log() - (student(x) / 3).log_softmax(1))).sum(1).mean()
    for depth in (1, 2):
        s, t = nn.Sequential(*student[:depth])(x), nn.Sequential(*teacher[:depth])(x)
        expected = expected + 0.25 * ((s - t).square().sum(1) / t.square().sum(1)).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(sum(distill.parts.values()), loss.detach())
    assert set(distill.parts) == {"logits", "0", "1"}


def test_a_student_like_its_teacher_has_nothing_to_learn():
    student, _ = pair()
    teacher, x = copy.deepcopy(student), torch.randn(5, 6)
    loss = mm.distill(student, teacher, temperature=2.0, features=["1"])(student(x), x)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6
    assert all(p.grad.abs().max() < 1e-6 for p in student.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_in_half_precision_are_compared_in_single(dtype):
    student = 300 * torch.randn(5, 60, generator=torch.Generator().manual_seed(0)).to(dtype)  # squares pass float16
    teacher = student + student.roll(1)
    for loss in (lambda s, t: logit_loss(s, t, 100.0), feature_loss):
        assert torch.equal(loss(student, teacher), loss(student.float(), teacher.float()))


def test_a_student_that_was_compiled_and_has_run_is_heard():
    student, teacher = pair()
    student, x = nn.Sequential(*student), torch.randn(5, 6)
    compiled = torch.compile(student, backend="eager")
    compiled(x)
    distill = mm.distill(compiled, teacher, temperature=None, features={"_orig_mod.0": "0"})
    torch.testing.assert_close(distill(compiled(x), x), feature_loss(student[0](x), teacher[0](x)))


def test_features_a_token_and_a_pixel():
    # (examples, tokens, channels): each token by its own norm, none counts more for being larger.
    t = torch.tensor([[[3.0, 4.0], [30.0, 40.0]]])
    s = torch.tensor([[[3.0, 3.0], [30.0, 30.0]]])
    assert float(feature_loss(s, t)) == pytest.approx(1 / 25)
    # (examples, channels, height, width)
    t = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 4, 5)
    assert float(feature_loss(t * 0, t)) == pytest.approx(1.0)
    # A token that is all but zero does not make the others count for nothing.
    t = torch.tensor([[[3.0, 4.0], [1e-9, 0.0]]])
    assert float(feature_loss(t + 0.1, t)) < 1


@pytest.mark.parametrize("loss", [lambda s, t, c: logit_loss(s, t, 2.0, counted=c), feature_loss])
def test_what_does_not_count_has_no_gradient_whatever_is_there(loss):
    student, teacher, counted = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4), torch.ones(2, 3).bool()
    counted[1, 2], teacher[1, 2] = False, torch.nan
    (grad,) = torch.autograd.grad(loss(student, teacher, counted), student)
    assert grad.isfinite().all() and not grad[1, 2].any() and grad[counted].all()
    torch.testing.assert_close(
        loss(student, teacher, counted), loss(student[counted], teacher[counted], torch.ones(5).bool())
    )


@pytest.mark.parametrize("classes", [-1, 1])
def test_positions_that_do_not_count_are_as_if_they_were_not_there(classes):
    """Padding at the end of each example, whatever lies there; what has no tokens counts whole."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.pooled = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

        def forward(self, x, mask=None):
            hidden = self.body(x)
            self.pooled(hidden[:, 0])
            return self.head(hidden).movedim(-1, classes)

    student, teacher = Tokens(), Tokens()
    x, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    features = ["body", "pooled"]
    options = {"temperature": 2.0, "features": features, "classes": classes}
    alone = mm.distill(student, teacher, **options)
    expected = alone(student(x[:, :3]), x[:, :3])
    with mm.distill(student, teacher, **options, positions=lambda x, mask: mask) as distill:
        padded = x.masked_fill(mask[:, :, None] == 0, 1e4)
        loss = distill(student(padded, mask), padded, mask=mask)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(distill.parts, alone.parts)
        loss.backward()
        got = student.body.weight.grad.clone()
        student.zero_grad()
        alone(student(x[:, :3]), x[:, :3]).backward()
        torch.testing.assert_close(got, student.body.weight.grad)
        nothing = distill(student(x, mask * 0), x, mask=mask * 0)
        torch.testing.assert_close(nothing.detach(), distill.parts["pooled"])
        with pytest.raises(ValueError, match=r"positions returned \(2, 4\), and logits and features have \[\(2, 5\)"):
            distill(student(x, mask[:, :4]), x, mask=mask[:, :4])
    with pytest.raises(TypeError, match="positions is a Tensor, not a function"):
        mm.distill(student, teacher, **options, positions=mask)


def test_one_pass_of_each_and_the_teacher_does_not_learn():
    student, teacher = pair(dropout=0.5)
    teacher[3].eval()
    x = torch.randn(5, 6)
    distill = mm.distill(student, teacher, temperature=2.0, features=["0"])
    distill(student(x), x).backward()
    assert student.passes == [(True, True)]
    assert teacher.passes == [(False, False)]
    assert [m.training for m in teacher] == [True, True, True, False]
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_training_a_sparse_student_brings_it_to_its_teacher():
    student, _ = pair()
    teacher, x = copy.deepcopy(student), torch.randn(64, 6)
    base = torch.optim.Adam(student.parameters(), lr=0.02)
    mm.prune(student, [x], 0.5, "magnitude", weights=["0.weight"])
    mm.keep_zeros(student, base)
    losses = []
    with mm.distill(student, teacher, temperature=2.0, features={"3": "3"}) as distill:
        for _ in range(40):
            base.zero_grad()
            loss = distill(student(x), x)
            loss.backward()
            base.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert mm.sparsity(student, ["0.weight"]).total == 0.5


def test_hooks_go_with_the_context_with_close_and_with_the_object():
    student, teacher = pair()
    x = torch.randn(2, 6)
    with mm.distill(student, teacher, temperature=1.0, features=["0", "1"]) as distill:
        assert hooks(student, teacher) == 4
    assert hooks(student, teacher) == 0
    with pytest.raises(ValueError, match="closed"):
        distill(student(x), x)
    distill.close()
    distill = mm.distill(student, teacher, temperature=1.0, features=["0"])
    distill(student(x), x)
    del distill
    gc.collect()
    assert hooks(student, teacher) == 0
    with pytest.raises(ValueError, match="no module"):
        mm.distill(student, teacher, temperature=1.0, features=["0", "nine"])
    assert hooks(student, teacher) == 0


def test_outputs_of_hugging_face_and_tuples():
    class Output(dict):
        @property
        def logits(self):
            return self["logits"]

    class Wrapped(nn.Module):
        def __init__(self, inner, wrap):
            super().__init__()
            self.inner, self.wrap = inner, wrap

        def forward(self, x, scale=1.0):
            return self.wrap(self.inner(x) * scale)

    student, teacher = pair()
    x, losses = torch.randn(5, 6), []
    for wrap in (lambda y: y, lambda y: (y, None), lambda y: {"logits": y}, lambda y: Output(logits=y, more=None)):
        models = Wrapped(student, wrap), Wrapped(teacher, wrap)
        distill = mm.distill(*models, temperature=2.0, features=["inner.1"])
        losses.append(float(distill(models[0](x, scale=2.0), x, scale=2.0).detach()))
    assert len(set(losses)) == 1


@pytest.mark.parametrize("inplace", [(False, True), (True, False), (True, True)])
def test_a_feature_is_what_its_module_put_out_whatever_writes_into_it(inplace):
    student, teacher = (Counted(nn.Linear(6, 8), nn.ReLU(inplace=flag), nn.Linear(8, 3)) for flag in inplace)
    x = torch.randn(5, 6)
    distill = mm.distill(student, teacher, temperature=None, features=["0"])
    loss = distill(student(x), x)
    torch.testing.assert_close(loss, feature_loss(student[0](x), teacher[0](x)))
    loss.backward()
    got = student[0].weight.grad.clone()
    student.zero_grad()
    feature_loss(student[0](x), teacher[0](x)).backward()
    torch.testing.assert_close(got, student[0].weight.grad)


def test_a_class_that_both_rule_out_counts_for_nothing():
    student, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    loss = logit_loss(student, teacher, 2.0)
    (grad,) = torch.autograd.grad(loss, student)
    out = torch.full((5, 1), -torch.inf)
    masked = logit_loss(torch.cat([student, out], 1), torch.cat([teacher, out], 1), 2.0)
    torch.testing.assert_close(masked, loss)
    torch.testing.assert_close(torch.autograd.grad(masked, student)[0], grad)


@pytest.mark.parametrize("keyword", [False, True])
def test_a_student_that_writes_into_its_inputs_is_told_of(keyword):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x):
            return self.inner(x.sub_(1.0))

    student, teacher, x = Writes(), nn.Linear(6, 3), torch.randn(5, 6)
    given = ((), {"x": x}) if keyword else ((x,), {})
    distill = mm.distill(student, teacher, temperature=2.0)
    output = student(*given[0], **given[1])
    with pytest.raises(ValueError, match=r"the inputs have changed.*student\(x.clone\(\)\)"):
        distill(output, *given[0], **given[1])
    torch.testing.assert_close(distill(student(x.clone()), x), logit_loss(student(x.clone()), teacher(x), 2.0))


def test_copies_of_the_networks_are_no_part_of_it():
    student, teacher = pair()
    x = torch.randn(5, 6)
    distill = mm.distill(student, teacher, temperature=None, features=["0"])
    output = student(x)
    average = copy.deepcopy(student)  # between a forward pass and its loss, as an average of weights may come
    again = pickle.loads(pickle.dumps(teacher))
    average(torch.zeros(5, 6)), again(torch.zeros(5, 6))
    torch.testing.assert_close(distill(output, x), feature_loss(student[0](x), teacher[0](x)))


def test_classes_may_be_another_dimension():
    student, teacher = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
    x = torch.randn(2, 3, 5, 5)
    loss = mm.distill(student, teacher, temperature=1.0, classes=1)(student(x), x)
    p = teacher(x).softmax(1)
    expected = (p * (p.log() - student(x).log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(loss, expected)


def test_an_evaluation_in_between_leaves_nothing_behind():
    student, teacher = pair()
    x = torch.randn(5, 6)
    distill = mm.distill(student, teacher, temperature=None, features=["0"])
    output = student(x)
    with torch.no_grad():
        student(torch.zeros(5, 6))
        teacher(torch.zeros(5, 6))
    expected = feature_loss(student[0](x), teacher[0](x))
    torch.testing.assert_close(distill(output, x), expected)
    student(x), distill(output, x)
    with pytest.raises(ValueError, match="has not computed 0 since"):
        distill(output, x)


def narrow():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def assigned(student):
    teacher = copy.deepcopy(student)
    teacher.load_state_dict(student.state_dict(), assign=True)
    return teacher


def in_one_memory(student):
    teacher = copy.deepcopy(student)
    teacher[0].weight.data = student[0].weight.data.view(8, 6)
    return teacher


BAD = {
    "its memory": (assigned, {}, ValueError, "shares parameters"),
    "a part of its memory": (in_one_memory, {}, ValueError, "shares parameters"),
    "no module": (lambda s: "x", {}, TypeError, "teacher is a str, not an nn.Module"),
    "itself": (lambda s: s, {}, ValueError, "copy.deepcopy"),
    "a part of it": (lambda s: nn.Sequential(s[0]), {}, ValueError, "shares parameters"),
    "temperature": (lambda s: pair()[1], {"temperature": 0.0}, ValueError, r"temperature=0.0 is outside \[0.001"),
    "hot": (lambda s: pair()[1], {"temperature": 1e30}, ValueError, r"temperature=1e\+30 is outside \[0.001, 10000\]"),
    "nothing to learn": (lambda s: pair()[1], {"temperature": None}, ValueError, "nothing is left to learn"),
    "weight": (lambda s: pair()[1], {"feature_weight": -1.0}, ValueError, "feature_weight=-1.0"),
    "one name": (lambda s: pair()[1], {"features": "0"}, TypeError, r"pass \['0'\]"),
    "unknown": (lambda s: pair()[1], {"features": ["00"]}, ValueError, "student has no module '00'; did you mean '0'"),
    "unknown to the teacher": (lambda s: pair()[1], {"features": {"0": "x"}}, ValueError, "teacher has no module 'x'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_at_once(case):
    make, options, error, match = BAD[case]
    student, _ = pair()
    with pytest.raises(error, match=match):
        mm.distill(student, make(student), **{"temperature": 2.0, **options})
    assert hooks(student) == 0


@pytest.mark.parametrize(
    ("teacher", "options", "match"),
    [
        (nn.Linear(6, 4), {}, r"output is \(5, 3\), the teacher's \(5, 4\)"),
        (narrow(), {"features": ["0"]}, r"'0' of the student is \(5, 8\), '0' of the teacher \(5, 5\)"),
        (nn.GRU(6, 3), {"temperature": None, "features": {"1": "inner"}}, "no module 'inner'"),
        (nn.Linear(6, 3), {"classes": 0}, r"output \(1, 3\) has one class along dimension 0"),
        (nn.Linear(6, 3), {"classes": 2}, r"output \(5, 3\) has no dimension 2 of classes; pass logits, not a loss"),
        (Counted(*narrow()), {"features": {"1": "2"}}, r"'2' of the teacher \(5, 3\)"),
    ],
)
def test_what_differs_in_shape_is_refused_at_the_first_call(teacher, options, match):
    student, _ = pair()
    x = torch.randn(1 if options.get("classes") == 0 else 5, 6)
    with pytest.raises(ValueError, match=match):
        mm.distill(student, teacher, **{"temperature": 2.0, **options})(student(x), x)


def test_outputs_without_logits_are_refused():
    class Odd(nn.Module):
        def forward(self, x):
            return {"hidden": x}

    student, _ = pair()
    x = torch.randn(5, 6)
    with pytest.raises(ValueError, match="the teacher returned a dict without logits"):
        mm.distill(student, Odd(), temperature=2.0)(student(x), x)
