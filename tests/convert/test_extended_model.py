"""A model whose context was extended says so in its config, and is in transformers what it is here, at any length."""

import json

import pytest
import torch
from doubles import keep_doubles

from benthic import api
from benthic.config.load import load_run_config
from benthic.config.presets import PRESETS
from benthic.config.schema import YarnConfig
from benthic.config.stages import stages
from benthic.convert.config import config_to_hf
from benthic.convert.resolve import current_stage, load_model
from benthic.convert.runs import export_hf
from benthic.model import build_model
from benthic.ops.rope import rope_angles, softmax_scale
from benthic.train import checkpoint

PHASES = [{"sequence_length": 64, "steps": 3}, {"sequence_length": 192, "steps": 3}]
YARN = YarnConfig(factor=6.0, original_max_position_embeddings=32)


@pytest.fixture
def extended(tiny_run_config, make_run):
    # Weights so large that attention matters after a few steps.
    config = tiny_run_config(model={"initializer_range": 0.2}, steps=3, validate_every=100, extend=PHASES)
    out = make_run()
    api.train(config, out)
    return out


@pytest.fixture
def transformers(monkeypatch):
    found = pytest.importorskip("transformers")
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    keep_doubles(monkeypatch)
    return found


@torch.no_grad()
def test_the_exported_model_is_the_same_in_transformers_beyond_its_old_length(extended, transformers, tmp_path):
    export_hf(extended, tmp_path / "hf", torch.float64)
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert raw["rope_scaling"] == {"type": "yarn", **YARN.model_dump()}
    assert raw["max_position_embeddings"] == 192
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float64, experts_implementation="eager"
    )
    ours, config = load_model(extended, torch.float64)
    tokens = torch.randint(config.vocab_size, (2, 192), generator=torch.Generator().manual_seed(0))
    found = ours(tokens)
    torch.testing.assert_close(found, theirs(tokens).logits, rtol=0, atol=1e-9)
    # The comparison would notice a config without YaRN, and one of another factor.
    for yarn in (None, YARN.model_copy(update={"factor": 4.0})):
        other = build_model(config.model_copy(update={"rope_scaling": yarn}), dtype=torch.float64)
        other.load_state_dict(ours.state_dict())
        assert (other(tokens)[:, 32:] - found[:, 32:]).abs().max() > 1e-3


def test_a_run_that_was_stopped_is_the_model_of_the_stage_it_has_reached(extended, tmp_path):
    whole = stages(load_run_config(extended / "config.toml"))
    assert current_stage(extended)[0] == whole[-1]
    (extended / "model").rename(tmp_path / "model")
    for stage in reversed(whole):
        reached, newest = current_stage(extended)
        assert (reached, newest) == (stage, extended / "checkpoints" / stage.name / "step-3")
        model, config = load_model(extended)
        assert model.config == config == stage.config.model
        saved = checkpoint.load(newest).tensors["model"]
        assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
        (extended / "checkpoints" / stage.name).rename(tmp_path / stage.name)


def test_a_later_stage_counts_although_its_files_are_older(extended, tmp_path):
    """A copy of a run has the times of its copying."""
    (extended / "model").rename(tmp_path / "model")
    for name in ("extend-2", "extend-1", "pretrain"):
        manifest = extended / "checkpoints" / name / "step-3" / "manifest.json"
        manifest.write_bytes(manifest.read_bytes())
    assert load_model(extended)[1].rope_scaling == YARN
    assert current_stage(extended)[0].name == "extend-2"


@pytest.mark.parametrize("name", ["v3-671b", "lite-16b", "nano"])
@torch.no_grad()
def test_rotations_and_scale_are_transformers_own(name, transformers):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = PRESETS[name]
    if config.rope_scaling is None:
        length = config.max_position_embeddings
        yarn = YarnConfig(factor=16.0, original_max_position_embeddings=length)
        config = config.model_copy(update={"rope_scaling": yarn, "max_position_embeddings": yarn.reach})
    raw = config_to_hf(config, torch.float32, {})
    rope = {**raw.pop("rope_scaling"), "rope_theta": raw["rope_theta"], "rope_type": "yarn"}
    theirs = transformers.DeepseekV3Config(**{**raw, "rope_parameters": rope})
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    cos, sin = rope_angles(config, torch.tensor([1]))
    torch.testing.assert_close(torch.atan2(sin, cos)[0], frequencies, rtol=1e-6, atol=0)
    assert factor == pytest.approx(1.0)
    torch.testing.assert_close((cos**2 + sin**2).sqrt(), torch.ones_like(cos))
    with torch.device("meta"):
        attention = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention(theirs, 0)
    assert softmax_scale(config) == pytest.approx(attention.scaling, rel=1e-12)
    if name == "v3-671b":
        # sqrt(1/t) = 0.1 ln s + 1, on queries and keys both.
        assert softmax_scale(config) == pytest.approx(192**-0.5 * (0.1 * 3.6888794541139363 + 1) ** 2, rel=1e-12)
