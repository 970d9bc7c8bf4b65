"""The callback for Lightning, on two linear layers."""

import copy
import warnings

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch import nn

import mirrormask as mm
from mirrormask.integrations.lightning import SparsityCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|number of training batches|_pytree|lightning)"),
]
KEEP = round(0.2 * (8 * 16 + 16 * 3))
METHOD = mm.methods.gmp(0.8, end_at=0.5)


class Module(L.LightningModule):
    def __init__(self, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.ReLU(), nn.Linear(16, 3)
        )
        self.seen = []

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.seen.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.log("worse", float(self.trainer.global_step))
        self.log("zeros", float(sum((p == 0).sum() for p in self.parameters() if p.dim() > 1)))

    def base(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def configure_optimizers(self):
        base = self.base()
        schedule = torch.optim.lr_scheduler.SequentialLR(
            base,
            [
                torch.optim.lr_scheduler.LinearLR(base, 0.1, total_iters=4),
                torch.optim.lr_scheduler.CosineAnnealingLR(base, 8),
            ],
            [4],
        )
        return {"optimizer": base, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Bare(Module):
    def configure_optimizers(self):
        return self.base()


def loader(n=48, batch=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 8, generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :3].argmax(1)), batch)


def trainer_of(folder, *callbacks, **options):
    shown = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "log_every_n_steps": 1}
    if not any(isinstance(one, ModelCheckpoint) for one in callbacks):
        shown["enable_checkpointing"] = False
    return L.Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks),
        **{"max_epochs": 2, "num_sanity_val_steps": 0, **shown, **options},
    )  # fmt: skip


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Resumable(torch.utils.data.DataLoader):
    """Goes on in the middle, as torchdata's does; all of its batches are alike, since Lightning fetches one ahead."""

    start = done = 0

    def __iter__(self):
        start, self.start = self.start, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                self.done = (index + 1) % len(self)
                yield batch

    def state_dict(self):
        return {"start": self.done}

    def load_state_dict(self, state):
        self.start = state["start"]


class ByHand(Module):
    def configure_optimizers(self):
        self.sparse = mm.sparsify(self, self.base(), METHOD, steps=self.steps)
        return self.sparse


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 12),
        ({"accumulate_grad_batches": 4}, 4),
        ({"max_steps": 7, "max_epochs": -1}, 7),
        ({"max_steps": 5}, 5),
        ({"limit_train_batches": 2, "precision": "bf16-mixed"}, 4),
        ({"gradient_clip_val": 0.01, "max_epochs": 1}, 6),
    ],
)
def test_the_callback_equals_sparsify_by_hand(tmp_path, options, steps):
    one, two = Bare(), ByHand()
    two.steps = steps
    trainer_of(tmp_path, callback := SparsityCallback(METHOD), **options).fit(one, loader())
    trainer_of(tmp_path, **options).fit(two, loader())
    two.sparse.finalize()
    assert callback.optimizer.steps == callback.optimizer.step_count == steps
    assert one.seen == two.seen
    assert same(one, two)
    assert mm.sparsity(one).nonzeros == KEEP


def test_a_changing_accumulation_is_counted(tmp_path):
    changing = GradientAccumulationScheduler({0: 1, 1: 4})
    trainer_of(tmp_path, changing, callback := SparsityCallback(METHOD)).fit(Bare(), loader())
    assert callback.optimizer.steps == callback.optimizer.step_count == 6 + 2


def test_the_scheduler_drives_the_wrapped_optimizer(tmp_path):
    rates = []

    class Rates(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    base = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    module = Module()
    module.base = lambda: base
    schedule = Module.configure_optimizers(module)["lr_scheduler"]["scheduler"]
    expected = []
    for _ in range(12):
        expected.append(base.param_groups[0]["lr"])
        base.step()
        schedule.step()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
        trainer_of(tmp_path, Rates(), SparsityCallback(METHOD)).fit(Module(), loader())
    assert rates == expected
    with pytest.warns(UserWarning, match="the scheduler must come to its end within 4 steps, not 12"):
        trainer_of(tmp_path, SparsityCallback(mm.methods.lrr(0.8, prunings=2))).fit(Module(), loader())


def test_the_final_mask_is_there_before_the_last_validation_and_checkpoint(tmp_path):
    late = mm.Method(mm.geometry.Euclidean(), mm.decay.ConstantDecay(0.0), mm.masks.Never(0.8))
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, monitor="zeros")
    trainer = trainer_of(tmp_path, SparsityCallback(late), saving)
    trainer.fit(Module(), loader(), loader())
    assert trainer.callback_metrics["zeros"] == 8 * 16 + 16 * 3 - KEEP
    assert trainer.callback_metrics["sparsity"] == pytest.approx(1 - KEEP / (8 * 16 + 16 * 3))
    assert "sparsity" in trainer.progress_bar_metrics
    for epoch, nonzeros in ((0, 176), (1, KEEP)):
        tensors = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"]
        assert sum(int(t.count_nonzero()) for t in tensors.values() if t.dim() > 1) == nonzeros
    other = Module()  # of the same names, validated beside it: the masks are not its own
    trainer.validate(other, loader(), verbose=False)
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    assert mm.sparsity(other).nonzeros == 176
    assert torch.equal(torch.load(tmp_path / "other.ckpt")["state_dict"]["net.0.weight"], other.net[0].weight)


