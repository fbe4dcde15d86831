"""DCP's folders: what its own code writes is read bit for bit, and what we write its own code reads."""

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ckpt_hostile import Call, hostile_pickles
from ckpt_sources import Tensors, read_all
from ckpt_states import Held, make_model
from parity import same_bits
from titan_ckpt import Checkpointer, CheckpointError, open_checkpoint, open_source
from titan_ckpt.cli import main
from titan_ckpt.convert.dcp import metadata as restricted
from titan_ckpt.convert.dcp.reader import DcpDirectory
from titan_ckpt.convert.dcp.safetensors_reader import DcpSafetensorsDirectory
from titan_ckpt.convert.dcp.writer import export_dcp


@pytest.fixture(autouse=True)
def no_warnings_of_dcp() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def trained_state() -> dict[str, Any]:
    model = make_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 10)).sum().backward()
    optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        "half": torch.randn(5).to(torch.bfloat16),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "train": {"step": 3, "losses": [1.5, float("inf")], "betas": (0.9, 0.95), "text": "a/b", "none": None},
    }


def save(state: dict[str, Any], folder: Path) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def test_what_dcp_wrote_is_read_to_the_bit(tmp_path: Path) -> None:
    state = trained_state()
    folder = DcpDirectory(save(state, tmp_path / "dcp"))
    wanted = {f"model/{name}": tensor for name, tensor in state["model"].items()}
    wanted |= {f"optimizer/{name}": value for name, value in state["optimizer"].items() if torch.is_tensor(value)}
    wanted |= {name: state[name] for name in ("half", "scalar", "empty")}
    assert same_bits(read_all(folder), wanted)
    assert folder.values["train"] == state["train"]
    assert folder.values["optimizer"]["param_groups.0.weight.lr"] == 0.1
    assert folder.left_out == {}


