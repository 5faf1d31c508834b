"""What the console shows, with a clock of our own."""

import io

import pytest

from megatron_irl.console import Console, format_seconds


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def make(stream):
    clock = Clock()
    return Console(True, stream=stream, interval_seconds=10.0, clock=clock), clock


def test_a_log_file_gets_a_line_every_ten_seconds_and_one_at_the_end():
    stream = io.StringIO()
    progress, clock = make(stream)
    with progress.generation(100) as advance:
        for second in range(1, 26):
            clock.now += 1
            advance(4 * second, 40 * second)
    assert stream.getvalue().splitlines() == [
        "generation 40/100 responses  40 tok/s  ETA 15s",
        "generation 80/100 responses  40 tok/s  ETA 5s",
        "generation 100/100 responses  40 tok/s  25s",
    ]


def test_a_terminal_has_one_line_rewritten_and_notes_above_it():
    stream = Terminal()
    progress, clock = make(stream)
    with progress.reference(8) as advance:
        clock.now += 2
        advance(4)
        clock.now += 0.05
        advance(5)  # too soon to be seen
        progress.warn("look")
        clock.now += 1.95
        advance(8)
    clear = "\r\x1b[2K"
    half = "reference pass 4/8 sequences  ETA 2s"
    done = "reference pass 8/8 sequences  4s"
    assert stream.getvalue() == (
        f"{clear}{half}{clear}WARNING: look\n{half}{clear}{done}{clear}{done}\n")


def test_steps_and_the_time_the_run_still_takes():
    """Two rounds of 10 steps of 2 s: 30 s outside of steps before the first, 10 s after it.

    After step 1: 19 * 2 + 30 = 68 s; after step 2: 18 * 2 + 40 = 76 s.
    """
    stream = io.StringIO()
    progress, clock = make(stream)
    clock.now += 30
    for step in (1, 2):
        clock.now += 2
        line = {"step": step, "round": 0, "loss": 0.6931, "reward/margin": 0.25,
                "reward/accuracy": 0.75, "grad_norm": None, "tokens_per_second": 1234.5,
                "time/step": 2.0}
        progress.step(line, total_steps=20, generation_share=0.4, total_rounds=2)
        clock.now += 10 if step == 1 else 0
    first, second = stream.getvalue().splitlines()
    assert first == ("[round 0] step 1/20  loss 0.6931  margin +0.250  accuracy 0.75  "
                     "tok/s 1,234  generating 40% of the time  ETA 1m08s")
    assert second.endswith("ETA 1m16s")


def test_sft_steps_have_no_reward():
    stream = io.StringIO()
    progress, _ = make(stream)
    progress.step({"step": 3, "round": 0, "loss": 2.0}, total_steps=3, generation_share=0.0)
    assert stream.getvalue() == "[round 0] step 3/3  loss 2.0000\n"


@pytest.mark.parametrize(("margin", "shown"), [
    (-1e-5, "0.000"), (0.0, "0.000"), (1e-5, "0.000"), (-6e-4, "-0.001"), (10.0, "+10.000")])
def test_a_zero_has_no_sign(margin, shown):
    stream = io.StringIO()
    progress, _ = make(stream)
    progress.step({"step": 1, "reward/margin": margin}, total_steps=1, generation_share=0.0)
    assert stream.getvalue() == f"[round 0] step 1/1  margin {shown}\n"


def test_phases_say_whose_records_they_are_about():
    stream = io.StringIO()
    progress, _ = make(stream)
    with progress.about("training"):
        with pytest.raises(KeyError), progress.about("held out"):
            with progress.generation(2):
                pass
            raise KeyError
        with progress.reference(4):
            pass
    with progress.generation(1):
        pass
    assert stream.getvalue().splitlines() == [
        "held out: generation 2/2 responses  0s", "training: reference pass 4/4 sequences  0s",
        "generation 1/1 responses  0s"]


def test_reading_much_is_told_and_little_is_not(tmp_path):
    stream = io.StringIO()
    progress, _ = make(stream)
    for name, size in (("a.safetensors", 2**30), ("b.safetensors", 2**29), ("c.bin", 2**32)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)  # a hole: it takes no room
        progress.reading(tmp_path)
    said = f"reading {{}} GiB of weights from {tmp_path}\n"
    assert stream.getvalue() == said.format("1.0") + said.format("1.5") * 2
    (tmp_path / "a.safetensors").unlink()
    progress.reading(tmp_path)
    assert len(stream.getvalue().splitlines()) == 3


def test_disabled_is_silent(capsys):
    progress = Console(False)
    with progress.generation(2) as advance:
        advance(1, 5)
    progress.step({"step": 1, "loss": 1.0}, total_steps=1, generation_share=0.0)
    progress.note("x")
    progress.warn("y")
    assert capsys.readouterr() == ("", "")


def test_notes_go_to_standard_error(capsys):
    Console(True).note("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_a_failed_phase_does_not_claim_to_be_done():
    stream = Terminal()
    progress, clock = make(stream)
    with pytest.raises(KeyError), progress.generation(3) as advance:
        clock.now += 1
        advance(1)
        raise KeyError
    assert stream.getvalue() == "\r\x1b[2Kgeneration 1/3 responses  ETA 2s\n"


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m")])
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_a_round_says_what_it_changed_on_held_out_records():
    stream = io.StringIO()
    progress, _ = make(stream)
    progress.round({"round": 1, "evaluation_before": {"nll": 2.5, "exact_match": 0.25},
                    "evaluation": {"nll": 2.0, "exact_match": 0.5, "reward_accuracy": 1.0,
                                   "sample_length": 7.0}})
    progress.round({"round": 2, "evaluation_before": {"nll": 2.0}, "evaluation": {}})
    assert stream.getvalue() == ("[round 1] held out: nll 2.5000 -> 2.0000  exact match 0.25 -> "
                                 "0.50  reward accuracy 1.00\n")
