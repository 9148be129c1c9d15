"""Checkpoints that Lightning and transformers keep beside a history: found by their names, and left unread."""

import pathlib

# Most of them named.
_MOST_NAMES = 3

_FRAMEWORKS = {
    "Lightning": ("checkpoints/*.ckpt", "trainer.fit(..., ckpt_path=...)"),
    "transformers": ("checkpoint-*/trainer_state.json", "trainer.train(resume_from_checkpoint=...)"),
}


def told_of(where: pathlib.Path) -> str:
    """Where the checkpoints of a framework lie, and what goes on from one; a clause."""
    for name, (pattern, how) in _FRAMEWORKS.items():
        files = sorted(where.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
        found = [path if path.suffix == ".ckpt" else path.parent for path in files]
        if found:
            names = ", ".join(path.name for path in found[:_MOST_NAMES])
            more = f" and {len(found) - _MOST_NAMES} older" if len(found) > _MOST_NAMES else ""
            folder = found[0].parent.as_posix()
            return f"{name} keeps its checkpoints in {folder}: {names}{more}. {how} goes on from one"
    return "a loop of Lightning or transformers keeps checkpoints of its own, and none lie here either"