def torchtitan_state() -> dict[str, Any]:
    """What torchtitan hands to DCP: the model's tensors at the top beside Statefuls, optimizer entries by clean name.

    Seen in what its 0.3.0 writes: step counters are tensors, hyperparameters are entries for each parameter, and the
    data loader's state is pickled bytes for each rank.
    """
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])})
    model["layers"].register_buffer("tokens_per_expert", torch.arange(4))
    optimizer: dict[str, Any] = {}
    for name, weight in model.named_parameters():
        moments = {
            "step": torch.tensor(4.0),
            "exp_avg": torch.randn_like(weight),
            "exp_avg_sq": torch.rand_like(weight),
        }
        optimizer |= {f"state.{name}.{key}": tensor for key, tensor in moments.items()}
        settings = {"lr": 2e-4, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": False, "foreach": None}
        optimizer |= {f"param_groups.{name}.{key}": value for key, value in settings.items()}
    loader = {"dp_rank_0": pickle.dumps({"at": 7}), "dp_rank_1": pickle.dumps({"at": 8}), "world_size": 2}
    return {
        "train_state": Held(step=4, ntokens_seen=400),
        "optimizer": Held(**optimizer),
        "dataloader": Held(**loader),
        "lr_scheduler": Held(last_epoch=4),
        **model.state_dict(),
    }


def test_a_folder_of_torchtitans_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torchtitan_state()
    optimizer = state["optimizer"].state
    folder = DcpDirectory(save(state, tmp_path / "step-4"))
    weights = {name: tensor for name, tensor in state.items() if torch.is_tensor(tensor)}
    moments = {f"optimizer/{name}": value for name, value in optimizer.items() if torch.is_tensor(value)}
    assert len(weights) == 5
    assert len(moments) == 12
    assert same_bits(read_all(folder), {**weights, **moments})
    settings = {name: value for name, value in optimizer.items() if not torch.is_tensor(value)}
    assert folder.values == {
        "train_state": {"step": 4, "ntokens_seen": 400},
        "optimizer": settings,
        "dataloader": {"world_size": 2},
        "lr_scheduler": {"last_epoch": 4},
    }
    assert list(folder.left_out) == ["dataloader/dp_rank_0", "dataloader/dp_rank_1"]  # pickles are not looked into

    given = ["convert", str(tmp_path / "step-4")]
    assert main([*given, str(tmp_path / "whole"), "--to", "titan", "--step", "4"]) == 0
    assert "left out dataloader/dp_rank_0" in capsys.readouterr().err
    with open_checkpoint(str(tmp_path / "whole" / "step-00000004")) as opened:
        assert same_bits({name: opened.read(name) for name in opened.tensors}, {**weights, **moments})
        assert opened.values == folder.values
    assert main([*given, str(tmp_path / "hf"), "--to", "hf", "--ignore", "optimizer/*"]) == 0
    assert same_bits(read_all(open_source(str(tmp_path / "hf"))), weights)
    assert main(["show", str(tmp_path / "step-4")]) == 0
    assert "layers.0.weight" in capsys.readouterr().out


def test_shards_are_put_together_and_cut(tmp_path: Path, one_rank: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    tensor = torch.arange(40.0).reshape(8, 5)
    pieces = [tensor[:3], tensor[3:4], tensor[4:]]
    path = save(
        {f"w{n}": distribute_tensor(piece, mesh, [Shard(0)]) for n, piece in enumerate(pieces)}, tmp_path / "dcp"
    )
    # Three tensors of one shard each: joined into one of three in the record, as three ranks would have written it.
    record = pickle.loads((path / ".metadata").read_bytes())
    chunks, storage = [], {}
    for n, start in enumerate((0, 3, 4)):
        chunks.append(dcp_metadata.ChunkStorageMetadata(torch.Size([start, 0]), pieces[n].shape))
        info = record.storage_data[dcp_metadata.MetadataIndex(f"w{n}", [0, 0])]
        storage[dcp_metadata.MetadataIndex("w", [start, 0])] = info
    properties = record.state_dict_metadata["w0"].properties
    record.state_dict_metadata = {"w": dcp_metadata.TensorStorageMetadata(properties, tensor.shape, chunks)}
    record.storage_data, record.planner_data = storage, {"w": ("w",)}
    (path / ".metadata").write_bytes(pickle.dumps(record))
    folder = DcpDirectory(path)
    assert torch.equal(folder.read("w"), tensor)
    assert torch.equal(folder.read_slice("w", (2, 1), (4, 3)), tensor[2:6, 1:4])


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_safetensors_files_of_dcp(tmp_path: Path, one_rank: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    state = {"a.w": torch.randn(4, 3), "half": torch.randn(2).bfloat16(), "scalar": torch.tensor(2.0)}
    sharded = {name: distribute_tensor(tensor, mesh, [Replicate()]) for name, tensor in state.items()}
    writer = dcp.HuggingFaceStorageWriter(path=str(tmp_path / "hf"), save_distributed=True)
    dcp.save(sharded, storage_writer=writer)
    assert same_bits(read_all(DcpSafetensorsDirectory(tmp_path / "hf")), state)


def test_parts_in_several_safetensors_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensor = torch.arange(20.0).reshape(4, 5)
    for n, (rows, at) in enumerate([(slice(0, 3), 0), (slice(3, 4), 3)]):
        notes = {"DCP_SHARDING_INFO": f'{{"w": {{"saved_offsets": [{at}, 0]}}}}'}
        save_file({"w": tensor[rows].clone()}, tmp_path / f"shard-{n}.safetensors", metadata=notes)
    folder = DcpSafetensorsDirectory(tmp_path)
    assert torch.equal(folder.read("w"), tensor)
    assert torch.equal(folder.read_slice("w", (2, 1), (2, 2)), tensor[2:4, 1:3])
    save_file({"w": tensor[3:].clone()}, tmp_path / "shard-1.safetensors", metadata={"DCP_SHARDING_INFO": '{"w": {}}'})
    with pytest.raises(CheckpointError, match="does not say which part of w it holds"):
        DcpSafetensorsDirectory(tmp_path)
    notes = {"DCP_SHARDING_INFO": '{"w": {"saved_offsets": [2, 0]}}'}
    save_file({"w": tensor[3:].clone()}, tmp_path / "shard-1.safetensors", metadata=notes)
    with pytest.raises(CheckpointError, match=r"w is covered twice|w has more chunks"):
        DcpSafetensorsDirectory(tmp_path)


def test_what_we_write_dcp_reads(tmp_path: Path) -> None:
    tensors = {"model/layers.0.w": torch.randn(3, 4), "opt/state/x": torch.randn(2).bfloat16(), "s": torch.tensor(3)}
    source = Tensors(tensors, {"train": {"step": 5}})
    export_dcp(source, tmp_path / "dcp")
    assert sorted(source.whole) == sorted(tensors)
    state = {
        "model": {"layers.0.w": torch.zeros(3, 4)},
        "opt": {"state": {"x": torch.zeros(2).bfloat16()}},
        "s": torch.tensor(0),
        "train": {"step": 0},
    }
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    loaded = {
        "model/layers.0.w": state["model"]["layers.0.w"],
        "opt/state/x": state["opt"]["state"]["x"],
        "s": state["s"],
    }
    assert same_bits(loaded, tensors)
    assert state["train"] == {"step": 5}
    folder = DcpDirectory(tmp_path / "dcp")
    assert same_bits(read_all(folder), tensors)
    assert folder.values == {"train": {"step": 5}}


ODD_VALUES: dict[str, Any] = {
    "train": {
        "groups": [{"lr": 0.1, "betas": (0.9, 0.95)}, {"lr": 0.2, "more": [{}, [{"a": 1}], []]}],
        "empty": {},
        "nested": {"empty": {}, "list": []},
        "lists": [[], [1, [2]], ()],
        "pair": ({"a": 1}, {}),
        "numbers": {"0": "a", "1": "b"},
        "ten": [{"place": place} for place in range(11)],
    },
    "none": {},
}


def test_values_are_the_same_after_the_way_to_dcp_and_back(tmp_path: Path) -> None:
    ckpt = Checkpointer(tmp_path / "first")
    ckpt.save(1, {"model": Held(w=torch.ones(2), n=1), **{name: Held(**held) for name, held in ODD_VALUES.items()}})
    ckpt.close()
    way = [("first/step-00000001", "dcp", "dcp"), ("dcp", "back", "titan")]
    for source, target, form in way:
        given = ["convert", str(tmp_path / source), str(tmp_path / target), "--to", form]
        assert main([*given, "--step", "1"] if form == "titan" else given) == 0
    with open_checkpoint(tmp_path / "back/step-00000001") as opened:
        assert opened.values == {**ODD_VALUES, "model": {"n": 1}}
        assert list(opened.tensors) == ["model/w"]
    loaded = {"train": {"groups": [{"lr": 0.0}], "empty": {}, "ten": [{"place": None}]}}
    dcp.load(loaded, checkpoint_id=tmp_path / "dcp", no_dist=True)  # DCP itself finds what it asks for
    assert loaded == {"train": {"groups": [{"lr": 0.1}], "empty": {}, "ten": [{"place": 0}]}}


PLAIN = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text("ab.0", max_size=2)
NESTED = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=2).map(tuple) | st.dictionaries(st.text("ab01"), inner)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.text("ab"), NESTED, max_size=3))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_values_are_the_same_after_the_way_to_dcp_and_back(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    export_dcp(Tensors({"w": torch.ones(1)}, {"values": values}), folder / "dcp")
    assert DcpDirectory(folder / "dcp").values == {"values": values}


def test_a_list_of_dcps_that_holds_tensors_keeps_them(tmp_path: Path) -> None:
    state = {"opt": {"groups": [{"w": torch.ones(2), "lr": 0.1}, {"lr": 0.2}], "plain": [{"a": 1}]}}
    folder = DcpDirectory(save(state, tmp_path / "dcp"))
    assert list(folder.tensors) == ["opt/groups/0/w"]
    assert folder.values == {"opt": {"groups": {"0": {"lr": 0.1}, "1": {"lr": 0.2}}, "plain": [{"a": 1}]}}


def test_two_values_of_one_flat_name_are_refused(tmp_path: Path) -> None:
    for values in ({"a": {"b": 1}, "a.b": 2}, {"a": {"b": {}}, "a.b": 2}):
        with pytest.raises(CheckpointError, match=r"a\.b"):
            export_dcp(Tensors({"w": torch.ones(1)}, values), tmp_path / "dcp")
    assert not (tmp_path / "dcp").exists()


def test_the_list_of_names_is_what_real_files_need(tmp_path: Path) -> None:
    """Every name on the list is needed: without it, some real file cannot be read."""
    path = save(trained_state(), tmp_path / "dcp")
    needed: set[tuple[str, str]] = set()

    class Noting(pickle._Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            needed.add((module, name))
            return super().find_class(module, name)

    Noting(io.BytesIO((path / ".metadata").read_bytes())).load()
    listed = {(module, name) for module, names in restricted._RECORDS.items() for name in names}
    dtypes = {("torch", name) for name in restricted._DTYPES}
    assert needed <= listed | dtypes
    unneeded = {name for _, name in listed - needed}
    assert unneeded <= {"Path", "WindowsPath", "PosixPath"}, "admitted without need"


# ---- hostile files ----


@pytest.mark.parametrize("name", hostile_pickles(Path("x")))
def test_hostile_pickles_are_refused(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "executed"
    (tmp_path / ".metadata").write_bytes(hostile_pickles(marker)[name])
    with pytest.raises(CheckpointError, match=r"\.metadata is refused"):
        DcpDirectory(tmp_path)
    assert not marker.exists()


def test_the_calls_would_have_been_made_by_pickle(tmp_path: Path) -> None:
    """The marker works: Python's own unpickler executes these files."""
    ran = 0
    for name, data in hostile_pickles(tmp_path / "executed").items():
        if name.startswith(("os.system", "eval", "exec", "INST")):
            pickle.loads(data)
            assert (tmp_path / "executed").exists(), name
            (tmp_path / "executed").unlink()
            ran += 1
    assert ran == 6


class Record:
    """A `.metadata` that can be made wrong."""

    def __init__(self) -> None:
        self.shape, self.chunks = [4, 2], [([0, 0], [2, 2]), ([2, 0], [2, 2])]
        self.places: list[tuple[str, list[int] | None, str, int, int]] = []
        self.extra: dict[str, Any] = {}
        self.names = ["w"]

    def write(self, folder: Path) -> Path:
        blobs = []
        for _, sizes in self.chunks[:2]:
            stream = io.BytesIO()
            torch.save(torch.ones([abs(size) % 8 for size in sizes]), stream)
            blobs.append(stream.getvalue())
        (folder / "__0_0.distcp").write_bytes(b"".join(blobs))
        places = self.places or [
            ("w", self.chunks[0][0], "__0_0.distcp", 0, len(blobs[0])),
            ("w", self.chunks[1][0], "__0_0.distcp", len(blobs[0]), len(blobs[1])),
        ]
        chunks = [dcp_metadata.ChunkStorageMetadata(torch.Size(a), torch.Size(b)) for a, b in self.chunks]
        properties = dcp_metadata.TensorProperties()
        spec = dcp_metadata.TensorStorageMetadata(properties, torch.Size(self.shape), chunks)
        storage = {
            dcp_metadata.MetadataIndex(name, offset): _StorageInfo(file, start, length)
            for name, offset, file, start, length in places
        }
        record = dcp_metadata.Metadata(dict.fromkeys(self.names, spec), storage_data=storage)
        for key, value in self.extra.items():
            setattr(record, key, value)
        (folder / ".metadata").write_bytes(pickle.dumps(record))
        return folder


def wrong(**changes: Any) -> Callable[[], Record]:
    def make() -> Record:
        record = Record()
        for key, value in changes.items():
            setattr(record, key, value)
        return record

    return make


def at(*places: tuple[str, list[int], str, int, int]) -> Callable[[], Record]:
    return wrong(places=list(places))


WRONG: dict[str, tuple[Callable[[], Record], str]] = {
    "negative size": (wrong(shape=[-4, 2]), "expected a size or an offset, found '-4'"),
    "huge size": (wrong(shape=[1 << 62, 2]), "expected a size or an offset"),
    "product beyond 2^64": (wrong(shape=[1 << 40, 1 << 40]), "w has the impossible shape"),
    "nothing, and huge": (
        wrong(shape=[0, 1 << 61, 1 << 61], chunks=[([0] * 3, [0] * 3), ([1] * 3, [0] * 3)]),
        "impossible shape",
    ),
    "100 dimensions": (wrong(shape=[1] * 100), "invalid shape"),
    "not covered": (wrong(shape=[5, 2]), "w is not covered by its chunks: they hold 8 of 10"),
    "covered twice": (wrong(chunks=[([0, 0], [2, 2]), ([1, 0], [2, 2])], shape=[4, 2]), "w is covered twice"),
    "a chunk outside": (wrong(chunks=[([0, 0], [2, 2]), ([3, 0], [2, 2])]), "outside of its shape"),
    "a chunk without a place": (wrong(chunks=[([0, 0], [2, 2])] * 3), "3 chunks but only 1 of them"),
    "of other dimensions": (wrong(chunks=[([0], [2]), ([2], [2])]), "a chunk of 1 dimensions where the tensor has 2"),
    "no place": (
        at(("w", [0, 0], "__0_0.distcp", 0, 9), ("x", [2, 0], "__0_0.distcp", 0, 9)),
        "2 chunks but only 1 of them",
    ),
    "file above": (at(("w", [0, 0], "../x", 0, 9), ("w", [2, 0], "../x", 0, 9)), "'../x', which is not a file"),
    "absolute file": (at(("w", [0, 0], "/etc/passwd", 0, 9)), "'/etc/passwd', which is not"),
    "file beneath": (at(("w", [0, 0], "a/b", 0, 9), ("w", [2, 0], "a/b", 0, 9)), "'a/b', which is not a file"),
    "the folder above": (at(("w", [0, 0], "..", 0, 9), ("w", [2, 0], "..", 0, 9)), "'..', which is not a file"),
    "the folder itself": (at(("w", [0, 0], ".", 0, 9), ("w", [2, 0], ".", 0, 9)), "'.', which is not a file"),
    "file above on Windows": (at(("w", [0, 0], "..\\x", 0, 9)), "which is not a file"),
    "a zero byte": (at(("w", [0, 0], "x\0y", 0, 9)), "which is not a file"),
    "no file": (at(("w", [0, 0], "", 0, 9), ("w", [2, 0], "", 0, 9)), "'', which is not a file"),
    "missing file": (at(("w", [0, 0], "y", 0, 9), ("w", [2, 0], "y", 0, 9)), "y cannot be read"),
    "beyond the file": (
        at(("w", [0, 0], "__0_0.distcp", 0, 1 << 50), ("w", [2, 0], "__0_0.distcp", 0, 9)),
        "__0_0.distcp is truncated",
    ),
    "negative start": (
        at(("w", [0, 0], "__0_0.distcp", -5, 9), ("w", [2, 0], "__0_0.distcp", 0, 9)),
        "expected a size or an offset, found '-5'",
    ),
    "storage of another kind": (wrong(extra={"storage_data": [1]}), "expected the dict of locations, found a list"),
    "name that is not text": (wrong(names=[3]), "expected a name, found a int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_records_that_contradict_themselves_are_refused(tmp_path: Path, name: str) -> None:
    make, message = WRONG[name]
    make().write(tmp_path)
    with pytest.raises(CheckpointError) as error:
        DcpDirectory(tmp_path)
    assert message in str(error.value)


def test_the_record_itself_is_valid(tmp_path: Path) -> None:
    assert torch.equal(DcpDirectory(Record().write(tmp_path)).read("w"), torch.ones(4, 2))


def test_two_entries_of_one_path_are_refused(tmp_path: Path) -> None:
    record = Record()
    record.names, record.extra = ["w", "v"], {"planner_data": {"w": ("a",), "v": ("a",)}}
    record.chunks = [([0, 0], [4, 2])]
    record.places = [("w", [0, 0], "__0_0.distcp", 0, 9), ("v", [0, 0], "__0_0.distcp", 0, 9)]
    with pytest.raises(CheckpointError, match="gives two entries the same path"):
        DcpDirectory(record.write(tmp_path))


def test_half_a_character_in_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\.metadata is refused: the name .* cannot be written as UTF-8"):
        DcpDirectory(save({"w\ud800": torch.ones(2)}, tmp_path / "dcp"))


def test_lists_named_a_thousand_times_cost_nothing(tmp_path: Path) -> None:
    """A thousand tensors that share one list of a thousand pieces: a million pieces in a few kilobytes."""
    record = Record()
    record.names = [f"w{n}" for n in range(1000)]
    record.chunks = [([n, 0], [1, 2]) for n in range(1000)]
    with pytest.raises(CheckpointError, match="out of proportion"):
        DcpDirectory(record.write(tmp_path))


class TestEntriesThatAreNotWhatTheRecordSays:
    def folder(self, tmp_path: Path, entry: bytes) -> DcpDirectory:
        record = Record()
        record.chunks = [([0, 0], [4, 2])]
        record.places = [("w", [0, 0], "own", 0, len(entry))]
        (tmp_path / "own").write_bytes(entry)
        stream = io.BytesIO()
        torch.save(torch.ones(4, 2), stream)
        return DcpDirectory(record.write(tmp_path))

    def saved(self, value: Any) -> bytes:
        stream = io.BytesIO()
        torch.save(value, stream)
        return stream.getvalue()

    def rezipped(self, entry: bytes, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(entry)) as old, zipfile.ZipFile(out, "w", method) as new:
            for info in old.infolist():
                new.writestr(info.filename, change(info.filename, old.read(info)))
        return out.getvalue()

    def test_a_valid_one(self, tmp_path: Path) -> None:
        assert torch.equal(self.folder(tmp_path, self.saved(torch.ones(4, 2))).read("w"), torch.ones(4, 2))

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (torch.ones(4, 3), "found something else"),
            (torch.ones(4, 2).double(), "found something else"),
            ("text", "found something else"),
            (torch.ones(2).expand(4, 2), "larger than its data"),
            (torch.ones(4, 2).to_sparse(), "expected dense tensors"),
            (torch.ones(4, 2, device="meta"), "expected dense tensors"),
        ],
    )
    def test_another_value(self, tmp_path: Path, value: Any, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            self.folder(tmp_path, self.saved(value)).read("w")

    def test_a_hostile_one(self, tmp_path: Path) -> None:
        marker = tmp_path / "executed"
        folder = self.folder(tmp_path, self.saved(Call(os.system, f"touch {marker}")))
        with pytest.raises(CheckpointError, match=r"is refused: .*system.* Nothing was executed"):
            folder.read("w")
        assert not marker.exists()

    def test_a_compressed_one(self, tmp_path: Path) -> None:
        entry = self.rezipped(self.saved(torch.zeros(4, 2)), lambda _, data: data, zipfile.ZIP_DEFLATED)
        with pytest.raises(CheckpointError, match="it is compressed"):
            self.folder(tmp_path, entry).read("w")

    def test_a_storage_that_is_too_short(self, tmp_path: Path) -> None:
        entry = self.rezipped(self.saved(torch.ones(4, 2)), lambda name, data: data[:8] if "/data/" in name else data)
        with pytest.raises(CheckpointError, match=r"cannot be read|larger than its data"):
            self.folder(tmp_path, entry).read("w")

    def test_no_archive(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="it is not a zip archive"):
            self.folder(tmp_path, pickle.dumps(torch.ones(4, 2))).read("w")


def test_values_that_are_not_json_are_left_out_and_named(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    state = {"w": torch.ones(2), "good": 3, "set": {1, 2}, "object": Call(os.system, f"touch {marker}")}
    folder = DcpDirectory(save(state, tmp_path / "dcp"))
    assert folder.values == {"good": 3}
    assert set(folder.left_out) == {"set", "object"}
    assert "Nothing was executed" in folder.left_out["object"]
    assert not marker.exists()
