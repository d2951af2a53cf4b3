"""The same weights give the same logits and the same greedy text in transformers, written by us or by them."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles import keep_doubles
from torch import Tensor

from benthic.api import Engine
from benthic.config.schema import ModelConfig, YarnConfig
from benthic.convert.huggingface import load_hf, save_hf
from benthic.data.tokenizer import Tokenizer
from benthic.model import LanguageModel
from benthic.model.transformer import attention_context

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
YARN = YarnConfig(factor=4.0, original_max_position_embeddings=64)
CONFIGS: dict[str, dict[str, Any]] = {
    "query uncompressed": {"q_lora_rank": None},
    "no shared expert": {"n_shared_experts": 0},
    "two shared experts": {"n_shared_experts": 2, "num_nextn_predict_layers": 0},
    "groups": {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "all groups": {"n_routed_experts": 9, "n_group": 3, "topk_group": 3, "num_experts_per_tok": 4},
    "yarn": {"rope_scaling": YARN},
    "yarn, wide rope": {"rope_scaling": YARN.model_copy(update={"beta_fast": 2.0}), "qk_rope_head_dim": 16},
    "yarn, two temperatures": {"rope_scaling": YARN.model_copy(update={"mscale": 0.7, "mscale_all_dim": 1.3})},
    "yarn, no scale": {"rope_scaling": YARN.model_copy(update={"mscale_all_dim": 0.0, "beta_fast": 4.0})},
    "yarn, one frequency": {"rope_scaling": YARN.model_copy(update={"beta_fast": 1.0}), "q_lora_rank": None},
    "wide rope": {"qk_rope_head_dim": 14, "qk_nope_head_dim": 3, "v_head_dim": 19, "rope_theta": 500.0},
    "narrow value": {"qk_nope_head_dim": 17, "v_head_dim": 2, "num_attention_heads": 5, "qk_rope_head_dim": 2},
    "gates not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 0.6},
    "every layer dense": {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
    "every layer sparse": {"first_k_dense_replace": 0, "num_nextn_predict_layers": 2},
    "one expert of many": {"num_experts_per_tok": 1, "n_routed_experts": 16, "moe_intermediate_size": 3},
    "large eps": {"rms_norm_eps": 0.03, "hidden_size": 33},
}
each_config = pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)

SmallConfig = Callable[..., ModelConfig]
RandomModel = Callable[..., LanguageModel]


@pytest.fixture(autouse=True)
def _theirs_in_float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_doubles(monkeypatch)


@pytest.fixture(autouse=True)
def _empty_layers_may_be_initialised() -> Any:
    """transformers builds shared experts of width 0 where there are none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        yield


def tokens_for(config: ModelConfig, seed: int, length: int = 50) -> Tensor:
    return torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))


def open_in_transformers(folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Their float64 works only with their plain implementation of the experts."""
    loaded: tuple[Any, dict[str, Any]] = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager", output_loading_info=True
    )
    return loaded


def their_model(config: ModelConfig, dtype: torch.dtype, seed: int) -> Any:
    """A model of transformers' own, configured without our help and filled with large random weights."""
    sizes = config.model_dump(exclude={"rope_scaling", "rope_theta"})
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "yarn"} | config.rope_scaling.model_dump()
    raw = transformers.DeepseekV3Config(
        **sizes, num_key_value_heads=config.num_attention_heads, rope_parameters=rope, rope_interleave=True
    )
    raw._experts_implementation = "eager"
    model = transformers.DeepseekV3ForCausalLM(raw).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    return model


def assert_close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == theirs.dtype == dtype
    assert ours.std() > 0.3, "logits too small to tell anything"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype])


@each_dtype
@each_config
@torch.no_grad()
def test_exported_weights_give_the_same_logits_in_transformers(
    changes: dict[str, Any], dtype: torch.dtype, small_config: SmallConfig, random_model: RandomModel, tmp_path: Path
) -> None:
    config = small_config(**changes)
    model = random_model(config, seed=1, dtype=dtype)
    save_hf(model, config, None, tmp_path / "out", max_shard_bytes=30_000)
    theirs, info = open_in_transformers(tmp_path / "out", dtype)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    mtp = tuple(f"model.layers.{config.num_hidden_layers + k}." for k in range(config.num_nextn_predict_layers))
    assert all(name.startswith(mtp) for name in info["unexpected_keys"])
    tokens = tokens_for(config, seed=2)
    assert_close(model(tokens), theirs(tokens).logits, dtype)


@each_dtype
@each_config
@torch.no_grad()
def test_weights_written_by_transformers_give_the_same_logits(
    changes: dict[str, Any], dtype: torch.dtype, small_config: SmallConfig, tmp_path: Path
) -> None:
    wanted = small_config(**changes)
    theirs = their_model(wanted, dtype, seed=3)
    theirs.save_pretrained(tmp_path)
    model, config = load_hf(tmp_path)
    # transformers counts MTP layers but neither has nor writes them.
    assert config == wanted.model_copy(update={"num_nextn_predict_layers": 0})
    tokens = tokens_for(config, seed=4)
    assert_close(model(tokens), theirs(tokens).logits, dtype)


