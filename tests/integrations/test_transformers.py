"""The callback for the Hugging Face Trainer, on a BERT of two tiny layers."""

import copy
import warnings

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import mirrormask as mm
from mirrormask.integrations.transformers import SparsityCallback

CONFIG = BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.1,
)  # fmt: skip
ROWS = [
    {"input_ids": row.tolist(), "labels": int(row.sum()) % 3}
    for row in torch.randint(0, 40, (48, 6), generator=torch.Generator().manual_seed(1))
]


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(CONFIG)


def trainer_of(folder, *callbacks, model=None, optimizers=(None, None), trainer=Trainer, **options):
    options = {"max_steps": 12, "save_strategy": "no", "weight_decay": 0.0, **options}
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8, per_device_eval_batch_size=16, learning_rate=5e-3,
        logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    return trainer(
        model=bert() if model is None else model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:16],
        callbacks=list(callbacks), optimizers=optimizers,
    )  # fmt: skip


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"bf16": True}, {"max_grad_norm": 0.01}])
@pytest.mark.cases(1)
def test_the_callback_equals_sparsify_by_hand(tmp_path, options):
    """A plain trainer whose optimizer was wrapped by hand for the right number of steps comes to the same weights."""
    method = mm.methods.mirror(0.8)
    epochs = {"max_steps": -1, "num_train_epochs": 2, **options}
    steps = 2 * -(-6 // options.get("gradient_accumulation_steps", 1))
    one = trainer_of(tmp_path, callback := SparsityCallback(method), **epochs)
    one.train()
    assert callback.optimizer.steps == callback.optimizer.step_count == steps
    model = bert()
    base = trainer_of(tmp_path, model=model, **epochs).create_optimizer()
    sparse = mm.sparsify(model, base, method, steps=steps)
    two = trainer_of(tmp_path, model=model, optimizers=(sparse, None), **epochs)
    two.train()
    sparse.finalize()
    assert same(one.model, two.model)
    assert mm.sparsity(one.model).nonzeros == round(0.2 * mm.sparsity(one.model).numel)


def test_the_scheduler_drives_the_wrapped_optimizer_whoever_built_it(tmp_path):
    model = bert()
    base = torch.optim.SGD(model.parameters(), lr=0.4)
    schedule = torch.optim.lr_scheduler.LambdaLR(base, lambda step: 1.0 / (1 + step))
    one = trainer_of(
        tmp_path, callback := SparsityCallback(mm.methods.gmp(0.8)), model=model, optimizers=(base, schedule)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where steps of scheduler and optimizer seem out of order
        one.train()
    assert callback.optimizer.param_groups[0]["lr"] == pytest.approx(0.4 / 13)
    rates = [row["learning_rate"] for row in one.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([0.4 / (1 + step) for step in range(12)])
    two = trainer_of(tmp_path, callback := SparsityCallback(mm.methods.gmp(0.8)))
    two.train()
    assert callback.optimizer.param_groups[0]["lr"] == 0.0  # linear, to the end


def test_a_scheduler_that_the_trainer_has_built_and_drops_is_none(tmp_path):
    one = trainer_of(tmp_path, SparsityCallback(mm.methods.gmp(0.8)))
    one.create_optimizer_and_scheduler(12)
    one.train()
    two = trainer_of(tmp_path, SparsityCallback(mm.methods.gmp(0.8)))
    two.train()
    assert same(one.model, two.model)


def test_the_scheduler_of_a_method_in_rounds_is_one_of_a_round(tmp_path):
    """Its rates come again in every round, each of which ends where a whole training does; and they are logged."""
    method = mm.methods.lrr(0.8, prunings=2)
    one = trainer_of(tmp_path, callback := SparsityCallback(method))
    one.train()
    assert callback.optimizer.round_steps == 4
    rates = [row["learning_rate"] for row in one.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([5e-3 * (1 - step % 4 / 4) for step in range(12)])
    model = bert()
    base = torch.optim.SGD(model.parameters(), lr=0.4)
    given = (base, torch.optim.lr_scheduler.LinearLR(base, 1.0, 0.0, total_iters=12))
    with pytest.warns(UserWarning, match="the scheduler must come to its end within 4 steps, not 12"):
        trainer_of(tmp_path, SparsityCallback(method), model=model, optimizers=given).train()


def test_the_final_mask_is_there_before_the_last_evaluation_and_checkpoint(tmp_path):
    counts = []

    class Count(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            counts.append((state.global_step, mm.sparsity(model).nonzeros))

    options = {"eval_strategy": "steps", "eval_steps": 6, "save_strategy": "steps", "save_steps": 12}
    # this prunes in finalize() only, so that nothing but the callback can have done it
    late = mm.Method(mm.geometry.Euclidean(), mm.decay.ConstantDecay(0.0), mm.masks.Never(0.8))
    one = trainer_of(tmp_path, SparsityCallback(late), Count(), **options)
    one.train()
    numel = mm.sparsity(one.model).numel
    assert counts == [(6, numel), (12, round(0.2 * numel))]
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-12")
    assert mm.sparsity(saved).nonzeros == round(0.2 * numel)
    one.model.save_pretrained(tmp_path / "own")
    assert same(BertForSequenceClassification.from_pretrained(tmp_path / "own"), one.model)
    logged = [row["sparsity"] for row in one.state.log_history if "sparsity" in row]
    assert logged[0] == 0.0
    assert logged[-1] == pytest.approx(1 - round(0.2 * numel) / numel)


def test_resume_is_bit_for_bit(tmp_path):
    method = mm.methods.gmp(0.8, end_at=0.75)
    options = {"save_strategy": "steps", "save_steps": 5, "gradient_accumulation_steps": 2}
    whole = trainer_of(tmp_path / "a", SparsityCallback(method), **options)
    whole.train()
    again = trainer_of(tmp_path / "b", SparsityCallback(method), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert same(whole.model, again.model)
    assert [row.get("loss") for row in whole.state.log_history[5:-1]] == [
        row.get("loss") for row in again.state.log_history[5:-1]
    ]


def test_a_checkpoint_without_the_optimizer_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5}
    trainer_of(tmp_path, SparsityCallback(mm.methods.gmp(0.8)), save_only_model=True, **options).train()
    again = trainer_of(tmp_path, SparsityCallback(mm.methods.gmp(0.8)), **options)
    with pytest.raises(ValueError, match=r"goes on at step 5 and its optimizer has taken 0 steps.*optimizer.pt"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_a_checkpoint_resumed_without_the_callback_is_refused_by_name(tmp_path, optim):
    options = {"save_strategy": "steps", "save_steps": 5, "optim": optim}
    trainer_of(tmp_path, SparsityCallback(mm.methods.gmp(0.8)), max_steps=5, **options).train()
    again = trainer_of(tmp_path, **options)
    with pytest.raises(ValueError, match=r"state of a mirrormask SparseOptimizer.*give the trainer its SparsityCall"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


class Worse(Trainer):
    """Each evaluation is worse than the one before it, as under pruning."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, compute_metrics=lambda _: {"worse": float(self.state.global_step)}, **kwargs)


BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "greater_is_better": False,
    "load_best_model_at_end": True, "metric_for_best_model": "worse",
}  # fmt: skip


def test_the_best_model_is_the_best_of_those_with_the_last_mask(tmp_path):
    """The mask of this gmp is final at step 6 of 12; a metric that only grows would else choose step 2."""
    one = trainer_of(tmp_path, SparsityCallback(mm.methods.gmp(0.8, end_at=0.5)), trainer=Worse, **BEST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.train()
    assert one.state.best_global_step == 6
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6")
    assert same(saved, one.model)
    assert mm.sparsity(one.model).nonzeros == round(0.2 * mm.sparsity(one.model).numel)


def test_the_best_model_is_the_same_however_evaluations_come_about_and_after_a_resume(tmp_path):
    """Asked for by a callback behind ours; and with a checkpoint between the last mask and its first evaluation."""

    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = state.global_step % 4 == 0

    method, options = mm.methods.gmp(0.8, end_at=0.5), {"metric_for_best_model": "worse", "greater_is_better": False}
    options |= {"save_strategy": "steps", "save_steps": 6, "eval_steps": 4}  # the mask of this gmp is final at step 6
    one = trainer_of(tmp_path, SparsityCallback(method), Ask(), trainer=Worse, **options)
    one.train()
    assert one.state.best_global_step == 8
    options["eval_strategy"] = "steps"
    again = trainer_of(tmp_path / "b", SparsityCallback(method), trainer=Worse, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.state.best_global_step == 8
    assert same(one.model, again.model)


def test_patience_does_not_end_a_training_while_the_mask_changes(tmp_path):
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    one = trainer_of(tmp_path, stop, SparsityCallback(mm.methods.gmp(0.8, end_at=0.5)), trainer=Worse, **BEST)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the mask is final: stopping costs nothing
        one.train()
    assert one.state.global_step == 10  # 6 is the best, 8 and 10 are worse


def test_an_older_model_at_the_end_gets_the_last_mask_and_it_is_said(tmp_path):
    class PutBack(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.first = copy.deepcopy(model.state_dict())

        def on_train_end(self, args, state, control, model=None, **kwargs):
            for p, first in zip(model.parameters(), self.first.values(), strict=False):
                p.data.copy_(first) if p.shape == first.shape else None

    for order in (lambda a, b: (a, b), lambda a, b: (b, a)):  # the average may come after the callback, or before
        one = trainer_of(tmp_path, *order(SparsityCallback(mm.methods.gmp(0.8)), PutBack()))
        with pytest.warns(UserWarning, match="weights from before the last mask: .* nonzeros .* are removed now"):
            one.train()
        assert mm.sparsity(one.model).nonzeros == round(0.2 * mm.sparsity(one.model).numel)


def test_a_training_that_is_stopped_early_is_finalized_and_it_is_said(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 3

    one = trainer_of(tmp_path, SparsityCallback(mm.methods.gmp(0.8)), Stop())
    with pytest.warns(UserWarning, match=r"training ended at step 3 of 12.*removes the rest of the 80% at once"):
        one.train()
    assert mm.sparsity(one.model).nonzeros == round(0.2 * mm.sparsity(one.model).numel)


def test_training_goes_on_after_the_end_with_the_mask_kept(tmp_path):
    one = trainer_of(tmp_path, SparsityCallback(mm.methods.gmp(0.8)))
    one.train()
    zeros = {name: p == 0 for name, p in one.model.named_parameters()}
    before = one.model.classifier.weight.clone()
    one.train()
    assert not torch.equal(before, one.model.classifier.weight)
    assert all(torch.equal(p == 0, zeros[n]) for n, p in one.model.named_parameters() if n.endswith("query.weight"))


def test_scores_that_read_data_take_batches_as_the_model_does(tmp_path):
    batch = {key: torch.tensor([row[key] for row in ROWS[:16]]) for key in ("input_ids", "labels")}
    pair = (batch["input_ids"], batch["labels"])
    pairs = {"batches": [pair], "loss_fn": lambda output, y: torch.nn.functional.cross_entropy(output.logits, y)}
    masks = []
    for score in ("snip", "wanda"):
        for data in ({"batches": [batch]}, pairs):
            model = bert().eval()
            method = mm.Method(mm.geometry.Euclidean(), mm.decay.ConstantDecay(0.0), mm.masks.AtStart(0.8, score=score))
            base = torch.optim.SGD(model.parameters(), lr=0.1)
            masks.append(mm.sparsify(model, base, method, steps=2, **data).masks)
    for one, two in (masks[:2], masks[2:]):
        assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ValueError, match="without a loss for a batch of input_ids; put the labels into the batch"):
        base = torch.optim.SGD((model := bert()).parameters(), lr=0.1)
        mm.sparsify(model, base, mm.methods.snip(0.8), steps=2, batches=[{"input_ids": pair[0]}])


def test_the_score_reaches_the_method_and_a_trainer_without_the_callback_is_as_ever(tmp_path):
    scores = iter([0.5, 0.6, 0.7])
    callback = SparsityCallback(mm.methods.pilot(0.8), score=lambda: next(scores))
    trainer_of(tmp_path, callback, max_steps=-1, num_train_epochs=2).train()
    assert next(scores) == 0.6  # after the first epoch; after the last, nothing decays any more
    plain = trainer_of(tmp_path)
    plain.train()
    assert "sparsity" not in plain.state.log_history[0]
    assert "create_scheduler" not in vars(plain)


def twice(folder):
    return trainer_of(folder, *(SparsityCallback(mm.methods.gmp(0.8)) for _ in range(2)))


def lacking(folder):
    model = bert()
    base = torch.optim.SGD(model.classifier.parameters(), lr=0.1)
    return trainer_of(folder, SparsityCallback(mm.methods.gmp(0.8)), model=model, optimizers=(base, None))


def wrapped(folder):
    model = bert()
    base = mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), mm.methods.gmp(0.8), steps=12)
    return trainer_of(folder, SparsityCallback(mm.methods.gmp(0.8)), model=model, optimizers=(base, None))


class Own(Trainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return super().create_scheduler(num_training_steps, self.optimizer)


def other(folder):
    model = bert()
    base, wrong = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    schedule = torch.optim.lr_scheduler.ConstantLR(wrong)
    return trainer_of(folder, SparsityCallback(mm.methods.gmp(0.8)), model=model, optimizers=(base, schedule))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (twice, "holds 2 SparsityCallbacks; add one"),
        (lacking, "the optimizer does not hold bert.*build it over model.parameters"),
        (wrapped, "is one of mm.sparsify already; pass the base optimizer"),
        (lambda f: trainer_of(f, SparsityCallback(mm.methods.gmp(0.8)), trainer=Own), "was not wrapped"),
        (other, "does not drive the optimizer that is trained"),
        (lambda f: trainer_of(f, SparsityCallback(mm.methods.gmp(0.8)), auto_find_batch_size=True), "auto_find_batch"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_first_step(tmp_path, make, message):
    trainer = make(tmp_path)
    before = copy.deepcopy(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert same(before, trainer.model)
    assert trainer.state.global_step == 0


def test_the_callback_says_what_it_takes():
    with pytest.raises(TypeError, match="is a str, not a method; pass for example"):
        SparsityCallback("mirror")
    with pytest.raises(ValueError, match=r"reads the training accuracy at the end of every epoch.*pass score="):
        SparsityCallback(mm.methods.pilot(0.8))
    with pytest.raises(RuntimeError, match=r"before trainer.train\(\) has begun"):
        SparsityCallback(mm.methods.gmp(0.8)).optimizer  # noqa: B018
