import json
import logging
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from ckpt_states import Held, ModelState, OptimizerState, blank_state, holds_step, make_model, make_state
from titan_ckpt import (
    Checkpointer,
    CheckpointError,
    Retention,
    list_checkpoints,
    open_checkpoint,
    open_source,
    pin,
    plan_prune,
    unpin,
    verify,
)
from titan_ckpt.save import file_writer, plan, snapshot, writer


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_is_loaded(tmp_path: Path, asynchronous: bool) -> None:
    ckpt = Checkpointer(tmp_path / "new" / "folder", asynchronous=asynchronous)
    for step in (10, 20):
        ckpt.save(step, make_state(step), {"config_digest": f"d{step}", "betas": (0.9, 0.95)})
    ckpt.wait()
    for asked, step in ((None, 20), (10, 10)):
        state = blank_state()
        found = ckpt.load(state, step=asked)
        assert found is not None
        assert (found.step, Path(found.path).name) == (step, f"step-{step:08d}")
        assert found.metadata == {"config_digest": f"d{step}", "betas": (0.9, 0.95)}
        assert holds_step(state, step)
    assert [info.step for info in list_checkpoints(ckpt.directory)] == [10, 20]
    ckpt.close()
    ckpt.close()


def test_tensors_are_filled_in_place_and_handed_over(tmp_path: Path) -> None:
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, make_state(1))
    state = blank_state()
    weight = state["model"].state["weight"]
    ckpt.load(state)
    assert state["model"].state["weight"] is weight


def test_every_dtype_and_awkward_shapes(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint16, torch.uint64, torch.int8]
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}
    tensors |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "slice of a large one": torch.arange(1000.0)[::100],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "nan and -0": torch.tensor([float("nan"), -0.0, float("inf")]),
        "": torch.ones(1),
        "conjugated": torch.tensor([1 + 2j, 3j]).to(torch.complex64).conj(),
        "name@0,0": torch.ones(3),
        "a/b~c.d ü": torch.ones(2),
    }
    for asynchronous in (False, True):
        folder = tmp_path / str(asynchronous)
        ckpt = Checkpointer(folder, asynchronous=asynchronous)
        ckpt.save(0, {"t/~": Held(**tensors)})
        ckpt.wait()
        state = {"t/~": Held(**{name: torch.zeros_like(tensor) for name, tensor in tensors.items()})}
        ckpt.load(state)
        for name, tensor in tensors.items():
            got = state["t/~"].state[name]
            one, other = (x.detach().resolve_conj().reshape(-1).contiguous().view(torch.uint8) for x in (got, tensor))
            assert torch.equal(one, other), name
        ckpt.close()


def test_a_model_and_its_optimizer_go_on_as_if_nothing_happened(tmp_path: Path) -> None:
    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
        losses = []
        for step in steps:
            torch.manual_seed(step)
            loss = model(torch.randn(4, 10)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    ckpt = Checkpointer(tmp_path, asynchronous=True)
    model = make_model(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9))
    train(model, optimizer, range(3))
    ckpt.save(3, {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)})
    uninterrupted = train(model, optimizer, range(3, 6))
    model = make_model(2)
    optimizer = torch.optim.AdamW(model.parameters())
    ckpt.load({"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)})
    ckpt.close()
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert train(model, optimizer, range(3, 6)) == uninterrupted


def test_entries_not_asked_for_stay_behind(tmp_path: Path) -> None:
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, make_state(1))
    data = Held()
    assert ckpt.load({"data": data}) is not None
    assert data.state == {"position": 1, "fraction": 1 / 3}


def test_an_empty_directory_is_not_a_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        assert Checkpointer(folder).load(blank_state()) is None
        assert list_checkpoints(folder) == []
    (tmp_path / ".staging-step-00000001-0123abcd").mkdir()
    (tmp_path / "notes").mkdir()
    assert Checkpointer(tmp_path).load(blank_state()) is None


def test_the_layout_on_disk(tmp_path: Path) -> None:
    Checkpointer(tmp_path).save(100, make_state(100), {"note": "x"})
    path = tmp_path / "step-00000100"
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert files == {"manifest.json", "state.json", "tensors-00000-of-00001.safetensors"}
    assert (tmp_path / "latest").read_text() == "step-00000100\n"
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert manifest["format_version"] == 1
    assert manifest["step"] == 100
    assert manifest["metadata"] == {"note": "x"}
    assert manifest["lineage"]["world_size"] == 1
    assert manifest["lineage"]["versions"]["torch"] == torch.__version__
    content = json.loads((path / "state.json").read_text())
    assert content["values"] == {"data": {"position": 100, "fraction": 100 / 3}}
    assert set(content["tensors"]) == {"model/weight", "model/nested/bias"}
    assert verify(path, level="checksum") == []


def test_the_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    Checkpointer(tmp_path).save(1, make_state(1))
    tensors = load_file(tmp_path / "step-00000001" / "tensors-00000-of-00001.safetensors")
    assert set(tensors) == {"model/weight", "model/nested/bias"}
    assert torch.equal(tensors["model/weight"], make_state(1)["model"].state["weight"])
    assert torch.equal(tensors["model/nested/bias"], make_state(1)["model"].state["nested"]["bias"])


def test_the_checksums_are_those_of_the_files(tmp_path: Path) -> None:
    Checkpointer(tmp_path).save(1, make_state(1))
    path = tmp_path / "step-00000001"
    for name, record in json.loads((path / "manifest.json").read_text())["files"].items():
        content = (path / name).read_bytes()
        assert record == {"size": len(content), "checksum": xxhash.xxh3_128_hexdigest(content)}


def test_lineage_tells_where_it_comes_from(tmp_path: Path) -> None:
    metadata = {"tokens_seen": 4096, "config_digest": "c0", "data_fingerprint": "d1", "layout": {"dp_shard": 2}}
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, make_state(1))
    ckpt.save(2, make_state(2), {**metadata, "note": "x"})
    ckpt.close()
    first, second = (info.manifest for info in list_checkpoints(tmp_path))
    assert first.lineage["parent"] is None
    assert first.lineage["tokens_seen"] is None
    assert {key: second.lineage[key] for key in metadata} == metadata
    assert second.lineage["parent"] == {"step": 1, "digest": first.digest}
    ckpt = Checkpointer(tmp_path)
    ckpt.load(blank_state(), step=1)
    ckpt.save(3, make_state(3))
    assert list_checkpoints(tmp_path)[-1].manifest.lineage["parent"] == {"step": 1, "digest": first.digest}


