"""The Trainer of transformers with the tuner as a callback, on a tiny model made from its configuration.

Run: pip install transformers accelerate, then python examples/torch_transformers.py
"""

import argparse
import tempfile

import torch
import transformers

from autotunenet_torch import AutoTuneNet
from autotunenet_torch.transformers import AutoTuneCallback


class Majority(torch.utils.data.Dataset):
    """Which of two tokens is there more often?"""

    def __init__(self, size, seed):
        self.ids = torch.randint(0, 2, (size, 15), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        return {"input_ids": ids + 1, "labels": int(ids.sum() > 7)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()

    transformers.set_seed(0)
    config = transformers.BertConfig(
        vocab_size=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    tuner = AutoTuneNet({"learning_rate": (1e-6, 1e-2)})
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=16,
            learning_rate=1e-6,  # far too small
            warmup_steps=10,
            eval_strategy="steps",
            eval_steps=max(args.steps // 5, 1),
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(
            transformers.BertForSequenceClassification(config),
            arguments,
            train_dataset=Majority(2048, 0),
            eval_dataset=Majority(256, 1),
            callbacks=[AutoTuneCallback(tuner)],
        )
        trainer.train()
        print(f"evaluation loss {trainer.evaluate()['eval_loss']:.3f} with {tuner.best_hyperparams}")


if __name__ == "__main__":
    main()
