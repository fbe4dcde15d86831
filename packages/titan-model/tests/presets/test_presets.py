"""Presets hold what was released: parameter counts, constants, and the models that transformers builds from them."""

from dataclasses import astuple, replace

import pytest
import torch

from model_families import presets
from titan_model import DecoderConfig, build, count_parameters, preset, preset_names
from titan_model.convert.huggingface_config import config_from_huggingface, config_to_huggingface
from titan_model.presets.hub import HUB
from titan_model.rope_scalings import amplitude

# What the released checkpoints hold, tied weights once, as their pages on the Hub count them.
PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "qwen2_5_72b": 72_706_203_648,
    "mistral_7b_v0_1": 7_241_732_096,
    "mistral_7b_v0_3": 7_248_023_552,
    "mistral_nemo_12b": 12_247_782_400,
    "mistral_small_24b": 23_572_403_200,
    "mixtral_8x7b": 46_702_792_704,
    "mixtral_8x22b": 140_620_634_112,
    "yi_6b": 6_061_035_520,
    "yi_34b": 34_388_917_248,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "smollm3_3b": 3_075_098_624,
    "granite_3_3_2b": 2_533_539_840,
    "granite_3_3_8b": 8_170_864_640,
    "phi3_mini_4k": 3_821_079_552,
    "phi3_medium_4k": 13_960_238_080,
    "phi4": 14_659_507_200,
    "phi4_mini": 3_836_021_760,
}
# In billions, as the Qwen3 report and its model cards round them: all parameters, and those besides the embeddings.
REPORTED = {
    "qwen3_0_6b": (0.6, 0.44),
    "qwen3_1_7b": (1.7, 1.4),
    "qwen3_4b": (4.0, 3.6),
    "qwen3_8b": (8.2, 6.95),
    "qwen3_14b": (14.8, 13.2),
    "qwen3_32b": (32.8, 31.2),
    "qwen3_30b_a3b": (30.5, 29.9),
    "qwen3_235b_a22b": (235, 234),
}


def held(config: DecoderConfig) -> int:
    return sum(parameter.numel() for parameter in build(config, "meta").parameters())


def test_every_preset_is_a_released_one_or_for_debugging() -> None:
    names = preset_names()
    assert len(names) == len(set(names))
    released = [name for name in names if not name.startswith("debug")]
    assert sorted(released) == sorted([*PUBLISHED, *REPORTED])


