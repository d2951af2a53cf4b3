"""Recomputed activations: gradients equal to the last bit, outputs that are really let go, nothing else changed."""

import copy

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from benthic.config.presets import PRESETS
from benthic.model import LanguageModel, build_model, mla
from benthic.model.layers import RMSNorm
from benthic.model.transformer import Block
from benthic.ops import native
from benthic.train.compute import compute_in
from benthic.train.objective import Objective, prediction_targets
from benthic.train.recompute import recompute_activations
from tests.support.models import SequenceLatents

TINY = PRESETS["tiny"]
CONFIGS = {
    "tiny": TINY,
    "no query latent": TINY.model_copy(update={"q_lora_rank": None, "num_nextn_predict_layers": 2}),
    # Products large enough for the processor's tiles, where it has any.
    "wide": TINY.model_copy(
        update={"hidden_size": 256, "q_lora_rank": 128, "kv_lora_rank": 128, "intermediate_size": 192, "v_head_dim": 64}
    ),
    "no shared expert": TINY.model_copy(update={"n_shared_experts": 0, "hidden_size": 48, "v_head_dim": 12}),
}


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "_load", lambda: (None, "off"))
    elif native._load()[0] is None:
        pytest.skip(native.status())
    return request.param


def losses(model: LanguageModel, compute: str, seed: int = 0, masked: bool = False):
    objective, generator = Objective(model), torch.Generator().manual_seed(seed)
    tokens = torch.randint(320, (3, 38 + len(objective.model.mtp)), generator=generator)
    document = torch.rand(tokens.shape, generator=generator).lt(0.2).cumsum(1) if masked else None
    return compute_in(
        compute, objective, tokens, document, prediction_targets(tokens, document, 1 + len(objective.model.mtp))
    )


def gradients(model: LanguageModel, compute: str, **kinds) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses(model, compute, **kinds).total(0.3, 0.01).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("compute", ["fp32", "fp32-tiles", "bf16", "fp8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_equal_bit_for_bit(kernels, name, compute, masked):
    for seed in range(2):
        model = build_model(CONFIGS[name], seed=seed)
        expected = gradients(model, compute, seed=seed, masked=masked)
        recompute_activations(model)
        for _ in range(2):  # the second pass finds nothing of the first
            got = gradients(model, compute, seed=seed, masked=masked)
            assert all(torch.equal(got[key], gradient) for key, gradient in expected.items())


def outputs_alive(model: LanguageModel, compute: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[bool]]:
    """Whether the outputs of norms and what attention takes are alive between forward and backward pass."""
    made: dict[str, list[StorageWeakRef]] = {"norm": [], "query": [], "key and value": [], "swiglu": []}

    def remember(kind: str, tensor: torch.Tensor) -> None:
        made[kind].append(StorageWeakRef(tensor.untyped_storage()))

    attention = mla.causal_attention

    def watched(q, kv, k_rope, **named):
        remember("query", q)
        remember("key and value", kv)
        return attention(q, kv, k_rope, **named)

    monkeypatch.setattr(mla, "causal_attention", watched)
    for block in model.transformer.layers:
        for part in block.modules():
            if isinstance(part, RMSNorm):
                part.register_forward_hook(lambda _, __, output: remember("norm", output))
    dense = model.transformer.layers[0].ffn
    dense.down.register_forward_pre_hook(lambda _, args: remember("swiglu", args[0]))
    kept = losses(model, compute)
    alive = {kind: [not reference.expired() for reference in references] for kind, references in made.items()}
    kept.total(0.3, 0.01).backward()
    monkeypatch.setattr(mla, "causal_attention", attention)
    return alive


@pytest.mark.parametrize("compute", ["fp32", "fp32-tiles", "bf16"])
def test_what_is_recomputed_is_not_kept(kernels, compute, monkeypatch):
    plain, saving = build_model(TINY), build_model(TINY)
    recompute_activations(saving)
    kept, saved = outputs_alive(plain, compute, monkeypatch), outputs_alive(saving, compute, monkeypatch)
    assert all(all(alive) for kind, alive in kept.items() if kind in ("norm", "swiglu"))
    assert not any(saved["norm"])
    assert not any(saved["swiglu"])
    if kernels == "native":  # PyTorch's attention keeps copies of its own
        assert all(kept["query"] + kept["key and value"])
        assert not any(saved["query"] + saved["key and value"])


def test_a_step_runs_after_an_error_and_backward_twice(monkeypatch):
    model = build_model(TINY)
    expected = gradients(model, "fp32")
    recompute_activations(model)
    block: Block = model.transformer.layers[1]
    with monkeypatch.context() as patch:
        patch.setattr(block.ffn.experts, "forward", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            losses(model, "fp32")
    x = torch.ones(3, requires_grad=True)
    y = x.square()
    assert y.grad_fn._saved_self is x  # no hook is left in place
    loss = losses(model, "fp32").total(0.3, 0.01)
    for _ in range(2):
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in model.named_parameters())


def test_a_source_changed_in_place_is_noticed():
    model = build_model(TINY)
    recompute_activations(model)
    embedded = []
    model.transformer.embed.register_forward_hook(lambda _, __, output: embedded.append(output))
    loss = losses(model, "fp32").total(0.3, 0.01)
    with torch.no_grad():
        embedded[0].add_(1)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
        loss.backward()


def test_inference_is_the_same(kernels):
    model, tokens = build_model(TINY), torch.randint(320, (1, 9), generator=torch.Generator().manual_seed(1))

    def logits(of: LanguageModel) -> list[torch.Tensor]:
        cache = SequenceLatents.empty(TINY)
        results = [of(tokens), of(tokens[:, :8], cache=cache)]
        return [*results, of(tokens[:, 8:], cache=SequenceLatents(cache.latents_NSL))]

    with torch.no_grad():
        expected = logits(copy.deepcopy(model))
        recompute_activations(model)
        assert all(torch.equal(got, want) for got, want in zip(logits(model), expected, strict=True))