@pytest.mark.parametrize(("epochs", "where"), [(3, "epoch=1"), (3, "step=8")])
def test_resume_is_bit_for_bit(tmp_path, epochs, where):
    saving = ModelCheckpoint(tmp_path, filename="step={step}", auto_insert_metric_name=False, save_top_k=-1,
                             every_n_train_steps=4)  # fmt: skip
    each = ModelCheckpoint(tmp_path, filename="epoch={epoch}", auto_insert_metric_name=False, save_top_k=-1)
    whole, again = Module(), Module()
    alike = torch.utils.data.ConcatDataset([loader(8).dataset] * 6)
    data = [Resumable(alike, 8) for _ in range(2)]
    trainer_of(tmp_path, SparsityCallback(METHOD), saving, each, max_epochs=epochs).fit(whole, data[0])
    path = tmp_path / f"{where}.ckpt"
    trainer_of(tmp_path, SparsityCallback(METHOD), max_epochs=epochs).fit(again, data[1], ckpt_path=path)
    assert len(again.seen) == {"epoch=1": 6, "step=8": 10}[where]
    assert whole.seen[-len(again.seen) :] == again.seen
    assert same(whole, again)


def test_a_resume_in_the_middle_of_an_epoch_keeps_no_model_of_an_older_mask(tmp_path):
    """The mask is final at step 9 of 18, in epoch 1; the checkpoint of step 10 is between that and a validation."""
    method = mm.methods.gmp(0.8, end_at=0.5)
    each = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=10)
    best = [ModelCheckpoint(tmp_path / "best", filename="{epoch}", monitor="worse") for _ in range(2)]
    data = [Resumable(torch.utils.data.ConcatDataset([loader(8).dataset] * 6), 8) for _ in range(2)]
    trainer_of(tmp_path, SparsityCallback(method), best[0], each, max_epochs=3).fit(Module(), data[0], loader())
    one = trainer_of(tmp_path, SparsityCallback(method), best[1], max_epochs=3)
    one.fit(Module(), data[1], loader(), ckpt_path=tmp_path / "step=10.ckpt")
    assert ["/best/epoch=1" in saving.best_model_path for saving in best] == [True, True]