def test_large_tensors_take_several_pieces_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"w{place}": torch.randn(1000 + place, 1100) for place in range(3)} | {"odd": torch.ones(7).bool()}
    monkeypatch.setattr(snapshot, "assign_writes", lambda held, _: plan.assign_writes(held, 5_000_000))
    monkeypatch.setattr(file_writer, "PIECE_BYTES", 1 << 20)
    monkeypatch.setattr(writer, "PIECE_BYTES", 1 << 20)
    for asynchronous in (False, True):
        ckpt = Checkpointer(tmp_path / str(asynchronous), asynchronous=asynchronous)
        ckpt.save(1, {"model": Held(**tensors)})
        ckpt.wait()
        state = {"model": Held(**{name: torch.zeros_like(tensor) for name, tensor in tensors.items()})}
        found = ckpt.load(state)
        assert found is not None
        assert len(found.manifest.files) == 4
        assert all(torch.equal(state["model"].state[name], tensor) for name, tensor in tensors.items())
        with open_checkpoint(found.path) as opened:
            assert len(opened.tensors["model/w0"].chunks[0].checksums) == 5
        ckpt.close()


def test_what_is_tied_stays_tied(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    state = {"model": Held(embedding=weight, head=weight)}
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, state)
    expected = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    ckpt.load(state)
    assert torch.equal(weight, expected)
    assert state["model"].state["head"] is state["model"].state["embedding"] is weight


def test_a_step_that_is_there_is_not_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ckpt = Checkpointer(tmp_path)
    ckpt.save(1, make_state(1))
    before = (tmp_path / "step-00000001" / "manifest.json").stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        ckpt.save(1, make_state(2))
    assert "not written again" in caplog.text
    assert (tmp_path / "step-00000001" / "manifest.json").stat().st_mtime_ns == before
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "latest", ".lock"}


def test_settings_and_steps_are_checked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="keep_last must be at least 1"):
        Checkpointer(tmp_path, keep_last=0)
    ckpt = Checkpointer(tmp_path)
    for step in (-1, True, 1.0):
        with pytest.raises(CheckpointError, match="step must be an int"):
            ckpt.save(step, make_state(1))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r'state\["model"\] is a dict, which has no state_dict'):
        ckpt.save(1, {"model": {}})  # type: ignore[dict-item]
    ckpt.close()
    with pytest.raises(CheckpointError, match="closed"):
        ckpt.save(1, make_state(1))
    with pytest.raises(CheckpointError, match="closed"):
        ckpt.load(blank_state())


@pytest.mark.parametrize("kind", [str, Path])
def test_places_are_texts_or_paths(tmp_path: Path, kind: type[str] | type[Path]) -> None:
    Checkpointer(kind(tmp_path)).save(1, make_state(1))
    folder, one = kind(tmp_path), kind(tmp_path / "step-00000001")
    assert [info.step for info in list_checkpoints(folder)] == [1]
    assert verify(one, level="checksum") == []
    assert open_checkpoint(one).tensors.keys() == open_source(one).tensors.keys() != set()
    pin(folder, 1, "first")
    assert list(plan_prune(folder, Retention(keep_last=1)).keep) == ["step-00000001"]
    unpin(folder, "first")
