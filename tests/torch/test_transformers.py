"""The callback in the Trainer of transformers, on a tiny model made from its configuration."""

import math
import os
import warnings

import pytest

torch = pytest.importorskip("torch")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

import autotunenet_jax as atn  # noqa: E402
from autotunenet_torch import AutoTuneNet  # noqa: E402
from autotunenet_torch.transformers import AutoTuneCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = ("monitor", "callbacks", "loggers", "log_every")
SPACE = {"learning_rate": (1e-4, 1.0), "dropout": (0.0, 0.5)}


class Rows(torch.utils.data.Dataset):
    def __init__(self, size=64):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 20, (8,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones(8, dtype=torch.long), "labels": ids[0] % 2}


def make(tmp_path, tuner, *, rows=64, trainer_class=transformers.Trainer, others=(), **kwargs):
    own = {name: kwargs.pop(name) for name in ("compute_loss_func",) if name in kwargs}
    callback = AutoTuneCallback(tuner, **{name: kwargs.pop(name) for name in OPTIONS if name in kwargs})
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8,
    )  # fmt: skip
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8, report_to=[],
        disable_tqdm=True, use_cpu=True, seed=0,
        **{
            "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 50, "max_steps": 160,
            "learning_rate": 1e-4, "logging_strategy": "no", **kwargs,
        },
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    return trainer_class(
        model, args, train_dataset=Rows(rows), eval_dataset=Rows(), callbacks=[callback, *others], **own
    )


def test_tunes_and_evaluates_when_wanted(tmp_path):
    tuner = AutoTuneNet(SPACE, max_share=0.8)
    trainer = make(tmp_path, tuner, gradient_accumulation_steps=2, max_steps=480)
    trainer.train()
    history = tuner.history
    assert history.summary["steps"] == 480
    assert {row["kind"] for row in history.rounds} == {"fast", "slow"}
    assert history.rounds[0]["scored_by"] == "validation"
    assert len(history.evals) > 2
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-6)  # the Trainer's own decay
    trainer.evaluate()  # afterwards none of the tuner's business
    assert tuner.history.summary["evals"] == history.summary["evals"]
    assert not trainer.model._forward_hooks


def test_resumes_from_a_checkpoint(tmp_path):
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)})
    kwargs = {"save_strategy": "steps", "save_steps": 100, "eval_strategy": "no"}
    make(tmp_path, tuner, **kwargs).train()
    end = tuner.history.to_dict()
    again = AutoTuneNet({"learning_rate": (1e-4, 1.0)})
    make(tmp_path, again, **kwargs).train(resume_from_checkpoint=str(tmp_path / "checkpoint-100"))
    now = again.history.to_dict()
    assert now["rounds"] == end["rounds"] and now["summary"]["steps"] == 160
    assert [row["learning_rate"] for row in now["records"]] == [row["learning_rate"] for row in end["records"]]


class Own(transformers.Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = False  # what transformers asks for where a loss is a mean over its own batch

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(input_ids=inputs["input_ids"])
        loss = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("kind", ["smoothed", pytest.param("function", marks=pytest.mark.soak), "overridden"])
def test_the_loss_is_the_one_that_is_trained_by(tmp_path, kind):
    """Whoever computes it; seven batches an epoch in steps of four: what is told is per item, in the remainder too."""

    def loss_of(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)})
    more = {"smoothed": {"label_smoothing_factor": 0.1}}.get(kind, {})
    made = {"overridden": {"trainer_class": Own}, "function": {"compute_loss_func": loss_of}}.get(kind, {})
    trainer = make(
        tmp_path, tuner, rows=56, gradient_accumulation_steps=4, max_steps=48, eval_strategy="no",
        **more, **made,
    )  # fmt: skip
    with torch.no_grad():
        trainer.model.classifier.weight.zero_()
        trainer.model.classifier.bias.zero_()
    # It says nothing of its input for ever, whatever is learned before it.
    trainer.model.classifier.requires_grad_(False)
    trainer.train()
    losses = [row["loss"] for row in tuner.history.records]
    assert losses == pytest.approx([math.log(2)] * 48, rel=1e-3)


