"""The same weights give the same tokens, logits and greedy text in llama.cpp."""

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from benthic.api import Engine
from benthic.config.schema import ModelConfig, RunConfig, YarnConfig
from benthic.convert.gguf import export_gguf, write_gguf
from benthic.convert.gguf_tokenizer import _DEEPSEEK_V3_WORDS, _step
from benthic.convert.huggingface import save_hf
from benthic.data.tokenizer import Tokenizer
from benthic.model import LanguageModel

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
SPEC = importlib.util.spec_from_file_location("llama_peer", Path(__file__).parents[2] / "benchmarks" / "llama_peer.py")
llama_peer = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(llama_peer)
LlamaCpp = llama_peer.LlamaCpp

TOLERANCE = 2e-4
YARN = YarnConfig(factor=4.0, original_max_position_embeddings=64)
CONFIGS: dict[str, dict[str, Any]] = {
    "query uncompressed": {"q_lora_rank": None},
    "27 layers, query uncompressed": {"q_lora_rank": None, "num_hidden_layers": 27, "first_k_dense_replace": 20},
    "two shared experts": {"n_shared_experts": 2, "num_nextn_predict_layers": 0},
    "groups": {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "all groups": {"n_routed_experts": 9, "n_group": 3, "topk_group": 3, "num_experts_per_tok": 4},
    "yarn": {"rope_scaling": YARN},
    "yarn, wide rope": {
        "rope_scaling": YARN.model_copy(update={"original_max_position_embeddings": 4096}),
        "qk_rope_head_dim": 16,
    },
    "yarn, two temperatures": {"rope_scaling": YARN.model_copy(update={"mscale": 0.7, "mscale_all_dim": 1.3})},
    "yarn, the same temperature twice": {
        "rope_scaling": YARN.model_copy(update={"mscale": 0.707, "mscale_all_dim": 0.707})
    },
    "yarn, no scale": {"rope_scaling": YARN.model_copy(update={"mscale_all_dim": 0.0, "beta_fast": 4.0})},
    "yarn by one": {"rope_scaling": YARN.model_copy(update={"factor": 1.0})},
    "wide rope": {"qk_rope_head_dim": 14, "qk_nope_head_dim": 3, "v_head_dim": 19, "rope_theta": 500.0},
    "gates not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 0.6},
    "every layer dense": {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0, "n_shared_experts": 0},
    "every layer sparse": {"first_k_dense_replace": 0, "num_nextn_predict_layers": 2},
    "one expert of many": {"num_experts_per_tok": 1, "n_routed_experts": 16, "moe_intermediate_size": 3},
}
PROMPTS = [
    "the sea", "deep and", "slow fish drift", "x", "grey mud over", "Hello, I'm 12 years old!", "light\n\nwhere",
    " cold", "The", "soft soft soft", "below the light", "dark", "and and", "a", "fish fish", "over the soft grey",
    "mud.", "é", "in 1984 they've", "  two  spaces",
]  # fmt: skip

SmallConfig = Callable[..., ModelConfig]
RandomModel = Callable[..., LanguageModel]


@torch.inference_mode()
def difference(model: LanguageModel, path: Path, seed: int = 0) -> float:
    """Largest difference of logits at the ends of several beginnings of a random text."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (50,), generator=generator)
    ours = model(tokens[None])[0].numpy()
    with LlamaCpp(path, context=64) as theirs:
        ends = []
        for length in (1, 2, 13, 50):
            theirs.forget()
            ends.append(np.abs(theirs.read(tokens[:length].tolist()) - ours[length - 1]).max())
        theirs.forget(13)
        ends.append(np.abs([theirs.read([token]) for token in tokens[13:].tolist()] - ours[13:]).max())
    return float(max(ends))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_are_the_same(small_config: SmallConfig, random_model: RandomModel, tmp_path: Path, changes: Any):
    config = small_config(**changes)
    for seed in range(2):
        model = random_model(config, seed)
        write_gguf(model, config, None, tmp_path / f"{seed}.gguf", "f32")
        assert difference(model, tmp_path / f"{seed}.gguf", seed) < TOLERANCE


@pytest.mark.parametrize(
    "wrong",
    [
        {"routed_scaling_factor": 1.8},
        {"norm_topk_prob": False},
        {"n_group": 3, "topk_group": 1},
        {"rope_theta": 5000.0},
        {"rope_scaling": YARN},
        {"num_experts_per_tok": 3},
    ],
    ids=str,
)
def test_a_setting_that_is_not_as_it_was_shows(
    small_config: SmallConfig, random_model: RandomModel, tmp_path: Path, wrong: dict[str, Any]
):
    model = random_model(small_config())
    write_gguf(model, small_config(**wrong), None, tmp_path / "m.gguf", "f32")
    assert difference(model, tmp_path / "m.gguf") > 10 * TOLERANCE


@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.999), ("f16", 0.9999), ("q8_0", 0.99), ("q4_0", 0.7)])
@torch.inference_mode()
def test_fewer_bits_leave_nearly_the_same_logits(
    small_config: SmallConfig, random_model: RandomModel, tmp_path: Path, precision: Any, least: float
):
    wide = {"hidden_size": 64, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
    config = small_config(
        **wide, moe_intermediate_size=32, intermediate_size=64, num_attention_heads=2, num_experts_per_tok=6
    )
    model = random_model(config)
    write_gguf(model, config, None, tmp_path / "m.gguf", precision)
    tokens = torch.arange(20)
    with LlamaCpp(tmp_path / "m.gguf", context=64) as llama:
        theirs = torch.from_numpy(llama.read(tokens.tolist()))
    ours = model(tokens[None])[0, -1]
    assert float(torch.cosine_similarity(ours, theirs, 0)) > least
    assert float((ours - theirs).abs().max()) > 1e-5


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizers with Benthic's and with DeepSeek-V3's way of cutting text, each trained a little."""
    folder = tmp_path_factory.mktemp("tokenizers")
    text = ["The sea's 1234 fish can't swim; 他们不能游泳。 Ähre straße\n\n\tx = y+1;  // ok"] * 3
    Tokenizer.train(text, 330).save(folder / "gpt-2")
    backend = tokenizers.Tokenizer(models.BPE())
    words = [pre_tokenizers.Split(tokenizers.Regex(one), "isolated") for one in _DEEPSEEK_V3_WORDS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*words, byte_level])
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    backend.train_from_iterator(text, trainer)
    settings = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    Tokenizer(backend, settings).save(folder / "deepseek-v3")
    assert _step(_DEEPSEEK_V3_WORDS[0])
    return {path.name: path for path in folder.iterdir()}


