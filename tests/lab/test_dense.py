"""The dense baseline is Llama, reads as it counts, and goes through the trainer as any model does."""

import random

import pytest
import torch
from doubles import keep_doubles
from torch.utils.flop_counter import FlopCounterMode

from benthic.config.presets import PRESETS
from benthic.config.schema import YarnConfig
from benthic.errors import InputError
from benthic.lab.dense import Dense, DenseSizes
from benthic.model.initial import initialise
from benthic.ops.attention import causal_attention_reference
from benthic.train import loop
from benthic.train.checkpoint import committed, load
from benthic.train.loop import train
from benthic.train.metrics import read_metrics

SMALL = DenseSizes(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, head_dim=10, intermediate_size=40)
PLAIN = {"num_nextn_predict_layers": 0}


def odd_sizes(seed: int) -> tuple[DenseSizes, dict[str, float]]:
    draw = random.Random(seed).randint
    heads = draw(1, 5)
    sizes = DenseSizes(
        hidden_size=heads * draw(1, 15),  # transformers wants a multiple, though heads may be of any width
        num_hidden_layers=draw(1, 3),
        num_attention_heads=heads,
        head_dim=2 * draw(1, 12),
        intermediate_size=draw(2, 60),
    )
    return sizes, {
        "vocab_size": draw(10, 90),
        "rope_theta": 10.0 ** draw(2, 5),
        "rms_norm_eps": 10.0 ** -draw(2, 6),
        "initializer_range": 0.2,
    }


def build(sizes, dtype=torch.float32, seed=0, **changes):
    config = PRESETS["tiny"].model_copy(update={**PLAIN, **changes})
    model = Dense(sizes).build(config).to(dtype)
    initialise(model, config.initializer_range, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def llama_with_its_weights(model, sizes, changes, dtype):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=changes["vocab_size"],
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        head_dim=sizes.head_dim,
        rms_norm_eps=changes["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": changes["rope_theta"]},
        attn_implementation="sdpa",  # the eager one rounds probabilities to fp32
        tie_word_embeddings=False,
    )
    llama = transformers.LlamaForCausalLM(config).to(dtype)

    def halves(weight):
        """Llama rotates a head's first half with its second; here, neighbours are pairs."""
        by_pair = weight.unflatten(0, (sizes.num_attention_heads, sizes.head_dim // 2, 2))
        return by_pair.transpose(1, 2).flatten(0, 2)

    ours = model.transformer
    weights = {"model.embed_tokens": ours.embed, "model.norm": ours.norm, "lm_head": ours.head}
    weights = {f"{name}.weight": part.weight for name, part in weights.items()}
    for index, block in enumerate(ours.layers):
        gate, up = block.ffn.gate_up.weight.chunk(2)
        theirs = {
            "input_layernorm": block.attention_norm.weight,
            "post_attention_layernorm": block.ffn_norm.weight,
            "self_attn.q_proj": halves(block.attention.q.weight),
            "self_attn.k_proj": halves(block.attention.k.weight),
            "self_attn.v_proj": block.attention.v.weight,
            "self_attn.o_proj": block.attention.o.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.ffn.down.weight,
        }
        weights |= {f"model.layers.{index}.{name}.weight": weight for name, weight in theirs.items()}
    llama.load_state_dict({name: weight.detach() for name, weight in weights.items()}, strict=True)
    return llama


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.float64, 1e-9)], ids=str)
def test_it_is_llama(seed, dtype, tolerance, monkeypatch):
    keep_doubles(monkeypatch)
    sizes, changes = odd_sizes(seed)
    model = build(sizes, dtype, seed, **changes)
    llama = llama_with_its_weights(model, sizes, changes, dtype)
    tokens = torch.randint(changes["vocab_size"], (2, 37), generator=torch.Generator().manual_seed(seed))
    ours, theirs = model.transformer(tokens), llama(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    for logits in (ours, theirs):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    embedding, v = model.transformer.embed, model.transformer.layers[0].attention.v
    torch.testing.assert_close(embedding.weight.grad, llama.model.embed_tokens.weight.grad, atol=tolerance, rtol=1e-3)
    torch.testing.assert_close(
        v.weight.grad, llama.model.layers[0].self_attn.v_proj.weight.grad, atol=tolerance, rtol=1e-3
    )


def test_documents_do_not_see_each_other():
    model = build(SMALL, initializer_range=0.2)
    tokens = torch.randint(320, (1, 20), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0] * 9 + [1] * 11])
    other = tokens.clone()
    other[0, :9] = 319 - other[0, :9]
    left, right = (model.training_hidden(each, documents)[0][0] for each in (tokens, other))
    assert torch.equal(left[:, 9:], right[:, 9:])
    assert not torch.allclose(left[:, :9], right[:, :9])
    assert not torch.allclose(model.training_hidden(other)[0][0][:, 9:], right[:, 9:])


@pytest.mark.parametrize("seed", range(3))
def test_operations_are_counted(monkeypatch, seed):
    monkeypatch.setattr("benthic.lab.dense.causal_attention", causal_attention_reference)
    sizes, changes = odd_sizes(seed)
    length = 13
    model = build(sizes, **changes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.transformer(torch.zeros(1, length, dtype=torch.long))
    config = PRESETS["tiny"].model_copy(update={**PLAIN, **changes})
    ours = length * Dense(sizes).training_flops(config, length) / 3
    # The reference computes scores of all positions, masked ones too.
    unseen = length * (length - (length + 1) / 2)
    assert ours + 4 * sizes.num_hidden_layers * sizes.attention_width * unseen == counter.get_total_flops()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1"),
        ({"rope_scaling": YarnConfig(factor=2, original_max_position_embeddings=64)}, "rope_scaling"),
    ],
)
def test_settings_it_would_not_follow_are_refused(changes, named):
    with pytest.raises(InputError, match=named):
        build(SMALL, **changes)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_it_learns_and_resumes_exactly(tiny_run_config, make_run, monkeypatch, name):
    config = tiny_run_config(model=PLAIN, checkpoint_every=6, optimizer={"name": name, "learning_rate": 1e-2})
    whole, out = make_run("whole"), make_run("killed")
    result = train(config, whole, Dense(SMALL))
    losses = [row["loss"] for row in read_metrics(whole / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    real_step, count = loop.train_step, 0

    def killed_at_15(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 15:
            raise KeyboardInterrupt
        return real_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", killed_at_15)
        with pytest.raises(KeyboardInterrupt):
            train(config, out, Dense(SMALL))
    assert train(config, out, Dense(SMALL)).bits_per_byte == result.bits_per_byte
    left, right = (load(committed(folder / "checkpoints" / "pretrain")[-1]) for folder in (out, whole))
    assert left.state == right.state
    for group, tensors in right.tensors.items():
        assert all(torch.equal(left.tensors[group][key], tensor) for key, tensor in tensors.items())


def test_another_kind_or_size_does_not_resume(tiny_run_config, make_run):
    config = tiny_run_config(model=PLAIN, steps=2)
    out = make_run()
    train(config, out, Dense(SMALL))
    # The same shapes, other heads: only the settings tell.
    with pytest.raises(InputError, match=r"architecture\.num_attention_heads: saved 3, given 5"):
        train(config, out, Dense(SMALL.model_copy(update={"num_attention_heads": 5, "head_dim": 6})))
    with pytest.raises(InputError, match=r"architecture\.kind: saved dense, given None"):
        train(config, out)
