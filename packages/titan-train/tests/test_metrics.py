"""What a run reports: the line, the file, TensorBoard, the summary."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from titan_train.cli import main
from titan_train.device import Peak, find_peak
from titan_train.metrics import FileSink, Meter, StepMetrics, StepRecord, TerminalSink, clock, scalars
from train_cases import TINY
from train_recorder import Recorder

COUNTS = {"tokens": 32, "documents": 1, "padding": 0, "cropped": 0, "skipped": 0, "epoch": 0}


def metrics(step: int, loss: float = 2.5, **more: float) -> StepMetrics:
    return StepMetrics(step, loss, 1.25, 3e-4, step * 100, 5120.4, 0.456, 0.75, 61.0, {"stdlib": COUNTS}, more)


def record(step: int, losses: list[float], sources: dict[str, dict[str, float]]) -> StepRecord:
    return StepRecord(step=step, losses=losses, grad_norm=1.0, lr=0.1, tokens=1000 * step, sources=sources)


def test_line_has_no_color_codes_in_a_file_and_some_on_a_terminal() -> None:
    plain, colored = io.StringIO(), io.StringIO()
    TerminalSink(Console(file=plain), 200).write(metrics(10))
    TerminalSink(Console(file=colored, force_terminal=True), 200).write(metrics(10))
    expected = "step  10/200  loss 2.5000  grad 1.250  lr 3.00e-04  5,120 tok/s  MFU 45.6%  mem 0.75 GiB  eta 01:01\n"
    assert plain.getvalue() == expected
    assert "\x1b[" in colored.getvalue()


def test_the_line_shows_losses_of_few_sources_and_the_files_those_of_all(tmp_path: Path) -> None:
    line = io.StringIO()
    few, many = ({f"s[{i}]": {**COUNTS, "loss": 1.5 + i} for i in range(count)} for count in (2, 5))
    sink = TerminalSink(Console(file=line), 200)
    sink.write(replace(metrics(10), sources={**few, "unused": COUNTS}))
    sink.write(replace(metrics(20), sources=many))
    assert [text.split("  ")[2] for text in line.getvalue().splitlines()] == [
        "loss 2.5000 (s[0] 1.500, s[1] 2.500)",
        "loss 2.5000",
    ]
    assert scalars(replace(metrics(20), sources=many))["data/s[4]/loss"] == 5.5


def test_metrics_of_the_model_are_reported_everywhere(tmp_path: Path) -> None:
    said, line = metrics(10, **{"experts/max_load": 1.23456, "experts/idle": 0.0}), io.StringIO()
    TerminalSink(Console(file=line), 200).write(said)
    assert "mem 0.75 GiB  max_load 1.23  idle 0  eta 01:01\n" in line.getvalue()
    sink = FileSink(tmp_path / "metrics.jsonl", resumed_step=0)
    sink.write(said)
    sink.close()
    written = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (written["step"], written["experts/max_load"], written["experts/idle"]) == (10, 1.23456, 0.0)
    assert "more" not in written
    assert scalars(said) == scalars(metrics(10)) | {"experts/max_load": 1.23456, "experts/idle": 0.0}


def test_file_drops_steps_after_the_resumed_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = FileSink(path, resumed_step=0)
    for step in (1, 2, 3, 4):
        sink.write(metrics(step, loss=1 / 3))
    sink.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # cut short by a kill
    sink = FileSink(path, resumed_step=2)
    sink.write(metrics(3, loss=0.1))
    sink.close()
    seen = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(m["step"], m["loss"]) for m in seen] == [(1, 1 / 3), (2, 1 / 3), (3, 0.1)]


def test_mfu_is_model_flops_over_the_peak_of_all_processes() -> None:
    recorder = Recorder()
    meter = Meter(
        [recorder],
        total_steps=10,
        flops_per_token=lambda seq_len: 1e6 * seq_len,
        peak=Peak(1e9, "test"),
        world_size=4,
        device=torch.device("cpu"),
    )
    meter.start(0)
    meter.count(1000, 6)
    meter.count(2000, 12)  # sequences have become longer, and a token costs more
    shown = meter.report(record(2, [3.0, 2.0], {"web": COUNTS}))
    assert recorder.seen == [shown]
    assert (meter.first, meter.recent, shown.loss) == ((1, 3.0), [3.0, 2.0], 2.0)
    assert shown.sources == {"web": COUNTS}
    assert shown.mfu == pytest.approx(shown.tokens_per_second * 10e6 / 4e9)
    assert shown.seconds_left == pytest.approx(8 * 1500 / shown.tokens_per_second)
    assert meter.mfu(2.0) == pytest.approx(30e9 / 2 / 4e9)
    meter.count(500, 4)
    again = meter.report(record(3, [1.0], {}))  # of what has come since the last report alone
    assert again.mfu == pytest.approx(again.tokens_per_second * 4e6 / 4e9)


def test_measured_peak_is_not_beaten_by_a_large_product() -> None:
    peak = find_peak(torch.device("cpu"), torch.float32)
    assert 1e9 < peak.flops < 1e14
    assert "measured here" in peak.source


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 3599, 3600, 90061)] == ["00:00", "01:00", "59:59", "1:00:00", "25:01:01"]


def test_a_run_writes_events_metrics_config_and_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**TINY, "run.folder": str(tmp_path), "metrics.tensorboard": "true", "sample.tokens": "20"}
    flags = [word for key, value in settings.items() for word in (f"--{key}", value)]
    assert main(["--config", "debug", *flags]) == 0
    shown = capsys.readouterr().out
    for part in ("starting at step 0 of 10", "step 10/10", "done", "final loss", "tokens/s", "MFU", "GFLOP/s"):
        assert part in shown
    assert f"{tmp_path}: config.toml, metrics.jsonl, tensorboard/, checkpoints/" in shown
    assert "  | def " in shown  # the sample continues the prompt
    assert "--training.steps 20" in shown

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    recorded = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert set(events.Tags()["scalars"]) == set(scalars(metrics(1)))
    assert [e.value for e in events.Scalars("data/stdlib/tokens")] == [32 * 8 * step for step in range(1, 11)]
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 11))
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx([m["loss"] for m in recorded])

    # The written config is one to start from: it gives the same run.
    assert main(["--config", str(tmp_path / "config.toml"), "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert [line.split("  #")[0] for line in printed.splitlines()] == [
        line.split("  #")[0] for line in (tmp_path / "config.toml").read_text().splitlines()
    ]