def test_early_stopping_and_the_best_model_see_no_fork(tmp_path):
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)})
    stopping = transformers.EarlyStoppingCallback(100)
    seen = []
    stopping.on_evaluate = lambda args, state, control, metrics, **kwargs: seen.append(metrics["eval_loss"])
    trainer = make(
        tmp_path, tuner, others=[stopping], eval_steps=10, save_strategy="steps", save_steps=10,
        load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    settled = [row["value"] for row in tuner.history.evals if row["is_settled"]]
    assert 2 < len(seen) < 16 and set(seen) <= set(settled)
    assert trainer.state.best_metric == min(seen)


def test_the_end_of_an_epoch_is_evaluated_once_and_everyone_sees_it(tmp_path):
    """Ten steps an epoch; the tuner asks for a reading every ten."""
    tuner, seen, steps = AutoTuneNet({"learning_rate": (1e-4, 1.0)}), [], []
    stopping = transformers.EarlyStoppingCallback(100)
    stopping.on_evaluate = lambda args, state, control, metrics, **kwargs: seen.append(state.global_step)
    counting = transformers.TrainerCallback()
    counting.on_evaluate = lambda args, state, control, **kwargs: steps.append(state.global_step)
    trainer = make(
        tmp_path, tuner, rows=80, others=[stopping, counting], eval_strategy="epoch", save_strategy="epoch",
        metric_for_best_model="loss", load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    settled = [row["step"] for row in tuner.history.evals if row["is_settled"] and row["step"] % 10 == 0]
    assert len(settled) > 3 and [step for step in settled if step] == seen
    assert len(steps) == len(set(steps)) and trainer.state.best_metric < math.inf


def test_a_metric_that_is_not_there_is_refused(tmp_path):
    trainer = make(tmp_path, AutoTuneNet({"learning_rate": (1e-4, 1.0)}), monitor="eval_f1", eval_steps=5)
    with pytest.raises(ValueError, match=r"monitor='eval_f1'.*eval_loss"):
        trainer.train()


def test_the_folder_that_is_resumed_from_is_the_one_that_is_read(tmp_path):
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)})
    kwargs = {"save_strategy": "steps", "save_steps": 50, "eval_strategy": "no"}
    make(tmp_path / "a", tuner, **kwargs).train()
    again = AutoTuneNet({"learning_rate": (1e-4, 1.0)})
    folder = tmp_path / "a" / "checkpoint-50"
    make(tmp_path / "b", again, **kwargs).train(resume_from_checkpoint=str(folder))
    assert again.history.rounds == tuner.history.rounds and again.history.summary["steps"] == 160
    (folder / "autotune.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-50 holds no autotune\.pt"):
        make(tmp_path / "b", AutoTuneNet({"learning_rate": (1e-4, 1.0)}), **kwargs).train(str(folder))


def test_outside_of_a_trainer_it_says_so(tmp_path):
    callback = AutoTuneCallback(AutoTuneNet({"learning_rate": (1e-4, 1.0)}))
    with pytest.raises(RuntimeError, match=r"inside transformers\.Trainer"):
        callback.on_train_begin(None, None, None)


class Worse(transformers.TrainerCallback):
    """Takes a fifth of the last layer's weights after each of the last steps."""

    def on_step_begin(self, args, state, control, *, model, **kwargs):
        if state.global_step >= 120:
            with torch.no_grad():
                model.classifier.weight.mul_(0.8)


def test_a_training_that_is_stopped_early_ends_in_its_best_state(tmp_path):
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)})
    stopping = transformers.EarlyStoppingCallback(2)
    trainer = make(
        tmp_path, tuner, others=[stopping, Worse()], eval_steps=5, metric_for_best_model="loss", max_steps=400,
        greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step < 400 and "ends in its best state" in tuner.history.events[-1]["message"]
    best = min(row["value"] for row in tuner.history.evals if row["is_settled"])
    assert trainer.evaluate()["eval_loss"] <= best + 1e-6 < tuner.history.evals[-1]["value"]


def test_callbacks_loggers_and_the_tuned_values(tmp_path):
    class Stops(atn.Callback):
        def on_decision(self, decision):
            raise atn.StopTraining("enough")

        def on_end(self, history):
            self.ended = True

    stops, seen = Stops(), []
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)})
    trainer = make(
        tmp_path, tuner, callbacks=[stops], loggers=[lambda row, step: seen.append((step, row))], log_every=7,
        logging_strategy="steps", logging_steps=1,
    )  # fmt: skip
    trainer.train()
    [decision] = tuner.history.rounds
    assert decision["end"] <= trainer.state.global_step < 160 and stops.ended
    assert any("tuner/round" in row for _, row in seen)
    steps = [step for step, row in seen if "train/loss" in row]
    assert steps[-1] == decision["forks"][decision["best"]]["end"] and sum(step % 7 == 0 for step in steps) > 1
    rows = trainer.state.log_history
    told = [(row["step"], row["tuner/learning_rate"]) for row in rows if "tuner/learning_rate" in row]
    assert [step for step, _ in told] == [1, decision["end"]]
    assert told[1][1] == pytest.approx(decision["chosen"]["learning_rate"])
    # The Trainer's own rows all came as well.
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, trainer.state.global_step + 1))


def test_what_is_doubtful_is_told_of(tmp_path):
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)})
    trainer = make(
        tmp_path, tuner, monitor="eval_accuracy", eval_steps=5, max_steps=40, lr_scheduler_type="constant_with_warmup",
        warmup_steps=4,
    )  # fmt: skip
    trainer.compute_metrics = lambda prediction: {"accuracy": float((prediction[0].argmax(-1) == prediction[1]).mean())}
    trainer.train()
    told = {event["kind"]: event["message"] for event in tuner.history.events}
    assert "mode='max'" in told["direction"] and "does not fall" in told["scheduler"]


def test_metrics_none_of_which_is_known_are_named(tmp_path):
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)})
    trainer = make(tmp_path, tuner, eval_steps=5, max_steps=40)
    trainer.eval_dataset = {"one": Rows(), "two": Rows()}
    trainer.train()
    [message] = [event["message"] for event in tuner.history.events if event["kind"] == "unknown metric"]
    assert "eval_one_loss" in message and "monitor=" in message and not tuner.history.evals