@pytest.mark.parametrize("change", [
    {"rope_theta": 9000.0}, {"routed_scaling_factor": 1.69}, {"norm_topk_prob": False}, {"rms_norm_eps": 1e-4},
    {"rope_scaling": None}, {"rope_scaling": YARN.model_copy(update={"mscale_all_dim": 0.9})},
    {"rope_scaling": YARN.model_copy(update={"mscale": 0.9})}, {"topk_group": 1},
    {"rope_scaling": YARN.model_copy(update={"beta_fast": 2.0})},
], ids=str)  # fmt: skip
@torch.no_grad()
def test_the_comparison_would_notice_any_other_setting(
    change: dict[str, Any], small_config: SmallConfig, random_model: RandomModel
) -> None:
    config = small_config(rope_scaling=YARN, qk_rope_head_dim=16, n_group=3, topk_group=2)
    model, other = (random_model(c, seed=1) for c in (config, config.model_copy(update=change)))
    tokens = tokens_for(config, seed=2)
    assert (model(tokens) - other(tokens)).abs().max() > 10 * TOLERANCE[torch.float32]


@torch.no_grad()
def test_the_comparison_would_notice_another_order_of_rotary_pairs(
    small_config: SmallConfig, random_model: RandomModel
) -> None:
    config = small_config(q_lora_rank=None)
    model, tokens = random_model(config, seed=1), tokens_for(config, seed=2)
    before = model(tokens)
    halves = torch.tensor([0, 2, 1, 3])
    for layer in model.transformer.layers:
        for heads in layer.attention.q.weight.data.unflatten(0, (config.num_attention_heads, -1)):
            heads[-4:] = heads[-4:][halves]
        layer.attention.kv_a.weight.data[-4:] = layer.attention.kv_a.weight.data[-4:][halves]
    assert (model(tokens) - before).abs().max() > 10 * TOLERANCE[torch.float32]


@pytest.fixture
def mtp_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks for MTP layers at DeepSeek-V3's own index, 61; our little models have theirs at 3."""
    monkeypatch.setattr(
        transformers.DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[3-9]\d*\..*"]
    )


@each_dtype
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "n_shared_experts": 0}, {"num_nextn_predict_layers": 2}])
@pytest.mark.usefixtures("mtp_is_known")
@torch.no_grad()
def test_mtp_modules_give_the_same_logits_in_transformers(
    changes: dict[str, Any], dtype: torch.dtype, small_config: SmallConfig, random_model: RandomModel, tmp_path: Path
) -> None:
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    config = small_config(**changes)
    model = random_model(config, seed=5, dtype=dtype)
    save_hf(model, config, None, tmp_path / "out")
    main, _ = open_in_transformers(tmp_path / "out", dtype)
    mtp = MtpModel.from_pretrained(main).eval()
    tokens = tokens_for(config, seed=6)
    length = tokens.shape[1] - len(model.mtp)
    positions = torch.arange(length)[None].expand(len(tokens), -1)
    hidden, _ = model.transformer.hidden(tokens[:, :length])
    context = attention_context(config, tokens[:, :length])
    cache = MtpCache(config=main.config.get_mtp_config())
    for depth, module in enumerate(model.mtp):
        following = tokens[:, depth + 1 : depth + 1 + length]
        theirs = mtp.forward_layer(depth, hidden, positions, cache, input_ids=following)
        hidden, _ = module(hidden, model.transformer.embed(following), context)
        assert_close(model.transformer.head(hidden), main.lm_head(theirs), dtype)


@torch.no_grad()
def test_greedy_text_is_the_same_as_of_transformers(
    small_config: SmallConfig, random_model: RandomModel, tmp_path: Path
) -> None:
    text = "the quick brown fox jumps over the lazy dog while a small bear eats berries by the river"
    tokenizer = Tokenizer.train([text], vocab_size=300)
    tokenizer.save(tmp_path / "tokenizer")
    config = small_config(vocab_size=tokenizer.vocab_size, rope_scaling=YARN)
    for seed in range(2):
        out = tmp_path / f"out{seed}"
        save_hf(random_model(config, seed), config, tmp_path / "tokenizer", out)
        engine = Engine(out, temperature=0.0, max_new_tokens=40)
        theirs, _ = open_in_transformers(out, torch.float32)
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        for prompt in ("the quick", "a small bear eats", "by", "Ünknown words, 42!"):
            inputs = their_tokenizer(prompt, return_tensors="pt")
            ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
            (completion,) = engine.generate(prompt)
            stopped = int(ids[-1]) in tokenizer.stop_ids
            assert list(completion.token_ids) == ids.tolist()[: -1 if stopped else None]
            assert len(completion.token_ids) > 2
            theirs_said = their_tokenizer.decode(ids, skip_special_tokens=True)
            # A character that the limit cut is left out here, and shown as U+FFFD there.
            assert completion.text.rstrip("\ufffd") == theirs_said.rstrip("\ufffd")
