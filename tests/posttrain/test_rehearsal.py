"""MTP modules go on learning to draft what the model below them says, while that learns something else."""

import itertools
import json

import pytest
import torch

from benthic.config.presets import PRESETS
from benthic.config.schema import RunConfig
from benthic.data.batches import Batch
from benthic.model import build_model
from benthic.posttrain.rehearsal import rehearse
from benthic.train.checkpoint import load
from benthic.train.metrics import read_metrics


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("depths", [1, 2])
def test_the_gradients_are_those_of_drafts_that_differ_from_what_the_model_says(depths, documents):
    """Each draft from a pass of its own, and what the model says there from one that reads on to that place."""
    config = PRESETS["tiny"].model_copy(update={"num_nextn_predict_layers": depths})
    model = build_model(config, seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    tokens_BS = torch.randint(0, config.vocab_size, (3, 20), generator=generator)
    document_BS = torch.tensor([0] * 9 + [1] * 11).expand(3, -1) if documents else None
    learn_BS = torch.rand(3, 20, generator=generator) < 0.4 if documents else None
    length, head_VD, nats = 20 - 1 - depths, model.transformer.head.weight.detach(), []
    drafts, _ = model.training_hidden(tokens_BS[:, :-1], None if document_BS is None else document_BS[:, :-1])
    for depth in range(1, 1 + depths):
        distances = []
        for row, place in itertools.product(range(3), range(length)):
            drafted = place + 1 + depth
            if documents and not (learn_BS[row, drafted] and document_BS[row, drafted] == document_BS[row, place]):
                continue
            first = 9 if documents and place >= 9 else 0
            with torch.no_grad():
                says_TV = model(tokens_BS[row : row + 1, first:drafted])[0].log_softmax(-1)
            draft_V = (drafts[depth][row, place] @ head_VD.T).log_softmax(-1)
            distances.append((says_TV[-1].exp() * (says_TV[-1] - draft_V)).sum())
        nats.append(torch.stack(distances).mean())
    parameters = list(model.mtp.parameters())
    expected = torch.autograd.grad(0.7 * torch.stack(nats).mean(), parameters, allow_unused=True)
    found_J = rehearse(model, Batch(tokens_BS, document_BS, learn_BS), 0.7, "fp32")
    torch.testing.assert_close(found_J, torch.stack(nats).detach())
    assert any(gradient is not None and gradient.any() for gradient in expected)
    for parameter, gradient in zip(parameters, expected, strict=True):
        if gradient is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-9, rtol=1e-6)
    assert all(parameter.grad is None for parameter in model.transformer.parameters())


def test_modules_learn_to_draft_what_the_model_says():
    """Not what stands in the text: that is random here."""
    model = build_model(PRESETS["tiny"], seed=3)
    model.transformer.head.weight.data.mul_(10)  # so that it prefers some words
    optimizer = torch.optim.AdamW(model.mtp.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(4)
    distances = []
    for _ in range(40):
        tokens_BS = torch.randint(0, 8, (4, 30), generator=generator)
        distances.append(float(rehearse(model, Batch(tokens_BS, None), 1.0, "fp32")))
        optimizer.step()
        optimizer.zero_grad()
    assert sum(distances[-5:]) < 0.5 * sum(distances[:5])


@pytest.mark.parametrize("sequences", [0, 2])
def test_conversations_are_those_of_fine_tuning(sft_config, make_sft_run, run_all, tmp_path, sequences):
    """Of a run with both stages; without rewards, nothing but the modules moves, and without rehearsal less of them."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"{n}", "answer": "never that"}) + "\n" for n in range(20)))
    rl = {
        "problems": [{"file": str(problems)}], "steps": 2, "prompts": 2, "group_size": 2, "max_new_tokens": 2,
        "held_out": 4, "kl_weight": 0.0, "mtp_loss_weight": 0.3, "mtp_rehearsal": sequences, "learning_rate": 1e-3,
    }  # fmt: skip
    settings = sft_config().model_dump(mode="json")
    config = RunConfig.model_validate({**settings, "posttrain": {**settings["posttrain"], "rl": rl}})
    out = make_sft_run()
    run_all(config, out)
    rows = [row for row in read_metrics(out / "metrics.jsonl", "rl") if "loss" in row]
    assert [len(row.get("rehearsal", [])) for row in rows] == [int(sequences > 0)] * 2
    before = load(max((out / "checkpoints" / "sft").iterdir(), key=lambda path: int(path.name[5:]))).tensors["model"]
    after = load(out / "checkpoints" / "rl" / "step-2").tensors["model"]
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.startswith("mtp.") for name in moved)


def test_fine_tuning_rehearses_the_text_of_pretraining(sft_config, make_sft_run, run_all):
    """Of a step without clipping, which is over all weights together: nothing but the modules becomes other by it."""
    models, flops = {}, {}
    for sequences in (0, 2):
        train = {"optimizer": {"learning_rate": 3e-3, "clip_norm": 1e9}}
        config = sft_config(train, mtp_rehearsal=sequences, steps=1, validate_every=1, checkpoint_every=1)
        out = make_sft_run(f"sequences-{sequences}")
        run_all(config, out)
        rows = [row for row in read_metrics(out / "metrics.jsonl", "sft") if "loss" in row]
        assert [len(row.get("rehearsal", [])) for row in rows] == [int(sequences > 0)]
        models[sequences] = load(out / "checkpoints" / "sft" / "step-1").tensors["model"]
        flops[sequences] = json.loads((out / "ledger.json").read_text())["stages"]["sft"]["flops"]
    other = {name for name, tensor in models[0].items() if not torch.equal(tensor, models[2][name])}
    assert other
    assert all(name.startswith("mtp.") for name in other)
    assert flops[2] > flops[0]
