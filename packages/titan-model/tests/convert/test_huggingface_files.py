"""Folders: what transformers writes is read, what is written transformers reads, and nothing is half done."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model_families import (
    FAMILIES,
    assert_same_logits,
    random_tokens,
    randomize,
    to_transformers,
    transformers_model,
)
from titan_model import Decoder, DecoderConfig, build, preset
from titan_model.convert.errors import WeightsError
from titan_model.convert.huggingface_files import load_huggingface, save_huggingface
from titan_model.convert.huggingface_names import huggingface_map

MOE = [name for name, config in FAMILIES.items() if config.moe is not None]
TIED = [name for name, config in FAMILIES.items() if config.tied_embeddings]
UNTIED = [name for name in FAMILIES if name not in TIED]


@pytest.fixture(scope="module")
def transformers() -> Any:
    module = pytest.importorskip("transformers")
    module.utils.logging.disable_progress_bar()
    return module


def held(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = held(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same_weights(model: Decoder, other: Decoder) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("shards", ["one-file", "many-files"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_read(transformers: Any, tmp_path: Path, family: str, shards: str) -> None:
    config = FAMILIES[family]
    theirs = transformers_model(config)
    randomize(theirs)
    theirs.save_pretrained(tmp_path, max_shard_size="10KB" if shards == "many-files" else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "many-files")

    ours = load_huggingface(tmp_path)
    assert ours.config == config
    assert (ours.head.weight is ours.embed.weight) == config.tied_embeddings
    tokens = random_tokens(config)
    with torch.no_grad():
        assert_same_logits(ours(tokens), theirs(tokens, use_cache=False).logits)


@pytest.mark.parametrize("shards", ["one-file", "many-files"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_transformers_reads(
    transformers: Any, random_decoder: Callable[..., Decoder], tmp_path: Path, family: str, shards: str
) -> None:
    ours = random_decoder(FAMILIES[family])
    folder = tmp_path / "model"
    save_huggingface(ours, folder, max_file_bytes=10_000 if shards == "many-files" else 5_000_000_000)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shards == "many-files")

    assert transformers.AutoConfig.from_pretrained(folder).hidden_size == ours.config.dim
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = random_tokens(ours.config)
    with torch.no_grad():
        assert_same_logits(ours(tokens), theirs.eval()(tokens, use_cache=False).logits)
    assert_same_weights(load_huggingface(folder), ours)


@pytest.mark.parametrize("family", TIED)
def test_tied_weights_are_written_once(random_decoder: Callable[..., Decoder], tmp_path: Path, family: str) -> None:
    model = random_decoder(FAMILIES[family])
    save_huggingface(model, tmp_path / "model")
    tensors = held(tmp_path / "model")
    assert "lm_head.weight" not in tensors
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", TIED)
def test_a_copy_of_a_tied_weight_is_accepted_if_it_is_one(
    random_decoder: Callable[..., Decoder], tmp_path: Path, family: str
) -> None:
    model = random_decoder(FAMILIES[family])
    save_huggingface(model, tmp_path / "model")
    embed = "model.embed_tokens.weight"
    rewrite(tmp_path / "model", lambda tensors: tensors.update({"lm_head.weight": tensors[embed].clone()}))
    assert_same_weights(load_huggingface(tmp_path / "model"), model)

    rewrite(tmp_path / "model", lambda tensors: tensors.update({"lm_head.weight": tensors[embed] + 1e-3}))
    with pytest.raises(WeightsError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight, but .* differ"):
        load_huggingface(tmp_path / "model")


@pytest.mark.parametrize("family", MOE)
def test_experts_are_read_fused_too(random_decoder: Callable[..., Decoder], tmp_path: Path, family: str) -> None:
    model = random_decoder(FAMILIES[family])
    save_huggingface(model, tmp_path / "model")
    tensors = to_transformers(dict(model.state_dict()), model.config)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert_same_weights(load_huggingface(tmp_path / "model"), model)


def test_a_loaded_model_trains_and_lies_in_memory_of_its_own(
    random_decoder: Callable[..., Decoder], tmp_path: Path
) -> None:
    for family in ("llama-tied-scaled", "qwen3-moe"):
        folder = tmp_path / family
        written = random_decoder(FAMILIES[family])
        save_huggingface(written, folder)
        model = load_huggingface(folder)
        # The files are mapped into memory while they are read: what changes in them later must not reach the model.
        path = folder / "model.safetensors"
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"\x7f" * (path.stat().st_size // 2))
        assert_same_weights(model, written)
        tokens = random_tokens(model.config)
        loss = model(tokens, labels=tokens).total
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.is_contiguous()
        for name, buffer in model.named_buffers():  # what is in no file too, as the routers' counts are
            assert not buffer.is_meta, name


def test_dtypes_are_kept_or_converted(
    transformers: Any, random_decoder: Callable[..., Decoder], tmp_path: Path
) -> None:
    model = random_decoder(FAMILIES["qwen3-moe"])
    save_huggingface(model, tmp_path / "half", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in held(tmp_path / "half").values()} == {torch.bfloat16}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert_same_weights(load_huggingface(tmp_path / "half"), model.to(torch.bfloat16))
    assert_same_weights(load_huggingface(tmp_path / "half", dtype=torch.float32), model.to(torch.float32))

    save_huggingface(load_huggingface(tmp_path / "half"), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert held(tmp_path / "again").keys() == held(tmp_path / "half").keys()


def test_config_takes_further_entries_and_no_token_ids_by_default(
    transformers: Any, random_decoder: Callable[..., Decoder], tmp_path: Path
) -> None:
    model = random_decoder(FAMILIES["llama"])
    save_huggingface(model, tmp_path / "plain")
    plain = transformers.AutoConfig.from_pretrained(tmp_path / "plain")
    # Else transformers' generation would stop at token 2, whatever that means to the tokenizer.
    assert (plain.bos_token_id, plain.eos_token_id) == (None, None)
    save_huggingface(model, tmp_path / "told", extra_config={"eos_token_id": 5})
    assert transformers.AutoConfig.from_pretrained(tmp_path / "told").eos_token_id == 5


def test_files_are_no_larger_than_asked(random_decoder: Callable[..., Decoder], tmp_path: Path) -> None:
    model = random_decoder(FAMILIES["qwen3"])
    save_huggingface(model, tmp_path / "model", max_file_bytes=10_000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == names
    total = 0
    for path in (tmp_path / "model").glob("*.safetensors"):
        size = sum(tensor.nbytes for tensor in load_file(path).values())
        assert size <= 10_000
        total += size
        with safe_open(path, framework="pt") as file:
            assert {index["weight_map"][name] for name in file.keys()} == {path.name}  # noqa: SIM118
            assert file.metadata() == {"format": "pt"}  # without it transformers 4 refuses the file
    assert index["metadata"]["total_size"] == total
    # No more files than it takes: any two neighbors are too large for one.
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / "model" / name).values()) for name in names]
    assert all(a + b > 10_000 for a, b in pairwise(sizes))


def test_one_error_lists_all_tensors_that_do_not_fit(random_decoder: Callable[..., Decoder], tmp_path: Path) -> None:
    save_huggingface(random_decoder(FAMILIES["qwen3"]), tmp_path / "model")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.self_attn.q_norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3, 5)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()

    rewrite(tmp_path / "model", spoil)
    with pytest.raises(WeightsError) as caught:
        load_huggingface(tmp_path / "model")
    lines = str(caught.value).splitlines()
    assert str(tmp_path / "model") in lines[0]
    assert lines[1:] == [
        "  missing (2): model.layers.1.self_attn.q_norm.weight [12]; model.norm.weight [32]",
        "  unexpected (1): model.layers.0.self_attn.q_proj.bias [3, 5]",
        "  wrong shape (1): lm_head.weight is [36, 32], must be [37, 32]",
    ]
    assert isinstance(caught.value, ValueError)


def test_long_lists_are_cut_and_counted(random_decoder: Callable[..., Decoder], tmp_path: Path) -> None:
    save_huggingface(random_decoder(FAMILIES["qwen3-moe"]), tmp_path / "model")
    rewrite(
        tmp_path / "model",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts." in name and ".up_proj" in name],
    )
    with pytest.raises(WeightsError) as caught:
        load_huggingface(tmp_path / "model")
    (line,) = str(caught.value).splitlines()[1:]
    assert line.startswith("  missing (16): model.layers.0.mlp.experts.0.up_proj.weight [24, 32]; ")
    assert line.endswith("; and 8 more")
    assert line.count(".up_proj.weight") == 8


@pytest.mark.parametrize("family", [name for name in UNTIED if not FAMILIES[name].full_layers])
def test_weights_of_another_config_are_refused(
    random_decoder: Callable[..., Decoder], tmp_path: Path, family: str
) -> None:
    save_huggingface(random_decoder(FAMILIES[family]), tmp_path / "model")
    edit_config(tmp_path / "model", num_hidden_layers=3)
    with pytest.raises(WeightsError, match=r"missing .*model\.layers\.2\."):
        load_huggingface(tmp_path / "model")
    edit_config(tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(WeightsError, match=r"unexpected .*model\.layers\.1\."):
        load_huggingface(tmp_path / "model")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.layers.1.self_attn.rotary_emb.sin_cached",
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
    ],
)
def test_rotary_caches_are_passed_over(random_decoder: Callable[..., Decoder], tmp_path: Path, name: str) -> None:
    model = random_decoder(FAMILIES["llama"])
    save_huggingface(model, tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: tensors.update({name: torch.ones(1, 1, 8, 4)}))
    assert_same_weights(load_huggingface(tmp_path / "model"), model)


def renamed(folder: Path, change: Callable[[str], str]) -> str:
    """Rename all tensors of a folder and return what loading it says."""
    tensors = {change(name): tensor for name, tensor in held(folder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError) as caught:
        load_huggingface(folder)
    return str(caught.value).removeprefix(f"{folder}: ")


@pytest.mark.parametrize("family", ["llama", "llama-tied-scaled", "qwen3-moe"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name: name.removeprefix("model."), "the names lack the prefix 'model.': add it to the names"),
        (lambda name: f"_orig_mod.{name}", "the names have the additional prefix '_orig_mod.': remove it"),
        (lambda name: f"a.b.{name}", "the names have the additional prefix 'a.b.': remove it"),
        (
            lambda name: name.replace("model.", "model.language_model.", 1),
            "the names have the prefix 'model.language_model.' in place of 'model.': replace it",
        ),
        (lambda name: re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", name), "the names contain '_orig_mod.', which"),
    ],
    ids=["lost", "_orig_mod", "two", "replaced", "in-blocks"],
)
def test_a_prefix_is_named_in_one_sentence(
    random_decoder: Callable[..., Decoder], tmp_path: Path, family: str, change: Callable[[str], str], said: str
) -> None:
    save_huggingface(random_decoder(FAMILIES[family]), tmp_path / "model")
    text = renamed(tmp_path / "model", change)
    assert text.startswith(said)
    assert "\n" not in text


def test_a_prefix_does_not_hide_what_else_is_wrong(random_decoder: Callable[..., Decoder], tmp_path: Path) -> None:
    save_huggingface(random_decoder(FAMILIES["llama"]), tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: [tensors.pop("model.norm.weight"), tensors.update(x=torch.ones(3))])
    first, *lines = renamed(tmp_path / "model", lambda name: f"_orig_mod.{name}").splitlines()
    assert first.startswith("the names have the additional prefix '_orig_mod.'")
    assert lines == ["  missing (1): model.norm.weight [32]", "  unexpected (1): x [3]"]


@pytest.mark.parametrize(
    ("part", "dtype", "kept"),
    [
        ("lm_head", torch.bfloat16, torch.float32),
        ("norm", torch.bfloat16, torch.float32),
        ("lm_head", torch.float64, torch.float64),
        ("up_proj", torch.float16, torch.float32),
        ("", torch.float16, torch.float16),
        ("", torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_dtypes_of_a_checkpoint_become_one_that_holds_all_values(
    random_decoder: Callable[..., Decoder], tmp_path: Path, part: str, dtype: torch.dtype, kept: torch.dtype
) -> None:
    save_huggingface(random_decoder(FAMILIES["llama"]), tmp_path / "model")
    rewrite(
        tmp_path / "model",
        lambda tensors: tensors.update({name: value.to(dtype) for name, value in tensors.items() if part in name}),
    )
    model = load_huggingface(tmp_path / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {kept}
    tokens = random_tokens(model.config)
    assert model(tokens, labels=tokens).total.isfinite()
    head = held(tmp_path / "model")["lm_head.weight"]
    assert torch.equal(model.head.weight, head.to(kept))
    halves = load_huggingface(tmp_path / "model", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in halves.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("asked", [None, torch.float32])
@pytest.mark.parametrize(
    ("names", "dtype", "said"),
    [
        ((), torch.int8, r"quantized \(integers\): model\.layers\.0\.mlp\.up_proj\.weight is int8 and 1 more"),
        ((), torch.uint8, r"integers.* is uint8"),
        ((), torch.int64, r"integers.* is int64"),
        ((), torch.float8_e4m3fn, r"quantized \(float8\): .*up_proj\.weight is float8_e4m3fn"),
        ((), torch.float8_e5m2, r"float8"),
        (("weight_scale_inv",), torch.float8_e4m3fn, r"float8 with scales of blocks.* is float8_e4m3fn"),
        (("SCB",), torch.int8, r"bitsandbytes, 8 bits"),
        (("qweight", "qzeros", "scales"), None, r"GPTQ or AWQ\): model\.layers\.0\.mlp\.up_proj\.qweight is int32"),
    ],
)
def test_quantized_weights_are_named_and_refused(
    random_decoder: Callable[..., Decoder],
    tmp_path: Path,
    names: tuple[str, ...],
    dtype: torch.dtype | None,
    said: str,
    asked: torch.dtype | None,
) -> None:
    save_huggingface(random_decoder(FAMILIES["llama"]), tmp_path / "model")

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".up_proj." in name]:
            stem, weight = name.removesuffix("weight"), tensors.pop(name)
            tensors |= {f"{stem}{end}": torch.ones(3) if end != "qweight" else weight.int() for end in names}
            if dtype is not None:
                tensors[name] = (weight * 100).to(dtype)

    rewrite(tmp_path / "model", quantize)
    with pytest.raises(WeightsError, match=said):
        load_huggingface(tmp_path / "model", dtype=asked)


@pytest.mark.parametrize("family", TIED)
def test_a_tied_weight_may_be_stored_under_the_heads_name(
    random_decoder: Callable[..., Decoder], tmp_path: Path, family: str
) -> None:
    model = random_decoder(FAMILIES[family])
    save_huggingface(model, tmp_path / "model")
    rewrite(
        tmp_path / "model",  # as safetensors' save_model does, which keeps the first of shared tensors
        lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}),
    )
    assert_same_weights(load_huggingface(tmp_path / "model"), model)


def test_a_whole_file_comes_before_an_old_index(
    transformers: Any, random_decoder: Callable[..., Decoder], tmp_path: Path
) -> None:
    old, new = random_decoder(FAMILIES["llama"]), random_decoder(FAMILIES["llama"])
    randomize(new, seed=8)
    save_huggingface(old, tmp_path / "model", max_file_bytes=10_000)
    save_huggingface(new, tmp_path / "new")
    (tmp_path / "new" / "model.safetensors").rename(tmp_path / "model" / "model.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokens = random_tokens(new.config)
    with torch.no_grad():
        assert_same_logits(load_huggingface(tmp_path / "model")(tokens), theirs(tokens, use_cache=False).logits)


def test_an_index_is_obeyed(random_decoder: Callable[..., Decoder], tmp_path: Path) -> None:
    """Each tensor comes from the file that the index names, which is in the folder; nothing else is read."""
    folder = tmp_path / "model"
    save_huggingface(random_decoder(FAMILIES["llama"]), folder, max_file_bytes=10_000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, file = next(iter(index["weight_map"].items()))
    (tmp_path / "outside.safetensors").write_bytes((folder / file).read_bytes())
    others = sorted(set(index["weight_map"].values()) - {file})
    for changed, message in (
        ("../outside.safetensors", "which is not in its folder"),
        (str(tmp_path / "outside.safetensors"), "which is not in its folder"),
        (others[0], "but not in both"),
    ):
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], name: changed}}))
        with pytest.raises(ValueError, match=message):
            load_huggingface(folder)
    path.write_text(json.dumps({"weight_map": {key: at for key, at in index["weight_map"].items() if key != name}}))
    with pytest.raises(WeightsError, match=f"{name} is in the file or in .*index.json, but not in both"):
        load_huggingface(folder)


def test_a_buffer_that_no_weight_fills_is_refused(
    random_decoder: Callable[..., Decoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_huggingface(random_decoder(FAMILIES["qwen3-moe"]), tmp_path / "model")
    loaded = load_huggingface(tmp_path / "model")
    assert all(buffer.is_cpu and buffer.count_nonzero() == 0 for name, buffer in loaded.named_buffers())

    def with_buffer(config: DecoderConfig, device: str) -> Decoder:
        model = build(config, device)
        model.norm.register_buffer("scale", torch.ones(3, device=device), persistent=False)
        return model

    monkeypatch.setattr("titan_model.convert.loading.build", with_buffer)
    with pytest.raises(
        WeightsError, match=r"norm: no weight fills the buffer 'scale', and RMSNorm has no method reset"
    ):
        load_huggingface(tmp_path / "model")


def test_what_is_not_there_or_damaged_is_said(random_decoder: Callable[..., Decoder], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="does not contain a Hugging Face model"):
        load_huggingface(folder)
    save_huggingface(random_decoder(FAMILIES["llama"]), folder, max_file_bytes=10_000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()

    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=f"{shard.name}: corrupt"):
        load_huggingface(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"missing {shard.name}"):
        load_huggingface(folder)
    for index in ("{}", '{"weight_map": 3}', '{"weight_map": {"norm.weight": [3]}}'):
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match="no valid weight_map"):
            load_huggingface(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load_huggingface(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is a pickle"):
        load_huggingface(folder)
    (folder / "config.json").write_text("[1")
    with pytest.raises(ValueError, match="invalid JSON"):
        load_huggingface(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="contains a list"):
        load_huggingface(folder)


def test_nothing_is_left_of_a_save_that_fails(
    random_decoder: Callable[..., Decoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail_later(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError("disk full")
        save_file(*args, **kwargs)

    monkeypatch.setattr("titan_model.convert.huggingface_files.save_file", fail_later)
    with pytest.raises(OSError, match="disk full"):
        save_huggingface(random_decoder(FAMILIES["llama"]), tmp_path / "model", max_file_bytes=10_000)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_appears_when_all_is_written(
    random_decoder: Callable[..., Decoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "deep" / "model"
    seen = []

    def look(*args: Any, **kwargs: Any) -> None:
        seen.append(folder.exists())
        save_file(*args, **kwargs)

    monkeypatch.setattr("titan_model.convert.huggingface_files.save_file", look)
    save_huggingface(random_decoder(FAMILIES["llama"]), folder, max_file_bytes=10_000)
    assert len(seen) > 1
    assert not any(seen)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_folder_with_something_in_it_is_left_alone(random_decoder: Callable[..., Decoder], tmp_path: Path) -> None:
    model = random_decoder(FAMILIES["llama"])
    (tmp_path / "model").mkdir()
    save_huggingface(model, tmp_path / "model")  # an empty one will do
    before = held(tmp_path / "model")
    with pytest.raises(FileExistsError, match="choose another folder"):
        save_huggingface(random_decoder(FAMILIES["qwen3"]), tmp_path / "model")
    assert held(tmp_path / "model").keys() == before.keys()


def test_models_that_cannot_be_saved_are_refused(random_decoder: Callable[..., Decoder], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"embed\.weight is on the meta device"):
        save_huggingface(build(FAMILIES["llama"], "meta"), tmp_path / "model")
    with pytest.raises(ValueError, match="norm is 'layernorm'"):
        save_huggingface(random_decoder(FAMILIES["llama"], norm="layernorm"), tmp_path / "model")
    with pytest.raises(ValueError, match="max_file_bytes is 0"):
        save_huggingface(random_decoder(FAMILIES["llama"]), tmp_path / "model", max_file_bytes=0)
    untied = random_decoder(FAMILIES["llama-tied-scaled"])
    untied.head.weight = torch.nn.Parameter(untied.embed.weight.detach().clone())
    with pytest.raises(ValueError, match=r"model\.head\.weight = model\.embed\.weight"):
        save_huggingface(untied, tmp_path / "model")
    wrapped = random_decoder(FAMILIES["llama"])
    wrapped.layers["0"] = torch.nn.ModuleDict({"_orig_mod": wrapped.layers["0"]})  # as torch.compile would
    with pytest.raises(WeightsError, match=r"the names contain '_orig_mod\.', which a wrapper added"):
        save_huggingface(wrapped, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_sharded_model_is_refused(random_decoder: Callable[..., Decoder], tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = random_decoder(FAMILIES["llama"])
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model.norm.weight = torch.nn.Parameter(distribute_tensor(model.norm.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match=r"norm\.weight is sharded"):
            save_huggingface(model, tmp_path / "model")
    finally:
        distributed.destroy_process_group()


def test_a_selection_bias_survives_reading_and_is_not_lost_in_silence(
    random_decoder: Callable[..., Decoder], tmp_path: Path
) -> None:
    moe = FAMILIES["qwen3-moe"].moe
    assert moe is not None
    biased = replace(FAMILIES["qwen3-moe"], moe=replace(moe, balance_bias_rate=1e-3))
    model = random_decoder(biased)
    save_huggingface(model, tmp_path / "zero")
    assert not any("bias" in name for name in held(tmp_path / "zero"))
    router = model.get_submodule("layers.1.ffn.router")
    router.get_buffer("bias").fill_(0.25)
    with pytest.raises(WeightsError, match=r"layers\.1\.ffn\.router\.bias is not zero"):
        save_huggingface(model, tmp_path / "moved")
    assert not (tmp_path / "moved").exists()
    assert huggingface_map(biased).config == huggingface_map(FAMILIES["qwen3-moe"]).config


# Watches the memory that is the process's own (not the pages of mapped files) while a model is loaded.
WATCH = """
import sys, threading
from pathlib import Path
from titan_model.convert.huggingface_files import load_huggingface

def private_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))

start, seen, done = private_bytes(), [], threading.Event()

def watch():
    while not done.wait(0.001):
        seen.append(private_bytes())

watcher = threading.Thread(target=watch)
watcher.start()
model = load_huggingface(sys.argv[1])
done.set()
watcher.join()
print(max(seen) - start, len(seen), sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see memory")
def test_memory_never_holds_two_models(tmp_path: Path) -> None:
    model = build(replace(preset("debug"), dim=512, n_layers=24, ffn_dim=2048), "cpu")
    size = sum(parameter.nbytes for parameter in model.parameters())
    save_huggingface(model, tmp_path / "model", max_file_bytes=size // 6)
    command = [sys.executable, "-c", WATCH, str(tmp_path / "model")]
    peak, samples, loaded = map(int, subprocess.check_output(command, text=True).split())
    assert loaded == size
    assert samples > 10
    assert 0.9 * size < peak < 1.25 * size