def test_a_checkpoint_resumed_without_the_callback_is_refused_by_name(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}")
    trainer_of(tmp_path, SparsityCallback(METHOD), saving, max_epochs=1).fit(one := Module(), loader())
    named = pytest.raises(ValueError, match=r"state of a mirrormask SparseOptimizer.*give the trainer its SparsityCall")
    with pytest.warns(UserWarning, match=r"add the following callbacks: .*SparsityCallback"), named:
        trainer_of(tmp_path).fit(Module(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    trainer_of(tmp_path).validate(other := Module(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(one, other)  # who only reads the model is not kept from it


def test_a_learning_rate_finder_beside_the_callback(tmp_path):
    class Found(Bare):
        lr = 0.1

        def base(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module = Found()
    finder, callback = LearningRateFinder(num_training_steps=20), SparsityCallback(METHOD)
    trainer_of(tmp_path, callback, finder, max_epochs=3).fit(module, loader())
    assert callback.optimizer.step_count == 18
    assert callback.optimizer.param_groups[0]["lr"] == module.lr != 0.1
    assert mm.sparsity(module).nonzeros == KEEP


def test_a_checkpoint_without_the_optimizer_is_refused(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_weights_only=True)
    trainer_of(tmp_path, SparsityCallback(METHOD), saving, max_epochs=1).fit(Module(), loader())
    again = trainer_of(tmp_path, SparsityCallback(METHOD))
    with pytest.raises((KeyError, ValueError)):  # Lightning refuses it first
        again.fit(Module(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_best_and_patience_begin_anew_with_the_last_mask(tmp_path):
    """The mask is final at step 24 of 48, epoch 3; a metric that only grows would else keep epoch 0 and stop there."""
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="worse")
    patient = EarlyStopping("worse", patience=2)
    module = Module()
    trainer_of(tmp_path, patient, saving, SparsityCallback(METHOD), max_epochs=8).fit(module, loader(), loader())
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["epoch=3.ckpt"]
    assert saving.best_model_path.endswith("epoch=3.ckpt")
    assert module.trainer.global_step == 36
    assert mm.sparsity(module).nonzeros == KEEP


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("average", ["ema", "swa"])
def test_averages_have_the_final_mask_wherever_they_are(tmp_path, average, first, norm):
    class Gradual(Module):
        def configure_optimizers(self):
            return self.base()

        def forward(self, x):  # for the statistics of batch norm
            return self.net(x)

    other = EMAWeightAveraging(decay=0.9) if average == "ema" else StochasticWeightAveraging(0.05, 1)
    callback = SparsityCallback(mm.methods.gmp(0.8, end_at=0.9))
    saving = ModelCheckpoint(tmp_path, filename="last")
    callbacks = (callback, other) if first else (other, callback)
    module = Gradual(norm)
    trainer = trainer_of(tmp_path, *callbacks, saving, max_epochs=3)
    trainer.fit(module, loader(), loader())
    assert (
        callback.optimizer.steps == 18
    )  # Lightning's epoch for batch norm's statistics ends with a step without gradients
    assert mm.sparsity(module).nonzeros == KEEP
    assert trainer.callback_metrics["zeros"] == 8 * 16 + 16 * 3 - KEEP
    tensors = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert sum(int(tensors[f"net.{i}.weight"].count_nonzero()) for i in (0, 3)) == KEEP
    module.eval()
    assert nn.functional.cross_entropy(module.net(loader(48, 48).dataset.tensors[0]), loader().dataset.tensors[1]) < 1.2


def test_a_training_that_is_stopped_early_is_finalized_and_it_is_said(tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= 3

    module = Module()
    saving = ModelCheckpoint(tmp_path, filename="last")
    with pytest.warns(UserWarning, match=r"training ended at step 3 of 12.*removes the rest of the 80% at once"):
        trainer_of(tmp_path, Stop(), SparsityCallback(METHOD), saving).fit(module, loader())
    assert mm.sparsity(module).nonzeros == KEEP
    tensors = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert sum(int(t.count_nonzero()) for t in tensors.values() if t.dim() > 1) == KEEP


def test_a_training_without_a_step_is_finalized_too(tmp_path):
    with pytest.warns(UserWarning, match=r"finalize\(\) after no step"):
        trainer_of(tmp_path, SparsityCallback(METHOD), max_time="00:00:00:00").fit(module := Module(), loader())
    assert mm.sparsity(module).nonzeros == KEEP


class Manual(Bare):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()


def test_a_module_that_steps_by_itself_says_how_often(tmp_path):
    module = Manual()
    trainer_of(tmp_path, callback := SparsityCallback(METHOD, steps=12)).fit(module, loader())
    assert callback.optimizer.step_count == 12
    assert mm.sparsity(module).nonzeros == KEEP


class Two(Module):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 3)]

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Part(Module):
    def base(self):
        return torch.optim.SGD(self.net[0].parameters(), lr=0.1)


class Nothing(Module):
    def configure_optimizers(self):
        return None


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(loader().dataset)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Two, {}, "returned 2 optimizers"),
        (Nothing, {}, "the optimizer does not hold net.0.weight, net.3.weight"),
        (Part, {}, r"the optimizer does not hold net.3.weight; build it over model.parameters"),
        (Manual, {}, "only you know how many steps it takes; pass steps="),
        (Module, {"max_epochs": -1}, "nothing says how many steps"),
        (Module, {"stream": True}, "nothing says how many steps"),
        (Module, {"pruning": True}, "ModelPruning beside the SparsityCallback.*leave out one"),
        (Module, {"twice": True}, "holds 2 SparsityCallbacks; add one"),
        (Module, {"steps": 12}, "leave it out, the trainer knows"),
        (ByHand, {}, "an optimizer of mm.sparsify already; return the base optimizer"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_first_step(tmp_path, module, options, message):
    module = module()
    module.steps = 12
    before = copy.deepcopy(module.state_dict())
    callbacks = [SparsityCallback(METHOD, steps=options.get("steps")) for _ in range(1 + options.get("twice", False))]
    if "pruning" in options:
        callbacks.append(ModelPruning("l1_unstructured", amount=0.5))
    data = torch.utils.data.DataLoader(Stream(), 8) if "stream" in options else loader()
    trainer = trainer_of(tmp_path, *callbacks, max_epochs=options.get("max_epochs", 2))
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, data)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert module.seen == []
