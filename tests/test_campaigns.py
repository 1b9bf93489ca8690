"""Short forms of the campaigns in benchmarks/: runs that are killed, inputs that are corrupted."""

import sys

import pytest

from benchmarks.fuzz import FAULT, Fuzzer, kinds, kinds_of_run
from benchmarks.kill import Aim, Campaign, being_written, differences

SHORT = ("--config.max_steps=2", "--config.save_steps=1", "--config.eval_every=0", "--config.eval.file_name=")


@pytest.mark.slow
def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path):
    campaign = Campaign(tmp_path, SHORT)
    campaign.run_to_the_end(campaign.reference)
    run = tmp_path / "run"
    aim = Aim("checkpoint", lambda workdir: being_written(workdir / "checkpoints"), 0)
    assert campaign.kill_at(run, aim, 0.02) is not None
    assert differences(campaign.reference, run)
    campaign.run_to_the_end(run)
    assert not differences(campaign.reference, run)


def faults(fuzzer, inputs):
    for number in range(inputs):
        kind, verdict, text, _ = fuzzer.run(number)
        if verdict == FAULT:
            yield f"{number}: {kind.name}: {text}"


def test_corrupted_inputs_are_refused_in_one_line_or_taken_for_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    assert not list(faults(Fuzzer(tmp_path, kinds(), seed=1, limit_s=60), 2 * len(kinds())))


@pytest.mark.slow
def test_so_are_corrupted_files_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    campaign = Campaign(tmp_path / "run")
    campaign.run_to_the_end(campaign.reference)
    assert not list(faults(Fuzzer(tmp_path, kinds_of_run(campaign.reference), seed=1, limit_s=60), 100))
