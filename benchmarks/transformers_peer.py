"""Hugging Face transformers' DeepSeek-V3 as a peer in training: the same sizes, batches, optimizer and precision.

    pip install 'benthic[peers]'

fp32 or bf16, which is PyTorch's autocast over fp32 weights: Benthic's bf16 keeps those too. AdamW decays what Benthic
decays. The peer has no multi-token prediction, no balancing of experts and no Muon; settings that ask for what it
lacks are refused.
"""

from typing import Any

import torch
from steps import Step, compute_of
from torch.nn.functional import cross_entropy

from benthic.config.schema import RunConfig
from benthic.convert.config import config_to_hf
from benthic.errors import InputError, MissingExtra
from benthic.train.optimizer import adamw
from benthic.train.trial import RandomSequences

WITHOUT_MTP = "model.num_nextn_predict_layers=0"


def peer_step(config: RunConfig, **implementation: str) -> Step:
    """A step of a fresh model on random tokens.

    Raises:
        InputError: the peer cannot be trained with these settings.
        MissingExtra: transformers is not installed.
    """
    train, optimizing = config.train, config.train.optimizer
    refuse_what_it_lacks(config)
    model = fresh_model(config, implementation)
    parameters, batches = list(model.parameters()), RandomSequences(config)
    optimizer = adamw(parameters, optimizing)
    in_bf16 = compute_of(config) == "bf16"
    taken = 0

    def step() -> None:
        nonlocal taken
        tokens_BS = batches.at(taken, train.batch_size).tokens_BS
        taken += train.batch_size
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            logits = model(tokens_BS[:, :-1], use_cache=False).logits
        cross_entropy(logits.flatten(0, 1).float(), tokens_BS[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, optimizing.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def refuse_what_it_lacks(config: RunConfig) -> None:
    """Raise InputError for settings that only one of the two would follow."""
    train = config.train
    lacking = {
        f"precision.compute={config.precision.compute}": compute_of(config) == "fp8",
        f"train.optimizer.name={train.optimizer.name}": train.optimizer.name != "adamw",
        f"train.micro_batch_size={train.micro_batch_size}": train.micro_batch_size not in (None, train.batch_size),
        f"train.ema_decay={train.ema_decay}": bool(train.ema_decay),
        f"train.ema_span={train.ema_span}": train.ema_span is not None,
    }
    for setting, asked in lacking.items():
        if asked:
            raise InputError(f"{setting}: not compared; the peer takes whole batches in fp32 or bf16 with AdamW alone")


def peer_library() -> Any:
    """The library.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "peers") from error
    return transformers


def fresh_model(config: RunConfig, implementation: dict[str, str]) -> Any:
    """Its model of these sizes, with its own choice of kernels where ``implementation`` names none."""
    library = peer_library()
    settings: dict[str, Any] = {**config_to_hf(config.model, torch.float32, {}), **implementation}
    model = library.DeepseekV3ForCausalLM(library.DeepseekV3Config(**settings)).train()
    assert all(getattr(model.config, f"_{key}") == value for key, value in implementation.items())
    return model
