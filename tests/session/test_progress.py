"""What a user sees while a run goes on."""

import io
import itertools
import re
import sys
import time

import pytest
from rich.cells import cell_len
from rich.console import Console

import autotunenet_jax as atn
from autotunenet_jax.session import progress as progress_module
from tests import problem

WIDTHS = (20, 40, 60, 80, 120, 200)
SHOWN = {
    "step": 12345,
    "phase": "train",
    "loss": 0.12345,
    "hyperparams": {"learning_rate": 1.234e-3, "weight_decay": 5.678e-5, "dropout": 0.25, "batch_size": 128},
    "discarded": 1234,
    "rounds": 3,
    "rollbacks": 2,
}
WHOLE = [
    *("train", "12345/100000", "loss 0.123", "learning_rate 0.00123", "weight_decay 5.68e-05", "dropout 0.25"),
    *("batch_size 128", "3 rounds", "10 % in lost forks", "2 rollbacks", "eta 1:11"),
]


def terminal(width, encoding="utf-8"):
    class File(io.StringIO):
        pass

    file = File()
    File.encoding = encoding
    return Console(file=file, width=width, force_terminal=True, legacy_windows=False, color_system=None)


def shown_at(width, monkeypatch, **options):
    """The last line that a terminal of a width shows."""
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    console = terminal(width, **options)
    bar = atn.Progress(100_000, is_on=True, console=console)
    bar.open()
    bar.show(**{**SHOWN, "step": 0})
    bar.show(**{**SHOWN, "step": 12_345})
    line = bar._line().plain
    monkeypatch.undo()
    bar.close()
    return line, console.file.getvalue()


@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_nothing_is_cut(width, monkeypatch):
    line, drawn = shown_at(width, monkeypatch)
    assert cell_len(line) <= width
    fields = [part for part in re.split(r" {2,}", line) if part.strip("━╌ ")]
    assert all(part in WHOLE for part in fields), fields
    # The order is kept, and what was drawn is the line.
    places = [WHOLE.index(part) for part in fields]
    assert places == sorted(places)
    assert line in drawn


def test_the_least_important_goes_first(monkeypatch):
    have = {width: set(re.split(r" {2,}", shown_at(width, monkeypatch)[0])) & set(WHOLE) for width in WIDTHS}
    for narrow, wide in itertools.pairwise(WIDTHS):
        assert have[narrow] <= have[wide]
    assert have[200] == set(WHOLE)
    assert have[60] == {"train", "12345/100000", "loss 0.123", "learning_rate 0.00123"}
    assert have[80] == have[60] | {"eta 1:11"}
    assert have[120] == set(WHOLE[:7]) | {"eta 1:11"}


def test_a_bar_takes_what_is_left_and_ascii_where_there_is_nothing_else(monkeypatch):
    assert "━" in shown_at(200, monkeypatch)[0]
    assert "#####....." in shown_at(200, monkeypatch, encoding="ascii")[0].replace("#" * 5, "#####")
    assert "━" not in shown_at(60, monkeypatch)[0]


def plain(monkeypatch, at):
    """Lines that a pipe gets of a bar shown at some seconds."""
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    bar = atn.Progress(100_000, is_on=True, console=console)
    bar.open()
    for number, seconds in enumerate(at):
        now[0] = seconds
        bar.say(f"step {number}: round {number}")
        bar.show(**{**SHOWN, "step": 1000 * (number + 1)})
    bar.close()
    return console.file.getvalue()


def test_a_pipe_gets_a_line_every_ten_seconds_and_no_control_codes(monkeypatch):
    text = plain(monkeypatch, [0.5 * n for n in range(100)])
    lines = text.splitlines()
    assert "\x1b" not in text and "\r" not in text
    assert len(lines) == 1 + 4 + 1  # at the start, in 50 seconds, at the end
    assert lines[0] == "compiling (once)  0/100000"
    for line in lines[1:]:
        assert line.startswith("train  ") and "learning_rate 0.00123  weight_decay 5.68e-05" in line
        assert re.search(r"3 rounds  \d+ % in lost forks  2 rollbacks  eta [\d:]+  last: step \d+: round \d+", line)
    assert lines[-1].startswith("train  100000/100000")


