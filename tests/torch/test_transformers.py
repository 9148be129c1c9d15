"""The callback in the Trainer of transformers, on a tiny model made from its configuration."""

import os
import warnings

import pytest

torch = pytest.importorskip("torch")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

from autotunenet_torch import AutoTuneNet  # noqa: E402
from autotunenet_torch.transformers import AutoTuneCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SPACE = {"learning_rate": (1e-4, 1.0), "dropout": (0.0, 0.5)}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 20, (8,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones(8, dtype=torch.long), "labels": ids[0] % 2}


def make(tmp_path, tuner, **kwargs):
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8,
    )  # fmt: skip
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8, learning_rate=1e-4, report_to=[],
        disable_tqdm=True, use_cpu=True, logging_strategy="no", seed=0,
        **{"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 50, "max_steps": 160, **kwargs},
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    return transformers.Trainer(
        model, args, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[AutoTuneCallback(tuner)]
    )


def test_tunes_and_evaluates_when_wanted(tmp_path):
    tuner = AutoTuneNet(SPACE, max_share=0.8)
    trainer = make(tmp_path, tuner, gradient_accumulation_steps=2, max_steps=480)
    trainer.train()
    history = tuner.history
    assert history.summary["steps"] == 480
    assert {row["kind"] for row in history.rounds} == {"fast", "slow"}
    assert history.rounds[-1]["scored_by"] == "validation"
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


def test_a_model_without_a_loss_is_told(tmp_path):
    trainer = make(tmp_path, AutoTuneNet({"learning_rate": (1e-4, 1.0)}), eval_strategy="no")
    trainer.compute_loss = lambda model, inputs, **kwargs: model(input_ids=inputs["input_ids"]).logits.square().mean()
    with pytest.raises(RuntimeError, match="held no loss"):
        trainer.train()
