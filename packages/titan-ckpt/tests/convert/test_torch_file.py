"""Files of torch.save, in and out, and Meta's, which are such files."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_hostile import Call
from ckpt_sources import Tensors, read_all, small_internal
from parity import same_bits
from titan_ckpt import CheckpointError
from titan_ckpt.convert.meta_llama import MetaDirectory
from titan_ckpt.convert.torch_file import TorchFile, export_torch


def test_what_we_write_torch_loads(tmp_path: Path) -> None:
    tensors = small_internal() | {
        "s": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "flag": torch.tensor([True, False]),
    }
    source = Tensors(tensors)
    export_torch(source, tmp_path / "w.pt")
    assert same_bits(torch.load(tmp_path / "w.pt", weights_only=True), tensors)
    assert same_bits(torch.load(tmp_path / "w.pt", weights_only=True, mmap=True), tensors)
    assert sorted(source.whole) == sorted(tensors)
    assert (tmp_path / "w.pt").stat().st_size < sum(t.nbytes for t in tensors.values()) + 10_000, "no tensor holds all"
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]
    assert same_bits(read_all(TorchFile(tmp_path / "w.pt")), tensors)
    with pytest.raises(CheckpointError, match="exists: give a new name"):
        export_torch(source, tmp_path / "w.pt")


def test_nothing_but_empty_tensors(tmp_path: Path) -> None:
    export_torch(Tensors({"none": torch.empty(0, 3)}), tmp_path / "w.pt")
    assert torch.load(tmp_path / "w.pt", weights_only=True)["none"].shape == (0, 3)


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    class Failing(Tensors):
        def read(self, name: str) -> torch.Tensor:
            raise CheckpointError("corrupt")

    with pytest.raises(CheckpointError, match="corrupt"):
        export_torch(Failing(small_internal()), tmp_path / "w.pt")
    assert list(tmp_path.iterdir()) == []


def test_nested_dicts_and_values(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    content = {"model": model.state_dict(), "a/b": {"x": torch.ones(2)}, "epoch": 3, "args": {"lr": 0.1, "f": {1}}}
    torch.save(content, tmp_path / "w.pt")
    file = TorchFile(tmp_path / "w.pt")
    wanted = {"model/weight": model.weight.detach(), "model/bias": model.bias.detach(), "a~1b/x": torch.ones(2)}
    assert same_bits(read_all(file), wanted)
    assert file.values == {"epoch": 3, "args": {"lr": 0.1}}
    assert list(file.left_out) == ["args/f"]


HOSTILE: dict[str, tuple[Any, str]] = {
    "os.system": ({"w": Call(os.system, "touch executed")}, r"is refused: .*system.*Nothing was executed"),
    "eval": ({"w": Call(eval, "__import__('os').mknod('executed')")}, r"is refused: .*eval.*Nothing was executed"),
    "a tensor that repeats four bytes": ({"w": torch.ones(1).expand(1 << 40)}, r"larger than its data"),
    "a tensor in a list": ({"w": [torch.ones(1).expand(1 << 40)]}, r"larger than its data"),
    "a sparse tensor": ({"w": torch.eye(3).to_sparse()}, r"expected dense tensors"),
    "no dict": ([torch.ones(2)], r"holds a list, expected a dict of tensors"),
    "a whole module": (torch.nn.Linear(2, 2), r"is refused: .*Linear"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, message = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    torch.save(value, "w.pth")
    with pytest.raises(CheckpointError, match=message):
        TorchFile("w.pth")
    Path("consolidated.00.pth").write_bytes(Path("w.pth").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        MetaDirectory(".")
    assert not Path("executed").exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "noise").write_bytes(os.urandom(100))
    torch.save({"w": torch.ones(300)}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-200])
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("x/y", "z")
    for name in ("old.pt", "noise", "cut.pt", "other.zip", "absent"):
        with pytest.raises(CheckpointError, match=name):
            TorchFile(tmp_path / name)


@pytest.mark.parametrize("content", [{"w\ud800": torch.ones(2)}, {"a": {"\ud800": 1}}])
def test_half_a_character_in_a_name_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt: the name .* cannot be written as UTF-8"):
        TorchFile(tmp_path / "x.pt")


def test_an_archive_that_inflates_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1_000_000)}, tmp_path / "w.pt")
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as old,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    assert (tmp_path / "small.pt").stat().st_size < 50_000
    with pytest.raises(CheckpointError, match="it is compressed"):
        TorchFile(tmp_path / "small.pt")


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    value: dict[str, Any] = {"w": torch.ones(1)}
    for _ in range(100):
        value = {"x": value}
    torch.save(value, tmp_path / "deep.pt")
    with pytest.raises(CheckpointError, match="nested deeper than 32 levels"):
        TorchFile(tmp_path / "deep.pt")


# ---- Meta's files: the same model cut as model-parallel ranks had it ----

WIDTH, HIDDEN, VOCABULARY = 8, 12, 10


def llama() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    tensors = {"tok_embeddings.weight": weight(VOCABULARY, WIDTH)}
    for layer in range(2):
        prefix = f"layers.{layer}"
        tensors |= {f"{prefix}.attention.{name}.weight": weight(WIDTH, WIDTH) for name in ("wq", "wk", "wv", "wo")}
        tensors |= {f"{prefix}.feed_forward.{name}.weight": weight(HIDDEN, WIDTH) for name in ("w1", "w3")}
        tensors[f"{prefix}.feed_forward.w2.weight"] = weight(WIDTH, HIDDEN)
        tensors |= {f"{prefix}.{name}.weight": weight(WIDTH) for name in ("attention_norm", "ffn_norm")}
    return tensors | {"norm.weight": weight(WIDTH), "output.weight": weight(VOCABULARY, WIDTH)}


def write_meta(folder: Path, ranks: int, embedding_dim: int) -> None:
    folder.mkdir()
    tensors = llama()
    cut_along = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w3": 0, "w2": 1}
    for rank in range(ranks):
        own = {"rope.freqs": torch.arange(4.0)}
        for name, tensor in tensors.items():
            dim = cut_along.get(name.split(".")[-2])
            dim = {"tok_embeddings.weight": embedding_dim, "output.weight": 0}.get(name, dim)
            own[name] = tensor if dim is None else tensor.chunk(ranks, dim)[rank].clone()
        torch.save(own, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps({"dim": WIDTH, "n_layers": 2}))


@pytest.mark.parametrize(("ranks", "embedding_dim"), [(1, 0), (2, 0), (2, 1)])
def test_metas_shards_are_joined(tmp_path: Path, ranks: int, embedding_dim: int) -> None:
    write_meta(tmp_path / "meta", ranks, embedding_dim)
    folder = MetaDirectory(tmp_path / "meta")
    assert same_bits(read_all(folder), llama())
    assert folder.params["n_layers"] == 2
    part = folder.read_slice("layers.0.attention.wo.weight", (2, 3), (4, 3))
    assert torch.equal(part, llama()["layers.0.attention.wo.weight"][2:6, 3:6])


def test_metas_shards_that_do_not_fit(tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", 2, 0)
    second = tmp_path / "meta/consolidated.01.pth"
    valid = torch.load(second, weights_only=True)
    changes: dict[str, tuple[str, torch.Tensor | None, str]] = {
        "missing": ("layers.0.attention.wq.weight", None, r"wq.weight is not in all files"),
        "extra": ("layers.9.attention.wq.weight", torch.ones(2, 2), r"layers.9.attention.wq.weight is not in all"),
        "misshaped": ("layers.0.attention.wq.weight", torch.ones(4, 7), r"do not fit together along dimension 0"),
        "other dims": ("layers.0.attention.wo.weight", torch.ones(4).bfloat16(), r"do not fit together along dim"),
        "norm": ("norm.weight", torch.ones(3), r"norm.weight differs between files"),
    }
    for name, tensor, message in changes.values():
        changed = {key: value for key, value in {**valid, name: tensor}.items() if value is not None}
        torch.save(changed, second)
        with pytest.raises(CheckpointError, match=message):
            MetaDirectory(tmp_path / "meta")
    second.unlink()
    (tmp_path / "meta/consolidated.00.pth").rename(second)
    with pytest.raises(CheckpointError, match=r"has consolidated.01.pth: one is missing"):
        MetaDirectory(tmp_path / "meta")
    with pytest.raises(CheckpointError, match=r"holds no consolidated.00.pth"):
        MetaDirectory(tmp_path)
