"""The command line, through `main`; one test starts it as a process."""

import io
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rich.progress import Progress

from ckpt_sources import prefixed, read_all, small_external, small_internal
from ckpt_states import Held, flip_bit, make_state
from parity import same_bits
from titan_ckpt import Checkpointer, open_checkpoint, pin
from titan_ckpt.cli import main
from titan_ckpt.convert.huggingface.reader import HuggingFaceDirectory
from titan_ckpt.convert.torch_file import TorchFile
from titan_ckpt.storage.lock import DirectoryLock
from titan_ckpt.storage.open import open_storage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Steps 1 to 3; the metadata has a config."""
    ckpt = Checkpointer(tmp_path / "run")
    for step in (1, 2, 3):
        ckpt.save(step, make_state(step), metadata={"config": {"lr": 0.5, "name": "tiny"}}, metrics={"loss": 1 / step})
    ckpt.close()
    return tmp_path / "run"


def corrupt(path: Path) -> None:
    (file,) = path.glob("*.safetensors")
    flip_bit(file, -3)


def out(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


class TestLs:
    def test_it_lists_steps_sizes_and_validity(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (folder / "step-00000002/state.json").unlink()
        (folder / "step-00000001/manifest.json").write_text("{}")
        pin(str(folder), 3, "good")
        assert main(["ls", str(folder)]) == 0
        head, one, two, three = out(capsys).splitlines()
        assert head.split() == ["STEP", "CREATED", "SIZE", "STATE"]
        assert one.split()[0] == "1"
        assert "CORRUPT: step-00000001/manifest.json" in one
        assert "KiB  CORRUPT: state.json is missing" in two
        assert "KiB  complete  " in three
        assert three.endswith("  latest, pinned as good")
        assert main(["ls", str(folder), "--check"]) == 0
        assert "KiB  valid  " in out(capsys).splitlines()[3]

    def test_json(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        corrupt(folder / "step-00000002")
        assert main(["ls", str(folder), "--json"]) == 0
        found = json.loads(out(capsys))
        assert [entry["step"] for entry in found] == [1, 2, 3]
        assert [entry["valid"] for entry in found] == [True, True, True], "sizes alone do not detect it"
        assert found[2]["latest"]
        assert found[2]["metrics"] == {"loss": 1 / 3}
        assert found[0]["bytes"] == sum(
            path.stat().st_size for path in (folder / "step-00000001").iterdir() if path.name != "manifest.json"
        )
        assert main(["ls", str(folder), "--json", "--check"]) == 0
        found = json.loads(out(capsys))
        assert [entry["valid"] for entry in found] == [True, False, True]
        assert "does not match its checksum" in found[1]["problems"][0]

    def test_no_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["ls", str(tmp_path / "none")]) == 1
        assert "no such directory" in capsys.readouterr().err


class TestShow:
    def test_a_checkpoint(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["show", str(folder / "step-00000002")]) == 0
        message = out(capsys)
        assert "titan, 2 tensors, 117.2" in message
        assert "model/  2 tensors" in message
        assert "weight  float32 [100, 300]  117.19 KiB" in message
        assert "nested/  1 tensors, 14 B" in message
        assert '"lr": 0.5' in message
        assert '"position": 2' in message
        assert "step: 2" in message

    def test_json_and_other_formats(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["show", "--json", str(folder / "step-00000002")]) == 0
        shown = json.loads(out(capsys))
        assert shown["tensors"]["model/weight"] == {"dtype": "float32", "shape": [100, 300], "bytes": 120_000}
        assert shown["metadata"]["config"] == {"lr": 0.5, "name": "tiny"}
        assert shown["values"]["data"]["position"] == 2
        torch.save({"w": torch.ones(2), "bad": {1}}, tmp_path / "w.pt")
        assert main(["show", str(tmp_path / "w.pt")]) == 0
        message = out(capsys)
        assert "w.pt: torch, 1 tensors, 8 B" in message
        assert "left out" in message

    def test_a_directory_of_checkpoints_is_refused(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["show", str(folder)]) == 1
        assert "is a directory of checkpoints: give one of them, e.g." in capsys.readouterr().err

    def test_names_do_not_steer_the_terminal(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        torch.save({"\x1b[31mred\r": torch.ones(2)}, tmp_path / "w.pt")
        assert main(["show", str(tmp_path / "w.pt")]) == 0
        message = out(capsys)
        assert "\x1b" not in message
        assert "\\x1b[31mred\\r" in message


class TestVerify:
    def test_valid(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", str(folder / "step-00000002"), "--threads", "2"]) == 0
        assert out(capsys) == "step-00000002: valid\n"
        assert main(["verify", str(folder)]) == 0
        assert out(capsys).splitlines() == [f"step-0000000{step}: valid" for step in (1, 2, 3)]

    def test_corrupt(self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        corrupt(folder / "step-00000002")
        (folder / "step-00000003/manifest.json").unlink()
        assert main(["verify", str(folder), "--quiet"]) == 1
        message = out(capsys)
        assert "step-00000001: valid" in message
        assert "step-00000002: CORRUPT" in message
        assert "does not match its checksum in the tensor model/" in message
        assert "step-00000003: CORRUPT\n  step-00000003 has no manifest.json" in message
        monkeypatch.chdir(folder / "step-00000002")
        assert main(["verify", "."]) == 1

    def test_its_bar_moves_within_a_file_and_ends_full(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ckpt = Checkpointer(folder)
        ckpt.load({})
        ckpt.save(4, {"model": Held(w=torch.zeros(5 << 20))})
        files = [path for path in folder.glob("step-*/*") if path.name != "manifest.json"]
        expected = sum(path.stat().st_size for path in files)
        corrupt(folder / "step-00000002")
        (folder / "step-00000003/state.json").unlink()
        moved: list[int] = []
        monkeypatch.setattr(Progress, "advance", lambda _self, _task, nbytes: moved.append(nbytes))
        assert main(["verify", str(folder)]) == 1
        assert sum(moved) == expected
        assert 8 << 20 in moved  # of a file of 20 MiB

    @pytest.mark.parametrize("arguments", [["none"], [".", "--threads", "0"]])
    def test_mistakes(self, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(["verify", *arguments]) == 1


class TestDiff:
    def save(self, path: Path, **changes: Any) -> str:
        state = {"a": torch.arange(6.0), "b": torch.ones(2, 2), "n": 1, **changes}
        Checkpointer(path).save(1, {"model": Held(**{key: value for key, value in state.items() if value is not None})})
        return str(path / "step-00000001")

    def test_equal(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["diff", self.save(tmp_path / "x"), self.save(tmp_path / "y")]) == 0
        assert out(capsys) == "2 tensors bit-identical, 0 differ, 0 other differences\n"

    def test_equal_not_a_numbers(self, tmp_path: Path) -> None:
        nan = torch.tensor([float("nan"), 1.0])
        assert main(["diff", self.save(tmp_path / "x", a=nan), self.save(tmp_path / "y", a=nan.clone())]) == 0

    def test_different(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        one = self.save(tmp_path / "x", c=torch.ones(1), d=torch.ones(3), e=torch.tensor([1.0, float("nan"), 2.0]))
        other = self.save(
            tmp_path / "y",
            a=torch.arange(6.0) + torch.tensor([0, 0, 0.25, 0, -0.5, 0]),
            b=torch.ones(2, 2).bfloat16(),
            d=torch.ones(4),
            e=torch.tensor([1.5, 0.0, 2.0]),
            f=torch.ones(1),
            n=2,
        )
        assert main(["diff", one, other]) == 1
        assert out(capsys).splitlines() == [
            "only in A: model/c",
            "only in B: model/f",
            "the value model differs",
            "model/a: max abs difference 0.5",
            "model/b: float32 [2, 2] in A, bfloat16 [2, 2] in B, max abs difference 0",
            "model/d: float32 [3] in A, float32 [4] in B",
            "model/e: max abs difference 0.5, 1 not comparable (NaN, inf)",
            "0 tensors bit-identical, 4 differ, 3 other differences",
        ]

    def test_zeros_of_two_signs_differ(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        one, other = self.save(tmp_path / "x", a=torch.zeros(1)), self.save(tmp_path / "y", a=-torch.zeros(1))
        assert main(["diff", one, other]) == 1
        assert "model/a: max abs difference 0\n" in out(capsys)

    def test_a_part_against_another_format(self, tmp_path: Path) -> None:
        one = self.save(tmp_path / "x")
        torch.save({"model/a": torch.arange(6.0), "model/b": torch.ones(2, 2)}, tmp_path / "w.pt")
        torch.save({"model": {"a": torch.arange(6.0), "b": torch.ones(2, 2)}}, tmp_path / "v.pt")
        assert main(["diff", one, str(tmp_path / "v.pt"), "--prefix", "model/"]) == 0
        assert main(["diff", one, str(tmp_path / "w.pt"), "--prefix", "model/"]) == 1

    def test_corruption_is_reported(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        one, other = self.save(tmp_path / "x"), self.save(tmp_path / "y")
        corrupt(Path(other))
        assert main(["diff", one, other]) == 1
        assert "is corrupt" in capsys.readouterr().err


class TestConvert:
    @pytest.fixture
    def internal(self, tmp_path: Path) -> str:
        ckpt = Checkpointer(tmp_path / "run")
        ckpt.save(5, {"model": Held(**small_internal()), "optimizer": Held(x=torch.ones(2)), "data": Held(n=3)})
        ckpt.close()
        return str(tmp_path / "run/step-00000005")

    @pytest.fixture
    def weight_map(self) -> str:
        return "ckpt_sources:make_small_map"

    def test_to_hugging_face_and_back(self, internal: str, weight_map: str, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text("{}")
        hf = str(tmp_path / "hf")
        assert main(["convert", internal, hf, "--to", "hf", "--map", weight_map, "--max-file-size", "100",
                     "--extra", str(tmp_path / "tokenizer.json")]) == 0  # fmt: skip
        assert same_bits(read_all(HuggingFaceDirectory(hf)), small_external())
        assert (tmp_path / "hf/tokenizer.json").exists()
        back = str(tmp_path / "back")
        assert main(["convert", hf, back, "--to", "titan", "--map", weight_map, "--step", "9"]) == 0
        with open_checkpoint(f"{back}/step-00000009") as checkpoint:
            assert same_bits(read_all(checkpoint), prefixed(small_internal()))
            assert checkpoint.manifest.metadata == {"converted_from": hf}
        assert main(["verify", back]) == 0
        assert main(["diff", internal, f"{back}/step-00000009", "--prefix", "model/"]) == 0
        assert main(["convert", hf, back, "--to", "titan", "--map", weight_map, "--step", "9"]) == 1

    def test_what_was_converted_loads(self, internal: str, weight_map: str, tmp_path: Path) -> None:
        hf, back = str(tmp_path / "hf"), str(tmp_path / "back")
        assert main(["convert", internal, hf, "--to", "hf", "--map", weight_map]) == 0
        assert main(["convert", hf, back, "--to", "titan", "--map", weight_map]) == 0
        state = Held(**{name: torch.zeros_like(tensor) for name, tensor in small_internal().items()})
        assert Checkpointer(back).load({"model": state}) is not None
        assert same_bits(state.state, small_internal())

    def test_a_map_of_a_module_gets_the_config(
        self, internal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "some_map.py").write_text(
            "from ckpt_sources import small_map\n"
            "def make(config):\n    assert config == {'config': 1} or config == {'model_type': 'small'}\n"
            "    return small_map()\n"
            "def broken(config):\n    raise RuntimeError('no')\n"
            "def nothing(config):\n    return 3\n"
        )
        monkeypatch.chdir(tmp_path)
        Checkpointer("m").save(1, {"model": Held(**small_internal())}, metadata={"config": 1})
        arguments = ["convert", "m/step-00000001", "hf", "--to", "hf", "--map"]
        for name in (
            "some_map:broken",
            "some_map:nothing",
            "some_map:absent",
            "no_module:make",
            "none.json",
            "some_map",
        ):
            assert main([*arguments, name]) == 1
        assert not Path("hf").exists()
        assert main([*arguments, "some_map:make"]) == 0
        assert main(["convert", "hf", "back", "--to", "titan", "--map", "some_map:make"]) == 0
        with open_checkpoint("back/step-00000000") as checkpoint:
            assert same_bits(read_all(checkpoint), prefixed(small_internal()))

    def test_to_a_torch_file_in_another_dtype(self, internal: str, tmp_path: Path) -> None:
        assert main(["convert", internal, str(tmp_path / "w.pt"), "--to", "torch", "--dtype", "bfloat16"]) == 0
        wanted = {name: tensor.bfloat16() for name, tensor in small_internal().items()}
        assert same_bits(torch.load(tmp_path / "w.pt", weights_only=True), wanted)
        assert main(["convert", str(tmp_path / "w.pt"), str(tmp_path / "t"), "--to", "titan"]) == 0
        with open_checkpoint(str(tmp_path / "t/step-00000000")) as checkpoint:
            assert same_bits(read_all(checkpoint), prefixed(wanted))

    def test_a_full_state_to_dcp_and_back(self, internal: str, tmp_path: Path) -> None:
        assert main(["convert", internal, str(tmp_path / "dcp"), "--to", "dcp"]) == 0
        state = {"model": {name: torch.zeros_like(tensor) for name, tensor in small_internal().items()}}
        dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
        assert same_bits(state["model"], small_internal())
        assert main(["convert", str(tmp_path / "dcp"), str(tmp_path / "t"), "--to", "titan", "--step", "5"]) == 0
        assert main(["diff", internal, str(tmp_path / "t/step-00000005")]) == 0

    def test_weights_from_dcp_and_meta(self, tmp_path: Path, weight_map: str) -> None:
        dcp.save({"m": small_internal()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
        assert main(["convert", str(tmp_path / "dcp"), str(tmp_path / "hf"), "--to", "hf", "--prefix", "m/",
                     "--map", weight_map]) == 0  # fmt: skip
        assert same_bits(read_all(HuggingFaceDirectory(tmp_path / "hf")), small_external())
        (tmp_path / "meta").mkdir()
        torch.save(small_external(), tmp_path / "meta/consolidated.00.pth")
        assert main(["convert", str(tmp_path / "meta"), str(tmp_path / "t"), "--to", "titan", "--map", weight_map]) == 0
        with open_checkpoint(str(tmp_path / "t/step-00000000")) as checkpoint:
            assert same_bits(read_all(checkpoint), prefixed(small_internal()))

    def test_a_map_may_be_used_the_other_way(self, tmp_path: Path, weight_map: str) -> None:
        torch.save(small_external() | {"junk": torch.ones(1)}, tmp_path / "w.pt")
        arguments = ["convert", str(tmp_path / "w.pt"), str(tmp_path / "o.pt"), "--to", "torch", "--map", weight_map]
        assert main([*arguments, "--direction", "to-internal"]) == 1
        assert main([*arguments, "--direction", "to-internal", "--ignore", "jun*"]) == 0
        assert same_bits(read_all(TorchFile(tmp_path / "o.pt")), small_internal())

    def test_mistakes_leave_nothing(self, internal: str, weight_map: str, tmp_path: Path) -> None:
        target = tmp_path / "hf"
        for more in (["--prefix", "other/"], ["--config", str(tmp_path / "none")], ["--from", "meta"]):
            assert main(["convert", internal, str(target), "--to", "hf", "--map", weight_map, *more]) == 1
        for more in (["--to", "zip"], [], ["--to", "hf", "--max-file-size", "0"], ["--to", "hf", "--dtype", "int8"]):
            assert main(["convert", internal, str(target), *more]) == 2
        assert main(["convert", str(tmp_path / "absent"), str(target), "--to", "hf"]) == 1
        assert not target.exists()


class TestPrune:
    def steps(self, folder: Path) -> list[int]:
        return sorted(int(path.name[5:]) for path in folder.glob("step-*"))

    def test_it_removes_what_is_not_kept(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["prune", str(folder), "--keep-last", "1", "--dry-run"]) == 0
        message = out(capsys)
        assert "step-00000001  would be removed" in message
        assert "step-00000003  kept: is among the last 1" in message
        assert self.steps(folder) == [1, 2, 3]
        assert main(["prune", str(folder), "--keep-last", "1", "--keep-every", "2"]) == 0
        assert "step-00000001  removed" in out(capsys)
        assert self.steps(folder) == [2, 3]

    def test_the_best_by_a_metric(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["prune", str(folder), "--keep-best", "loss:max"]) == 0
        assert "is best by loss" in out(capsys)
        assert self.steps(folder) == [1, 3], "the newest valid one always stays"

    def test_mistakes(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["prune", str(folder)]) == 2
        assert "give --keep-last K" in capsys.readouterr().err
        assert main(["prune", str(folder), "--keep-last", "0"]) == 1
        assert main(["prune", str(folder), "--keep-best", "loss:most"]) == 1
        assert main(["prune", str(folder), "--keep-best", "loss:max:x"]) == 2
        assert main(["prune", str(folder / "none"), "--keep-last", "1"]) == 1
        assert self.steps(folder) == [1, 2, 3]

    def test_a_folder_that_a_job_writes_to_is_left_alone(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lock = DirectoryLock(open_storage(str(folder)))
        assert main(["prune", str(folder), "--keep-last", "1", "--dry-run"]) == 0
        assert main(["prune", str(folder), "--keep-last", "1"]) == 1
        assert "is locked by another job" in capsys.readouterr().err
        assert self.steps(folder) == [1, 2, 3]
        lock.release()
        assert main(["prune", str(folder), "--keep-last", "1"]) == 0
        assert self.steps(folder) == [3]


@pytest.mark.parametrize("arguments", [[], ["lss", "x"], ["ls"], ["ls", "x", "--what"]])
def test_a_wrong_command_line_is_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "usage: titan-ckpt" in capsys.readouterr().err


def test_help_names_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "0 success; 1 error, corrupt or different; 2 wrong usage" in " ".join(out(capsys).split())
    for command in ("ls", "show", "verify", "diff", "convert", "prune"):
        assert main([command, "--help"]) == 0


@pytest.mark.slow
def test_as_a_process(folder: Path, tmp_path: Path) -> None:
    """As a shell starts it: one line of error without a traceback."""
    script = "import sys; from titan_ckpt.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "verify", str(tmp_path / "none")]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("titan-ckpt: ")
    assert len(failed.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["ls", "."], ["ls", ".", "--json"], ["prune", ".", "--keep-last", "1"], ["prune", "--help"]],
)
def test_what_looks_into_no_tensor_does_without_torch(folder: Path, arguments: list[str]) -> None:
    script = "import sys; from titan_ckpt.cli import main; code = main(); sys.exit(code or 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=folder, check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_ctrl_c(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> list[str]:
        os.kill(os.getpid(), signal.SIGINT)
        return []

    monkeypatch.setattr("titan_ckpt.cli.verify.find_corruption", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
    try:
        assert main(["verify", str(folder)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    # rich 13.0 ends its progress bar with an empty line.
    assert capsys.readouterr().err.lstrip("\n") == "titan-ckpt: interrupted\n"


def test_the_reader_of_the_output_may_exit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["ls", str(folder)]) == 0


def test_the_entry_point_is_declared() -> None:
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert declared["project"]["scripts"] == {"titan-ckpt": "titan_ckpt.cli:main"}
