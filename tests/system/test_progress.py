"""Progress where there is no terminal: lines at the start, at the end, and in between."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from hf_sparse_attn import distill
from hf_sparse_attn.system import progress
from hf_sparse_attn.system.progress import Bars, Lines, bar, counted, line, step
from hf_sparse_attn.system.terminal import Terminal


@pytest.fixture
def often(monkeypatch):
    """As if 30 seconds were 50 ms."""
    monkeypatch.setattr(progress, "EVERY", 0.05)


def test_a_line_says_what_is_done_what_is_left_and_the_rate():
    assert (
        line("distilling", 3, 12, 0, 90.0, "KL 0.1")
        == "distilling: 3 of 12, 9 left, 2 a minute, 4.5 min to go, 90 s so far; KL 0.1"
    )
    # continued: what was done before is no rate
    assert line("distilling", 3, 12, 3, 90.0) == "distilling: 3 of 12, 9 left, 90 s so far"
    assert line("tokenising, MB", 500, 1000, 0, 100.0).startswith(
        "tokenising, MB: 500 of 1000, 500 left, 5.0 a second, 1.7 min to go"
    )
    assert line("copying", 5, None, 0, 10000.0) == "copying: 5, 0.03 a minute, 2.8 h so far"


def test_a_start_an_end_and_lines_between_though_nothing_is_finished(often, capsys):
    with bar() as shown:
        task = shown.add_task("waiting", total=2, info="")
        assert capsys.readouterr().err == "waiting: 0 of 2, 2 left\n"
        time.sleep(0.3)
        assert len(capsys.readouterr().err.splitlines()) >= 2
        shown.update(task, advance=2, info="found")
    assert re.fullmatch(r"waiting: 2 of 2, 0 left, [\d.]+ a second; found", capsys.readouterr().err.splitlines()[-1])
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_the_thread_ends_after_an_error(often, capsys):
    with pytest.raises(KeyError), bar() as shown:
        shown.add_task("failing", total=1, info="")
        raise KeyError
    capsys.readouterr()
    time.sleep(0.15)
    assert capsys.readouterr().err == ""


def test_work_without_a_count_is_said_to_go_on_unless_something_within_says_more(often, capsys):
    with step("thinking"):
        time.sleep(0.3)
    assert set(capsys.readouterr().err.splitlines()) == {"thinking: 0 s so far"}
    with step("thinking"):
        for _ in counted(range(3), "within"):
            time.sleep(0.15)
    said = capsys.readouterr().err
    assert "within: 1 of 3, 2 left" in said and said.count("thinking") <= said.count("within")


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_a_terminal_has_a_bar_and_silence_is_silent(monkeypatch, capsys):
    assert isinstance(bar(), Lines)
    with bar(False) as hidden, step("hidden", False):
        hidden.add_task("hidden", total=1, info="")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", Screen())
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(bar(), Bars)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(bar(), Lines)


def test_a_bar_says_what_is_done_and_begins_where_the_work_was_left(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with bar() as shown:
        task = shown.add_task("reading", total=8, completed=3)
        shown.update(task, advance=1)
        shown.update(task, completed=6, info="loss 0.5")
    drawn = screen.getvalue().split("\r")
    assert (
        any("reading" in frame and " 3/8 " in frame for frame in drawn)
        and " 6/8 " in drawn[-1]
        and "loss 0.5" in drawn[-1]
    )


def test_messages_have_colours_on_a_terminal_only(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    screen, file = Screen(), io.StringIO()
    for stream in (screen, file):
        Terminal(stream).print("[bold] done", style="red")
    assert (screen.getvalue(), file.getvalue()) == ("\x1b[1;31m[bold] done\x1b[0m\n", "[bold] done\n")
    Terminal().print("a", end="")
    assert capsys.readouterr().err == "a"


def test_distilling_says_how_far_it_is(sparse_llama, real_budget, token_ids, capsys):
    batches = [{"input_ids": token_ids(1, 200, seed=seed)} for seed in range(2)]
    distill(sparse_llama(real_budget), batches)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert (
        first == "distilling: 0 of 2, 2 left"
        and last.startswith("distilling: 2 of 2, 0 left, ")
        and "recovered share" in last
    )
