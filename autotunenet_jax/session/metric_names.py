"""What the names of logged metrics tell: which is the validation loss, and whether more is better."""

import re
from collections.abc import Iterable
from typing import Any

_LOSSES = ("val_loss", "valid_loss", "validation_loss", "eval_loss", "dev_loss", "loss_val")

_MORE_IS_BETTER = {
    "acc", "accuracy", "auc", "auroc", "auprc", "f1", "fbeta", "bleu", "sacrebleu", "rouge", "rouge1", "rouge2",
    "rougel", "meteor", "precision", "recall", "iou", "miou", "map", "dice", "psnr", "ssim", "r2", "ndcg", "mrr",
    "kappa", "mcc",
}  # fmt: skip
_LESS_IS_BETTER = {
    "loss", "error", "err", "mse", "rmse", "mae", "nll", "bce", "ce", "perplexity", "ppl", "wer", "cer", "fid",
}  # fmt: skip


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]


def find_loss(names: Iterable[str]) -> str | None:
    """The first of the usual names of a validation loss, however it is spelt: ``val/loss``, ``valid_loss_epoch``.

    Returns:
      None where there is none of them.
    """
    spelt = {"_".join(_words(name)): name for name in names}
    return next((spelt[want + end] for want in _LOSSES for end in ("", "_epoch") if want + end in spelt), None)


def doubt(name: str, mode: Any) -> str | None:
    """What there is to be said of a metric that seems to be better in the other direction; None for nothing."""
    words = set(_words(name))
    grows, falls = bool(words & _MORE_IS_BETTER), bool(words & _LESS_IS_BETTER)
    if grows == falls or grows == (mode == "max"):
        return None
    which, other = ("more", "max") if grows else ("less", "min")
    return (
        f"{name} reads as a metric of which {which} is better, and mode={mode!r} looks for the opposite. "
        f"Give AutoTuneNet(..., mode={other!r}), or monitor= another metric."
    )


def none_of(names: Iterable[str], how: str) -> str:
    """What there is to be said where metrics were logged, and none of them is known to be the one to tune by."""
    return f"None of the metrics that were logged is reported to the tuner: {', '.join(sorted(names))}. {how}."
