"""Model settings to and from the ``config.json`` of a published DeepSeek-V3-family checkpoint.

The names of sizes are the same on both sides; what is left is rotary scaling, which is written in two styles, and
a handful of switches. A checkpoint whose switches ask for another architecture is refused: loading it would give a
model that answers wrongly without a word.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from benthic.config.complain import complaint, shown
from benthic.config.schema import ModelConfig, YarnConfig
from benthic.errors import InputError
from benthic.precision.blocks import BLOCK

ARCHITECTURE = "DeepseekV3ForCausalLM"

# The values of each switch that this architecture has; a key that is absent has the first.
SWITCHES: dict[str, tuple[Any, ...]] = {
    "architectures": ([ARCHITECTURE],),
    "model_type": ("deepseek_v3", "kimi_k2"),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "rope_interleave": (True,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "tie_word_embeddings": (False, True),
}
FP8_SWITCHES: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3",),
    "weight_block_size": ([BLOCK, BLOCK],),
}
OPTIONAL = ("num_nextn_predict_layers", "initializer_range", "rope_theta", "rope_scaling")
ROPE_KEYS = {"type", "rope_type", "rope_theta", *YarnConfig.model_fields}
# What DeepSeek's code and transformers make of a config that gives neither: the rotation alone has a temperature.
YARN_DEFAULTS = {"mscale": 1.0, "mscale_all_dim": 0.0}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def config_from_hf(raw: Mapping[str, Any], source: Path) -> ModelConfig:
    """Sizes from the content of a ``config.json``.

    Raises:
        InputError: a size is missing or impossible, or a switch asks for another architecture.
    """
    heads = {"num_key_value_heads": (raw.get("num_attention_heads"), None)}
    _check_switches(raw, SWITCHES | heads, f"{source}: ")
    missing = [key for key in ModelConfig.model_fields if key not in OPTIONAL and key not in raw]
    if missing:
        # Defaults differ between programs; a guess here would load a model that is subtly another.
        raise InputError(f"{source}: {missing[0]} is missing; a {ARCHITECTURE} config names every size")
    sizes = {key: raw[key] for key in ModelConfig.model_fields if key in raw}
    for count in ("n_shared_experts", "num_nextn_predict_layers"):
        sizes[count] = 0 if raw.get(count) is None else raw[count]
    try:
        return ModelConfig.model_validate(sizes | _rope_from_hf(raw, source), strict=True)
    except ValidationError as error:
        raise InputError(complaint(error, ModelConfig, str(source))) from None


def config_to_hf(config: ModelConfig, dtype: torch.dtype, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """Content of a ``config.json`` for these sizes, in the style of the published ones.

    Args:
        config: the sizes.
        dtype: in which the weights are stored.
        token_ids: ``bos_token_id`` and ``eos_token_id``, as far as they are known.
    """
    sizes = config.model_dump(exclude={"rope_scaling"})
    yarn = config.rope_scaling
    return {
        **{key: allowed[0] for key, allowed in SWITCHES.items()},
        **sizes,
        "num_key_value_heads": config.num_attention_heads,
        "rope_scaling": None if yarn is None else {"type": "yarn", **yarn.model_dump()},
        "attention_dropout": 0.0,
        "torch_dtype": dtype_name(dtype),
        "use_cache": True,
        **token_ids,
    }


def stored_dtype(raw: Mapping[str, Any], source: Path) -> torch.dtype:
    """The dtype a ``config.json`` states for its weights; fp32 where it states none."""
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise InputError(f"{source}: dtype = {shown(name)}: must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as ``config.json`` writes it."""
    return str(dtype).removeprefix("torch.")


def is_fp8(raw: Mapping[str, Any], source: Path) -> bool:
    """Are the linear weights stored in E4M3 with a scale per 128 x 128 block? Any other quantisation is refused."""
    quantisation = raw.get("quantization_config")
    if quantisation is None:
        return False
    if not isinstance(quantisation, dict):
        raise InputError(f"{source}: quantization_config = {shown(quantisation)}: must be an object")
    # Without a block size, transformers means one scale for the whole weight.
    _check_switches({"weight_block_size": None} | quantisation, FP8_SWITCHES, f"{source}: quantization_config.")
    return True


def _check_switches(raw: Mapping[str, Any], switches: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for key, allowed in switches.items():
        value = raw.get(key, allowed[0])
        if not any(value == choice and type(value) is type(choice) for choice in allowed):
            raise InputError(f"{where}{key} = {shown(value)}: must be {' or '.join(map(shown, allowed))}")


def _rope_from_hf(raw: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` from either style: the published one, or transformers 5's."""
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = raw.get(key) or {}
    if not isinstance(rope, dict):
        raise InputError(f"{source}: {key} = {shown(rope)}: must be an object")
    for name in sorted(rope.keys() - ROPE_KEYS):
        raise InputError(f"{source}: {key}.{name} = {shown(rope[name])}: allowed are {', '.join(sorted(ROPE_KEYS))}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise InputError(f'{source}: {key}.type = {shown(kind)}: must be "yarn" or "default"')
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if ("mscale" in rope) != ("mscale_all_dim" in rope):
        raise InputError(f"{source}: {key}: mscale and mscale_all_dim must be given together")
    yarn = {name: rope[name] for name in YarnConfig.model_fields if name in rope}
    return {"rope_theta": theta, "rope_scaling": YARN_DEFAULTS | yarn}
