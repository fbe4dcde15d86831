"""Runs that end and resume: killed, complete, extended, changed. On one CPU process curves are equal bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from titan_ckpt import list_checkpoints, verify
from titan_train.cli import main
from titan_train.errors import ExitCode
from train_cases import TINY


def flags(folder: Path, **changes: str) -> list[str]:
    settings = {**TINY, "run.folder": str(folder), "schedule.decay": "cosine"}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return ["--config", "debug", *(word for key, value in settings.items() for word in (f"--{key}", value))]


def start(arguments: list[str], *, by: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    # As many threads as this process has: another number would sum in another order.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, "-m", *by, *(["-m"] if by else []), "titan_train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **threads},
        start_new_session=True,
    )


def curve(folder: Path) -> dict[int, tuple[float, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {m["step"]: (m["loss"], m["grad_norm"]) for m in map(json.loads, lines)}


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str], timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"step {step} was not reached: {process.communicate()[0]}")


def wait_for_line(text: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    shown = []
    for line in process.stdout:
        shown.append(line)
        if text in line:
            return
    pytest.fail(f"the process ended without a line with {text!r}: {''.join(shown)}")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert main(flags(folder, training__steps="40")) == ExitCode.DONE
    return folder


def test_killed_between_checkpoints_resumes_bit_for_bit(unbroken: Path, tmp_path: Path) -> None:
    arguments = flags(tmp_path, training__steps="40", checkpoint__interval="7")
    process = start(arguments)
    wait_for_step(tmp_path, 17, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = curve(tmp_path)
    assert max(before) < 40, "the run was over before it was killed"
    assert main(arguments) == ExitCode.DONE
    assert curve(tmp_path) == curve(unbroken)
    assert {step: curve(unbroken)[step] for step in before} == before  # nor had the killed run strayed


def test_a_complete_run_is_reported_and_can_be_extended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    constant = {"schedule__decay": "none"}
    assert main(flags(tmp_path / "once", training__steps="12", **constant)) == ExitCode.DONE
    assert main(flags(tmp_path / "twice", training__steps="8", **constant)) == ExitCode.DONE
    capsys.readouterr()
    assert main(flags(tmp_path / "twice", training__steps="8", **constant)) == ExitCode.DONE
    again = capsys.readouterr().out
    assert "step 8 of 8, the run is complete" in again
    assert main(flags(tmp_path / "twice", training__steps="12", **constant)) == ExitCode.DONE
    assert "step 8 of 12" in capsys.readouterr().out
    assert curve(tmp_path / "twice") == curve(tmp_path / "once")


def test_another_model_in_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(tmp_path)) == ExitCode.DONE
    assert main(flags(tmp_path, training__steps="20", model__ffn_dim="64")) == ExitCode.FAILED
    shown = capsys.readouterr().err
    assert "layers.0.ffn.gate_proj.weight" in shown
    assert "Traceback" not in shown


def test_another_data_order_in_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(tmp_path)) == ExitCode.DONE
    assert main(flags(tmp_path, training__steps="20", training__seq_len="16")) == ExitCode.FAILED
    assert "seq_len: saved 32, now 16" in capsys.readouterr().err


def test_corrupt_checkpoints_never_start_a_new_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(tmp_path, checkpoint__interval="5")) == ExitCode.DONE
    folders = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert [folder.name for folder in folders] == ["step-00000005", "step-00000010"]
    damage_newest(tmp_path)
    assert main(flags(tmp_path, checkpoint__interval="5", training__steps="11")) == ExitCode.DONE
    assert "step 5 of 11" in capsys.readouterr().out  # passed over for the one before
    for manifest in (tmp_path / "checkpoints").glob("step-*/manifest.json"):
        manifest.write_text("{}")
    assert main(flags(tmp_path, training__steps="12")) == ExitCode.FAILED
    assert "Traceback" not in capsys.readouterr().err


def damage_newest(folder: Path) -> None:
    newest = max((folder / "checkpoints").glob("step-*"))
    victim = max(newest.glob("tensors-*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)


def test_a_required_resume_never_starts_a_new_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    required = {"checkpoint__resume": "required", "checkpoint__interval": "5"}
    assert main(flags(tmp_path, **required)) == ExitCode.FAILED
    shown = capsys.readouterr()
    assert f"there is no checkpoint in {tmp_path / 'checkpoints'}" in shown.err
    assert "--checkpoint.resume auto" in shown.err
    assert "Traceback" not in shown.err
    assert "starting" not in shown.out
    assert not (tmp_path / "metrics.jsonl").exists()
    assert main(flags(tmp_path, checkpoint__interval="5")) == ExitCode.DONE
    assert main(flags(tmp_path, training__steps="11", **required)) == ExitCode.DONE
    assert "step 10 of 11" in capsys.readouterr().out


@pytest.mark.slow
def test_a_corrupt_checkpoint_can_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(tmp_path, checkpoint__interval="5")) == ExitCode.DONE
    damage_newest(tmp_path)
    refused = flags(tmp_path, training__steps="11", checkpoint__on_corruption="raise")
    assert main(refused) == ExitCode.FAILED
    shown = capsys.readouterr().err
    assert "step-00000010 is corrupt" in shown
    assert "Traceback" not in shown


@pytest.mark.slow
def test_the_best_checkpoints_stay(tmp_path: Path) -> None:
    settings = {"checkpoint__interval": "2", "checkpoint__keep_last": "1", "checkpoint__keep_best": "2"}
    # The learning rate makes the loss rise again after its first steps.
    settings |= {"optimizer__lr": "0.5", "schedule__warmup_steps": "0", "metrics__log_interval": "1"}
    assert main(flags(tmp_path, training__steps="12", **settings)) == ExitCode.DONE
    losses = {step: loss for step, (loss, _) in curve(tmp_path).items() if step % 2 == 0}
    kept = {info.step: info.manifest.metrics["loss"] for info in list_checkpoints(str(tmp_path / "checkpoints"))}
    assert kept == {step: losses[step] for step in {*sorted(losses, key=lambda step: losses[step])[:2], 12}}


@pytest.mark.slow
def test_lineage_differs_between_data(tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("one text and another\n" * 200)
    second.write_text("something else\n" * 300)

    def lineage(folder: str, **changes: str) -> dict[str, Any]:
        settings = {"data__source": "files", "checkpoint__keep_last": "none", **changes}
        assert main(flags(tmp_path / folder, **settings)) == ExitCode.DONE
        (info,) = list_checkpoints(str(tmp_path / folder / "checkpoints"))[-1:]
        return info.manifest.lineage

    of_first = lineage("a", data__files=json.dumps([str(first)]))
    again = lineage("b", data__files=json.dumps([str(first)]), run__seed="7", training__global_batch_size="2")
    of_second = lineage("c", data__files=json.dumps([str(second)]))
    assert of_first["data_fingerprint"] == again["data_fingerprint"] != of_second["data_fingerprint"]
    assert of_first["config_digest"] != again["config_digest"]
    resumed = lineage("a", data__files=json.dumps([str(first)]), training__steps="11")
    assert resumed["data_fingerprint"] == of_first["data_fingerprint"]
    assert resumed["parent"]["step"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.nightly)])
def test_a_signal_saves_and_the_run_resumes(number: signal.Signals, unbroken: Path, tmp_path: Path) -> None:
    arguments = flags(tmp_path, training__steps="40")
    process = start(arguments)
    wait_for_step(tmp_path, 3, process)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == ExitCode.STOPPED, shown
    last = max(curve(tmp_path))
    assert f"{number.name}: finishing this step, then saving" in shown
    assert f"saved at step {last} of 40" in shown
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == [f"step-{last:08}"]
    assert "Traceback" not in shown
    assert main(arguments) == ExitCode.DONE
    assert curve(tmp_path) == curve(unbroken)


@pytest.mark.slow
def test_two_processes_stop_together_on_a_signal_to_the_launcher(tmp_path: Path) -> None:
    process = start([*flags(tmp_path, training__steps="4000"), "--nproc", "2"])
    wait_for_step(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=90)
    assert process.returncode == ExitCode.STOPPED, shown
    assert "stopped and saved at step" in shown
    assert "titan-train --config debug --nproc 2 --" in shown
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 1
    assert "Traceback" not in shown


@pytest.mark.slow
def test_torchrun_passes_a_signal_on_and_the_run_is_saved(tmp_path: Path) -> None:
    process = start(flags(tmp_path, training__steps="4000"), by=("torch.distributed.run", "--nproc-per-node", "2"))
    wait_for_step(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=90)
    assert "stopped and saved at step" in shown
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 1


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    # Steps of many seconds, so that the first signal's step is still under way when the second comes.
    slow = {"training__global_batch_size": "512", "training__seq_len": "256", "training__steps": "4000"}
    process = start(flags(tmp_path, **slow))
    wait_for_line("starting", process)
    process.send_signal(signal.SIGTERM)
    wait_for_line("a second signal ends at once", process)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - asked < 5
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_what_was_saved_before_a_failure_stays(tmp_path: Path) -> None:
    explosive = {"optimizer__lr": "1e30", "training__max_norm": "none", "schedule__warmup_steps": "0"}
    assert main(flags(tmp_path, checkpoint__interval="1", **explosive)) == ExitCode.FAILED
    (path,) = (tmp_path / "checkpoints").glob("step-*")  # written in the background while step 2 failed
    assert path.name == "step-00000001"
    assert verify(path, "checksum") == []


def test_a_loss_that_is_not_finite_ends_the_run_unsaved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explosive = {"optimizer__lr": "1e30", "training__max_norm": "none", "schedule__warmup_steps": "0"}
    assert main(flags(tmp_path, **explosive)) == ExitCode.FAILED
    shown = capsys.readouterr().err
    assert "not finite" in shown
    assert "Traceback" not in shown
    assert not list((tmp_path / "checkpoints").glob("step-*"))