def test_the_time_left_is_of_steps_and_not_of_what_was_compiled_between_them(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    bar = atn.Progress(100, is_on=True, console=terminal(200))
    bar.open()
    for seconds, step in ((20.0, 0), (21.0, 10), (121.0, 10), (122.0, 20)):
        now[0] = seconds
        if seconds == 121.0:
            bar.wait("compiling (once)")
        bar.show(**{**SHOWN, "step": step})
    assert "eta 0:08" in bar._line().plain  # 80 steps at 10 a second
    bar.close()


def test_what_is_said_goes_above_the_line(monkeypatch):
    console = terminal(60)
    bar = atn.Progress(100, is_on=True, console=console)
    bar.open()
    message = "step 12: round 1, 4 forks -> learning_rate 0.00123, weight_decay 5.68e-05, [dropout] 0.25"
    bar.say(message)
    bar.close()
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue()).replace("\r", "")
    assert message in " ".join(drawn.split())


def test_what_is_waited_for_is_shown_until_it_goes_on():
    bar = atn.Progress(100, is_on=True, console=terminal(80))
    bar.open()
    assert "compiling (once)" in bar._line().plain
    bar.show(**{**SHOWN, "step": 3})
    assert "compiling" not in bar._line().plain and "train" in bar._line().plain
    bar.wait("compiling (once)")
    assert "compiling (once)" in bar._line().plain and "loss 0.123" in bar._line().plain
    bar.show(**{**SHOWN, "step": 4})
    assert "compiling" not in bar._line().plain
    bar.close()


def test_a_notebook_gets_text_and_needs_no_widgets(monkeypatch):
    console = Console(file=io.StringIO(), force_jupyter=True, width=80)
    said = []
    monkeypatch.setattr(console, "print", lambda text, **options: said.append(text))
    bar = atn.Progress(100, is_on=True, console=console)
    bar.open()
    bar.show(**{**SHOWN, "step": 100})
    bar.close()
    assert bar._live is None
    assert said[0].startswith("compiling (once)") and said[-1].startswith("train  100/100")


def fit(**options):
    return atn.fit(problem.train_step, problem.new_state(), problem.batches, tuner=problem.tuner(), **options)


def test_a_quiet_run_is_silent(capfd):
    fit(progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_run_in_a_pipe(capfd):
    began = time.monotonic()
    fit()
    took = time.monotonic() - began
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert err == "" and "\x1b" not in out
    assert lines[0].startswith("compiling (once)") and len(lines) <= 2 + took / 10
    assert lines[-1].startswith(f"train  {problem.TOTAL_STEPS}/{problem.TOTAL_STEPS}")


def test_every_decision_is_a_line_of_the_log(caplog):
    caplog.set_level("INFO", logger="autotunenet")
    result = fit(progress=False)
    lines = [record.getMessage() for record in caplog.records if record.name == "autotunenet"]
    for number, row in enumerate(result.history.rounds, 1):
        assert sum(line.startswith(f"step {row['end']}: round {number}, ") for line in lines) == 1
    for event in result.history.events:
        assert f"step {event['step']}: {event['message']}" in lines


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), BrokenPipeError()])
def test_what_cannot_be_written_is_not_shown_and_ends_nothing(is_terminal, error, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise error

        def fileno(self):
            return io.StringIO().fileno()

    monkeypatch.setattr(Console, "on_broken_pipe", lambda self: sys.exit(1))
    progress = progress_module.Progress(
        100, is_on=True, console=Console(file=Full(), force_terminal=is_terminal, width=80)
    )
    progress.open()
    progress.show(step=3, phase="train", loss=0.5, hyperparams={"learning_rate": 0.1}, discarded=0)
    progress.say("a message")
    progress.close()
    assert not progress.is_on
