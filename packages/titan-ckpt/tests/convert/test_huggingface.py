import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ckpt_sources import (
    Fused,
    Map,
    Rename,
    Tensors,
    Tied,
    Transpose,
    prefixed,
    read_all,
    small_external,
    small_internal,
    small_map,
)
from ckpt_states import Held
from parity import same_bits
from titan_ckpt import Checkpointer, CheckpointError, import_weights, open_source
from titan_ckpt.convert.huggingface.reader import HuggingFaceDirectory
from titan_ckpt.convert.huggingface.writer import HuggingFaceExport, export
from titan_ckpt.convert.source import StripPrefix
from titan_ckpt.convert.titan_writer import write_titan
from titan_ckpt.convert.weight_map import Mapped


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """By the safetensors library alone."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        held = load_file(path)
        assert not held.keys() & tensors.keys()
        tensors |= held
    return tensors


@pytest.mark.parametrize("max_file_bytes", [1, 40, 100, 5_000_000_000])
def test_export_gives_what_the_map_says(tmp_path: Path, max_file_bytes: int) -> None:
    source = Tensors(prefixed(small_internal()) | {"optimizer/qkv.exp_avg": torch.zeros(8, 4)})
    export(source, tmp_path / "out", small_map(), max_file_bytes=max_file_bytes)
    assert same_bits(read_folder(tmp_path / "out"), small_external())
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"model_type": "small"}
    assert "optimizer/qkv.exp_avg" not in source.whole
    assert sorted(source.whole) == sorted(set(source.whole)), "each tensor is read once, the tied one too"

    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = tmp_path / "out/model.safetensors.index.json"
    if max_file_bytes == 5_000_000_000:
        assert names == ["model.safetensors"]
        assert not index.exists()
    else:
        assert names == [f"model-{place:05d}-of-{len(names):05d}.safetensors" for place in range(1, len(names) + 1)]
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(t.nbytes for t in small_external().values())
        for name, file in content["weight_map"].items():
            assert name in load_file(tmp_path / "out" / file)
        sizes = [sum(t.nbytes for t in load_file(tmp_path / "out" / name).values()) for name in names]
        assert all(size <= max(max_file_bytes, 96) for size in sizes), "one tensor may be larger than a file"
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left beside it"


def test_import_gives_the_native_tensors_back(tmp_path: Path) -> None:
    export(Tensors(prefixed(small_internal())), tmp_path / "out", small_map(), max_file_bytes=64)
    folder = HuggingFaceDirectory(tmp_path / "out")
    assert same_bits(read_all(folder), small_external())
    assert folder.config == {"model_type": "small"}
    assert same_bits(read_all(Mapped(folder, small_map().rules, "to_internal")), small_internal())


def test_a_checkpoint_made_of_it_loads(tmp_path: Path) -> None:
    export(Tensors(prefixed(small_internal())), tmp_path / "hf", small_map())
    weights = open_source(str(tmp_path / "hf"))
    with pytest.raises(CheckpointError, match=r"unexpected, not in the map \(1\):\n    ln"):
        import_weights(weights, tmp_path / "run", 3, Map(small_map().rules[:-1]))
    import_weights(weights, tmp_path / "run", 3, Map(small_map().rules[:-1]), ignore=["l?"], dtype=torch.bfloat16)
    wanted = {name: tensor.bfloat16() for name, tensor in small_internal().items() if name != "norm"}
    model = Held(**{name: torch.zeros_like(tensor) for name, tensor in wanted.items()})
    Checkpointer(tmp_path / "run").load({"model": model}, step=3)
    assert same_bits(model.state, wanted)


def test_export_without_a_map_keeps_names_and_types_unless_asked(tmp_path: Path) -> None:
    tensors = {
        "a.w": torch.randn(3, 2),
        "mask": torch.tensor([True, False]),
        "n": torch.arange(3),
        "s": torch.tensor(2.0),
    }
    export(Tensors(prefixed(tensors)), tmp_path / "same", config={"x": 1, "torch_dtype": "float16"})
    assert same_bits(read_folder(tmp_path / "same"), tensors)
    assert json.loads((tmp_path / "same/config.json").read_text()) == {"x": 1, "torch_dtype": "float32"}
    export(Tensors(prefixed(tensors)), tmp_path / "half", dtype=torch.bfloat16)
    floats = {"a.w", "s"}
    wanted = {name: tensor.bfloat16() if name in floats else tensor for name, tensor in tensors.items()}
    assert same_bits(read_folder(tmp_path / "half"), wanted)
    assert not (tmp_path / "half/config.json").exists()


def test_extra_files_are_copied(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{}")
    source = Tensors(prefixed(small_internal()))
    export(source, tmp_path / "out", small_map(), extra_files=[tmp_path / "generation_config.json"])
    assert (tmp_path / "out/generation_config.json").read_text() == "{}"
    (tmp_path / "config.json").write_text("{}")
    for path, message in (
        (tmp_path / "config.json", "conflicts with the config.json"),
        (tmp_path / "none", "is not a file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            export(source, tmp_path / "again", small_map(), extra_files=[path])
    assert not (tmp_path / "again").exists()


class TestAMapThatDoesNotFit:
    def message_of(self, rules: list[Any], internal: dict[str, torch.Tensor], tmp_path: Path) -> str:
        source = Tensors(prefixed(internal))
        with pytest.raises(CheckpointError) as error:
            export(source, tmp_path / "out", Map(rules))
        assert not source.whole, "found before anything is read"
        assert list(tmp_path.iterdir()) == []
        return str(error.value)

    def test_all_names_are_reported_at_once(self, tmp_path: Path) -> None:
        rules = [Rename(["a"], ["A"]), Rename(["gone"], ["G"]), Rename(["lost"], ["L"])]
        message = self.message_of(rules, {"a": torch.ones(1), "new": torch.ones(1)}, tmp_path)
        assert "missing, needed by the map (2):\n    gone\n    lost" in message
        assert "unexpected, not in the map (1):\n    new" in message

    def test_a_name_made_twice(self, tmp_path: Path) -> None:
        rules = [Rename(["a"], ["A"]), Rename(["b"], ["A"])]
        assert "makes A more than once" in self.message_of(rules, {"a": torch.ones(1), "b": torch.ones(1)}, tmp_path)

    def test_a_rule_that_fails(self, tmp_path: Path) -> None:
        message = self.message_of([Fused(["a"], ["A", "B"], [3, 3])], {"a": torch.ones(5)}, tmp_path)
        assert "the weight map's rule for a [5] failed: RuntimeError" in message

    def test_a_rule_that_returns_something_else(self, tmp_path: Path) -> None:
        class Liar(Rename):
            def to_external(self, tensors: Any) -> dict[str, torch.Tensor]:
                return {"B": tensors["a"]}

        assert "rule for A returned ['B'] instead" in self.message_of(
            [Liar(["a"], ["A"])], {"a": torch.ones(5)}, tmp_path
        )

    def test_a_prefix_that_nothing_has(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"names start with opt/, w\. Give the prefix"):
            export(Tensors({"w": torch.ones(1), "opt/w": torch.ones(1)}), tmp_path / "out")


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    class Failing(Tensors):
        def read(self, name: str) -> torch.Tensor:
            if name == "model/norm":
                raise CheckpointError("corrupt")
            return super().read(name)

    with pytest.raises(CheckpointError, match="corrupt"):
        export(Failing(prefixed(small_internal())), tmp_path / "out", small_map(), max_file_bytes=50)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    source = Tensors(prefixed(small_internal()))
    export(source, tmp_path / "out", small_map())  # an empty folder is as good as none
    with pytest.raises(CheckpointError, match="exists: give a new name"):
        export(source, tmp_path / "out", small_map())
    with pytest.raises(CheckpointError, match="could not write"):
        export(source, tmp_path / "out/config.json/below", small_map())


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_map_there_and_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    internal: dict[str, torch.Tensor] = {}
    rules: list[Any] = []
    for place in range(data.draw(st.integers(1, 6))):
        kind = data.draw(st.sampled_from([Rename, Transpose, Tied, Fused]))
        rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
        dtype = data.draw(
            st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])
        )
        tensor = torch.arange(rows * columns).reshape(rows, columns).float().to(dtype)
        names = [f"n{place}"]
        if kind is Fused:
            cut = data.draw(st.integers(0, rows))
            rules.append(Fused(names, [f"f{place}.0", f"f{place}.1"], [cut, rows - cut]))
        else:
            names += [f"t{place}"] if kind is Tied else []
            rules.append(kind(names, [f"f{place}"]))
        internal |= dict.fromkeys(names, tensor)
    folder = tmp_path_factory.mktemp("any") / "out"
    export(Tensors(prefixed(internal)), folder, Map(rules), max_file_bytes=data.draw(st.integers(1, 64)))
    assert same_bits(read_all(Mapped(HuggingFaceDirectory(folder), rules, "to_internal")), internal)


class TestAFolderThatIsNotAsItsIndexSays:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        export(Tensors(prefixed(small_internal())), tmp_path / "out", small_map(), max_file_bytes=80)
        return tmp_path / "out"

    def edit(self, folder: Path, change: Any) -> None:
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    def test_missing_and_unexpected_are_reported_together(self, folder: Path) -> None:
        def change(content: dict[str, Any]) -> None:
            content["weight_map"]["ghost"] = content["weight_map"]["q"]
            del content["weight_map"]["k"]

        self.edit(folder, change)
        with pytest.raises(CheckpointError) as error:
            HuggingFaceDirectory(folder)
        assert "missing (1):\n    ghost in model-" in str(error.value)
        assert "unexpected, not in the index (1):\n    k in model-" in str(error.value)

    @pytest.mark.parametrize(
        "name", ["../x.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "x.bin", "", 3, None]
    )
    def test_a_file_elsewhere(self, folder: Path, name: Any) -> None:
        self.edit(folder, lambda content: content["weight_map"].update(q=name))
        with pytest.raises(CheckpointError, match=r'is not in its directory|has no "weight_map"'):
            HuggingFaceDirectory(folder)

    def test_a_missing_file(self, folder: Path) -> None:
        (folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]["q"]).unlink()
        with pytest.raises(CheckpointError, match=r"safetensors cannot be read \(No such file"):
            HuggingFaceDirectory(folder)

    def test_no_weights_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such directory"):
            HuggingFaceDirectory(tmp_path / "none")
        (tmp_path / "pytorch_model.bin").touch()
        with pytest.raises(CheckpointError, match=r"only pytorch_model.bin: .* --from torch"):
            HuggingFaceDirectory(tmp_path)


def test_a_source_is_read_in_slices(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).reshape(4, 6)
    save_file({"w": tensor, "s": torch.tensor(1.5), "none": torch.empty(0, 3)}, tmp_path / "model.safetensors")
    folder = HuggingFaceDirectory(tmp_path)
    assert torch.equal(folder.read_slice("w", (1, 2), (2, 3)), tensor[1:3, 2:5])
    assert folder.read_slice("w", (1, 2), (0, 3)).shape == (0, 3)
    assert folder.read_slice("s", (), ()).item() == 1.5
    assert folder.read_slice("none", (0, 1), (0, 2)).shape == (0, 2)
    assert same_bits(
        read_all(StripPrefix(folder, "")), {"w": tensor, "s": torch.tensor(1.5), "none": torch.empty(0, 3)}
    )


LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def llama_map(config: dict[str, Any], tied: bool) -> Map:
    """From names such as a training code has, with a fused qkv and a transposed down projection, to Hugging Face's."""
    rules: list[Any] = [Rename(["norm"], ["model.norm.weight"])]
    embed = "model.embed_tokens.weight"
    rules += (
        [Tied(["embed", "head"], [embed])]
        if tied
        else [Rename(["embed"], [embed]), Rename(["head"], ["lm_head.weight"])]
    )
    for layer in range(2):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        q, k, v = (f"{theirs}.self_attn.{name}_proj.weight" for name in "qkv")
        rules += [
            Fused([f"{ours}.qkv"], [q, k, v], [32, 16, 16]),
            Rename([f"{ours}.o"], [f"{theirs}.self_attn.o_proj.weight"]),
            Fused([f"{ours}.gate_up"], [f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight"], [48, 48]),
            Transpose([f"{ours}.down"], [f"{theirs}.mlp.down_proj.weight"]),
            Rename([f"{ours}.norm1"], [f"{theirs}.input_layernorm.weight"]),
            Rename([f"{ours}.norm2"], [f"{theirs}.post_attention_layernorm.weight"]),
        ]
    return Map(rules, config)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_it_with_the_same_logits(tmp_path: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 64, (2, 16))
    with torch.no_grad():
        wanted = model(tokens).logits

    weights = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    weight_map = llama_map(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, tied)
    internal = read_all(Mapped(Tensors(weights), weight_map.rules, "to_internal"))
    assert internal["layers.0.qkv"].shape == (64, 32)

    export(Tensors(prefixed(internal)), tmp_path / "out", weight_map, max_file_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, wanted)

    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert same_bits(
        read_all(Mapped(HuggingFaceDirectory(tmp_path / "theirs"), weight_map.rules, "to_internal")), internal
    )

    export(Tensors(prefixed(internal)), tmp_path / "half", weight_map, dtype=torch.bfloat16)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.bfloat16


EXPORT_UNDER_A_LIMIT = """
import resource, sys
from ckpt_sources import Map, Stacked
from titan_ckpt import open_checkpoint
from titan_ckpt.convert.huggingface.writer import export

def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

source, out, tensors, file_bytes = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
rules = [Stacked([f"experts.{n}"], [f"{n}.{e}" for e in range(4)]) for n in range(tensors)]
with open_checkpoint(source) as checkpoint:
    checkpoint.read_slice("model/experts.0", (0, 0, 0), (1, 1, 1))  # what is imported late is there by now
    resident, limit = status("VmRSS"), status("VmSize") + file_bytes + (256 << 20)  # threads reserve room for stacks
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    export(checkpoint, out, Map(rules), max_file_bytes=file_bytes)
print(status("VmHWM") - resident)
"""


# What four threads read into, a piece each in whole huge pages.
READERS = 4 * (10 << 20)


def export_under_a_limit(tmp_path: Path, tensors: int, tensor_bytes: int, file_bytes: int) -> int:
    """Export a checkpoint of `tensors` tensors in a process that cannot take much more memory than a file is long.

    Returns:
        By how many bytes the resident memory of that process grew at most.
    """
    side = int((tensor_bytes / 4 / 4) ** 0.5)

    class Zeros(Tensors):
        def read(self, name: str) -> torch.Tensor:
            return torch.zeros(4, side, side)

    source = Zeros({f"experts.{n}": torch.empty(4, side, side, device="meta") for n in range(tensors)})
    write_titan(source, tmp_path / "ckpt", 1, prefix="model/", file_bytes=file_bytes)
    arguments = [tmp_path / "ckpt/step-00000001", tmp_path / "out", tensors, file_bytes]
    done = subprocess.run(
        [sys.executable, "-c", EXPORT_UNDER_A_LIMIT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "MALLOC_ARENA_MAX": "1",  # or each thread that allocates reserves 64 MiB of addresses besides
            # Or what is freed of tensors below 32 MiB stays resident, in pieces that depend on the threads' order.
            "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        },
    )
    assert done.returncode == 0, done.stderr
    assert len(HuggingFaceDirectory(tmp_path / "out").tensors) == 4 * tensors
    return int(done.stdout)


@pytest.mark.slow
def test_memory_is_bounded_by_one_file(tmp_path: Path) -> None:
    grown = export_under_a_limit(tmp_path, tensors=16, tensor_bytes=16 << 20, file_bytes=96 << 20)
    assert 16 << 20 <= grown <= (16 << 20) + READERS < 96 << 20


@pytest.mark.huge
def test_twenty_gigabytes_in_less_memory_than_a_file(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    if disk.f_bavail * disk.f_frsize < 45 << 30:
        pytest.skip("wants 45 GiB of disk")
    try:
        grown = export_under_a_limit(tmp_path, tensors=40, tensor_bytes=512 << 20, file_bytes=2 << 30)
    finally:
        shutil.rmtree(tmp_path)
    assert 512 << 20 <= grown <= (512 << 20) + READERS < 2 << 30


def test_half_a_character_in_a_name_is_refused(tmp_path: Path) -> None:
    source, rules = Tensors({"model/w": torch.ones(2)}), [Rename(["w"], ["w\ud800"])]
    with pytest.raises(CheckpointError, match="cannot be written as UTF-8"):
        export(source, tmp_path / "hf", Map(rules))
    assert list(tmp_path.iterdir()) == []


def test_each_checkpoint_is_exported_as_it_is_published(tmp_path: Path) -> None:
    state = {"model": Held(**small_internal()), "progress": Held(step=1)}
    export_each = HuggingFaceExport(tmp_path / "hf", small_map(), every=2, max_file_bytes=100)
    ckpt = Checkpointer(tmp_path / "run", asynchronous=True, exporters=[export_each])
    for step in (1, 2, 3, 4):
        ckpt.save(step, state)
    ckpt.close()
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["step-00000002", "step-00000004"]
    assert same_bits(read_folder(tmp_path / "hf/step-00000004"), small_external())
    export_each(str(tmp_path / "run/step-00000004"))  # once more, after a restart: it is there and stays


def test_an_export_of_a_line_that_was_left_is_replaced(tmp_path: Path) -> None:
    export_each = HuggingFaceExport(tmp_path / "hf")

    def save(value: float, step: int, back_to: int | None = None) -> None:
        with Checkpointer(tmp_path / "run", exporters=[export_each]) as ckpt:
            ckpt.load({"model": Held(w=torch.zeros(2))}, step=back_to)
            ckpt.save(step, {"model": Held(w=torch.full((2,), value))})

    def exported() -> float:
        return float(read_folder(tmp_path / "hf/step-00000002")["w"][0])

    save(1.0, 1)
    save(2.0, 2)
    before = (tmp_path / "hf/step-00000002").stat().st_ino
    export_each(str(tmp_path / "run/step-00000002"))
    assert (tmp_path / "hf/step-00000002").stat().st_ino == before  # of the same checkpoint: it stays
    save(2.5, 2, back_to=1)
    assert exported() == 2.5
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["step-00000001", "step-00000002"]
    (tmp_path / "hf/step-00000002/titan_checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no titan_checkpoint\.json, so it is not an export of a checkpoint"):
        export_each(str(tmp_path / "run/step-00000002"))
    assert exported() == 2.5


def test_an_index_never_hides_a_newer_whole_file(tmp_path: Path) -> None:
    """transformers leaves the index of an earlier model, and its files, when it saves one file."""
    export(Tensors(prefixed(small_internal())), tmp_path / "hf", small_map(), max_file_bytes=100)
    save_file({"new": torch.ones(2)}, tmp_path / "hf/model.safetensors")
    assert same_bits(read_all(HuggingFaceDirectory(tmp_path / "hf")), {"new": torch.ones(2)})
    (tmp_path / "hf/model.safetensors.index.json").write_text("{")
    assert list(HuggingFaceDirectory(tmp_path / "hf").tensors) == ["new"]


def test_an_index_that_names_the_single_file_is_obeyed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "more.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sorted(HuggingFaceDirectory(tmp_path).tensors) == ["a", "b"]