@pytest.mark.parametrize("name", presets(PUBLISHED))
def test_size_is_the_published_one(name: str) -> None:
    assert held(preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", presets(REPORTED))
def test_size_is_the_reported_one(name: str) -> None:
    config, (total, besides) = preset(name), REPORTED[name]
    embeddings = config.vocab_size * config.dim * (1 if config.tied_embeddings else 2)
    count = held(config)
    # Half a unit of the last digit that is given.
    assert count / 1e9 == pytest.approx(total, abs=0.5 if total > 100 else 0.05)
    assert (count - embeddings) / 1e9 == pytest.approx(besides, abs=0.5 if total > 100 else 0.05)


def test_counts_are_the_published_ones() -> None:
    assert {name: count_parameters(preset(name)) for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("name", presets(slow=True))
def test_transformers_builds_the_same_size_from_it(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    values = config_to_huggingface(preset(name))
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.tie_weights()
    assert held(preset(name)) == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize("name", preset_names())
def test_survives_the_way_through_config_json(name: str) -> None:
    config = preset(name)
    if config.moe is not None:  # how load is balanced is no part of the shape
        config = replace(config, moe=replace(config.moe, balance_loss=0.0))
    assert config_from_huggingface(config_to_huggingface(preset(name))) == config


@pytest.mark.parametrize(
    ("family", "theta", "eps", "context", "scaling"),
    [
        ("llama2_", 10_000.0, 1e-5, 4096, None),
        ("llama3_8b", 500_000.0, 1e-5, 8192, None),
        ("llama3_70b", 500_000.0, 1e-5, 8192, None),
        ("llama3_1_", 500_000.0, 1e-5, 131_072, (8.0, 1.0, 4.0, 8192)),
        ("llama3_2_", 500_000.0, 1e-5, 131_072, (32.0, 1.0, 4.0, 8192)),
        ("qwen2_5_0_5b", 1_000_000.0, 1e-6, 32_768, None),
        ("qwen2_5_7b", 1_000_000.0, 1e-6, 32_768, None),
        ("qwen2_5_14b", 1_000_000.0, 1e-5, 32_768, None),
        ("mistral_7b_v0_1", 10_000.0, 1e-5, 32_768, None),
        ("mixtral_8x7b", 1_000_000.0, 1e-5, 32_768, None),
        ("yi_", 5_000_000.0, 1e-5, 4096, None),
        ("smollm2_1_7b", 130_000.0, 1e-5, 8192, None),
        ("smollm3_3b", 5_000_000.0, 1e-6, 65_536, None),
        ("granite_3_3_", 10_000_000.0, 1e-5, 131_072, None),
        ("phi3_", 10_000.0, 1e-5, 4096, None),
        ("qwen3_", 1_000_000.0, 1e-6, 40_960, None),
    ],
)
def test_constants_are_the_released_ones(
    family: str, theta: float, eps: float, context: int, scaling: tuple[float, float, float, int] | None
) -> None:
    # Sizes cannot show these: they are as the released `config.json` files have them.
    configs = [preset(name) for name in preset_names() if name.startswith(family)]
    assert configs
    for config in configs:
        assert (config.rope_theta, config.norm_eps, config.max_seq_len) == (theta, eps, context)
        assert (None if config.rope_scaling is None else astuple(config.rope_scaling)) == scaling


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("qwen3") and "_a" in name])
def test_experts_are_routed_as_released(name: str) -> None:
    moe = preset(name).moe
    assert moe is not None
    assert (moe.n_experts, moe.top_k, moe.score, moe.normalize_top_k) == (128, 8, "softmax", True)
    assert (moe.shared_ffn_dim, moe.dense_layers, moe.balance_loss) == (0, (), 0.001)


def test_what_sizes_do_not_show_is_the_released_one() -> None:
    assert preset("mistral_7b_v0_1").window == 4096
    assert preset("mistral_7b_v0_3").window is None
    assert preset("phi3_mini_4k").window == 2047
    assert preset("smollm3_3b").nope_layers == (3, 7, 11, 15, 19, 23, 27, 31, 35)
    phi = preset("phi4_mini")
    assert (phi.rotary_dim, phi.attention_head_dim) == (96, 128)
    assert amplitude(phi.rope_scaling) == pytest.approx(1.1902380714238083)  # sqrt(1 + ln 32 / ln 4096)
    granite = preset("granite_3_3_8b")
    factors = (granite.embedding_multiplier, granite.residual_multiplier, granite.attention_multiplier)
    assert (*factors, granite.logits_scaling) == (12.0, 0.22, 0.0078125, 16.0)


@pytest.mark.parametrize("name", ["debug_llama3", "debug_qwen3", "debug_moe"])
def test_debug_sizes_can_be_split_eight_ways(name: str) -> None:
    config = preset(name)
    sizes = [config.vocab_size, config.dim, config.ffn_dim, config.n_heads, config.n_kv_heads]
    if config.moe is not None:
        sizes += [config.moe.n_experts, config.moe.ffn_dim]
    assert all(size % 8 == 0 for size in sizes)
    assert config.vocab_size >= 258  # the byte tokenizer's tokens


def test_debug_sizes_show_what_their_families_have() -> None:
    tied, qwen, moe = preset("debug_llama3"), preset("debug_qwen3"), preset("debug_moe")
    assert tied.tied_embeddings
    assert tied.rope_scaling is not None
    assert tied.rope_scaling.original_context < tied.max_seq_len
    assert qwen.qk_norm
    assert qwen.attention_head_dim * qwen.n_heads != qwen.dim
    assert moe.moe is not None


def test_names_of_the_hub_are_presets_too() -> None:
    assert preset("Qwen/Qwen3-0.6B") == preset("qwen3_0_6b")
    for released, name in HUB.items():
        assert preset(released) is preset(name)
    with pytest.raises(KeyError, match=r"unknown model preset 'Qwen/Qwen3-0\.7B'; did you mean Qwen/Qwen3-1\.7B"):
        preset("Qwen/Qwen3-0.7B")