TEXTS = [
    "", " ", "\n", "don't", "can'tx 'll", "a  b   c", "12345 1", "x\r\n\r\n y", "日本語 ABCあ", "naïve — “quote”",
    "🙂🙂 ok", "<|user|> is text", "\xa0x\u3000y\u200bz", "é́", "A1b2_C-d", "...?!", "\tif x:\n\t\treturn\n", "Ω≈ç√∫",
    "١٢٣", "ﬁ",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt-2", "deepseek-v3"])
def test_text_becomes_the_same_tokens(
    small_config: SmallConfig, random_model: RandomModel, vocabulary: dict[str, Path], tmp_path: Path, kind: str
):
    config = small_config(vocab_size=340)
    write_gguf(random_model(config), config, vocabulary[kind], tmp_path / "m.gguf", "f32")
    tokenizer = Tokenizer.load(vocabulary[kind])
    drawn = np.random.default_rng(0)
    alphabet = [*list("ab Zé'1,\n\t日\xa0"), "n't", "  ", "'s", "🙂", "12"]
    texts = TEXTS + ["".join(drawn.choice(alphabet, 12)) for _ in range(300)]
    with LlamaCpp(tmp_path / "m.gguf", context=64) as theirs:
        for text in texts:
            ids = tokenizer.encode(text)
            assert theirs.tokens(text) == ids, repr(text)
            assert theirs.tokens(text, begin=True) == [tokenizer.bos_id, *ids]
            assert theirs.text(ids) == text


def test_conversations_and_ends_are_the_same(
    small_config: SmallConfig, random_model: RandomModel, vocabulary: dict[str, Path], tmp_path: Path
):
    config = small_config(vocab_size=340)
    write_gguf(random_model(config), config, vocabulary["gpt-2"], tmp_path / "m.gguf", "f32")
    tokenizer = Tokenizer.load(vocabulary["gpt-2"])
    with LlamaCpp(tmp_path / "m.gguf", context=64) as theirs:
        rendered = "<|begin|><|user|>Hi, sea!<|assistant|>"
        assert theirs.tokens(rendered, special=True) == tokenizer.apply_chat([{"role": "user", "content": "Hi, sea!"}])
        assert theirs.ends(tokenizer.eos_id)
        assert theirs.ends(tokenizer.role_ids["user"])
        assert not theirs.ends(tokenizer.encode("a")[0])


def test_greedy_text_is_the_same_after_training(
    tiny_run_config: Callable[..., RunConfig], make_run: Callable[..., Path], tmp_path: Path
):
    from benthic.train.loop import train

    run = make_run()
    trained = train(tiny_run_config(steps=30), run)
    save_hf(trained.model, trained.config.model, run / "tokenizer", run / "model")
    export_gguf(run, tmp_path / "m.gguf")
    engine = Engine(run, temperature=0, max_new_tokens=40)
    texts = []
    with LlamaCpp(tmp_path / "m.gguf", context=256) as theirs:
        for prompt in PROMPTS:
            ids = [engine.tokenizer.bos_id, *engine.tokenizer.encode(prompt)]
            ours = engine.generate(prompt)[0]
            generated = itertools.takewhile(lambda t: t not in engine.tokenizer.stop_ids, theirs.greedy(ids, 40))
            assert theirs.text(list(generated)) == ours.text, prompt
            texts.append(ours.text)
    assert len(set(texts)) > 1
