"""Steps that make their drafts first, and what else a step tells, against plain PyTorch."""

import random

import pytest
import torch

from benthic.inference.decode import draft
from benthic.inference.decoded import Ahead
from benthic.inference.native_decode import NativeDecoder
from benthic.inference.paged_cache import PagedCache
from benthic.inference.weights import round_weights
from benthic.precision.quantise import rounded


class Texts:
    """Sequences that have been read, but for their last token; modules still wait for some of their positions."""

    def __init__(self, model, lengths, waiting, depths, seed=0):
        config, generator = model.config, torch.Generator().manual_seed(seed)
        self.cache = PagedCache(config, 40, mtp_layers=1, dtype=torch.float32)
        for layer in self.cache.pages_N:
            layer.normal_(generator=generator)
        self.depths, self.waiting = depths, waiting
        self.ids = [torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
        self.table_SP = torch.randperm(40, generator=generator).int()[: 4 * len(lengths)].view(len(lengths), 4)
        self.states = [torch.randn(count, config.hidden_size, generator=generator) for count in waiting]

    def ahead(self, which):
        hidden, tokens, positions, last, to, row = [], [], [], [], [], 0
        for s in which:
            start = len(self.ids[s]) - 1 - self.waiting[s]
            if self.depths[s]:
                hidden.append(self.states[s])
                tokens += self.ids[s][start + 1 :]
                positions += range(start, start + self.waiting[s])
                last.append(len(positions) - 1)
                to.append(row + 1)
            row += 1 + self.depths[s]
        depths = [self.depths[s] for s in which if self.depths[s]]
        return Ahead(torch.cat(hidden), tokens, positions, last, depths, to)

    def arguments(self, which, drafts):
        """Of a step over the last token of each and these drafts."""
        tokens = [[self.ids[s][-1], *drafts[s]] for s in which]
        positions = [len(self.ids[s]) - 1 + i for s, row in zip(which, tokens, strict=True) for i in range(len(row))]
        table_BP = torch.stack([self.table_SP[s] for s, row in zip(which, tokens, strict=True) for _ in row])
        return torch.tensor([token for row in tokens for token in row]), torch.tensor(positions), table_BP, self.cache

    def nothing(self, which):
        return self.arguments(which, {s: [0] * self.depths[s] for s in which})

    @torch.inference_mode()
    def expected(self, model, s):
        """Drafts by plain PyTorch: the module over all that waits, then on its own output."""
        found, start = [], len(self.ids[s]) - 1 - self.waiting[s]
        hidden_BD, tokens = self.states[s], self.ids[s][start + 1 :]
        for _ in range(self.depths[s]):
            count = len(tokens)
            positions_B = torch.arange(start, start + count)
            table_BP = self.table_SP[s].expand(count, -1)
            hidden_BD = draft(model, 0, hidden_BD, torch.tensor(tokens), positions_B, table_BP, self.cache)[-1:]
            found.append(int(model.transformer.head(hidden_BD[0]).argmax()))
            start, tokens = start + count, found[-1:]
        return found


def texts_of(model, seed, **changes):
    rng = random.Random(seed)
    lengths = [2, 40, 64, 66, 130, 200]
    waiting = [1, *(rng.randint(1, 5) for _ in lengths[1:])]
    depths = [rng.randint(0, 4) for _ in lengths[1:]]
    return Texts(model, lengths, waiting, **{"depths": [2, *depths]} | changes, seed=seed)


@pytest.mark.parametrize("seed", range(8))
def test_a_step_makes_the_drafts_of_the_module_repeated_and_verifies_them(seed, odd_model):
    model = odd_model(seed, num_nextn_predict_layers=1)
    texts, everybody = texts_of(model, seed), range(6)
    expected = {s: texts.expected(model, s) for s in everybody}
    decoder = NativeDecoder(model, threads=1 + seed % 3)
    plain = decoder.step(*texts.arguments(everybody, expected))
    found = decoder.step(*texts.nothing(everybody), texts.ahead(everybody))
    assert found.tokens_B == plain.tokens_B
    assert torch.equal(found.hidden_BD, plain.hidden_BD)
    for a, b in zip(found.logits_B, plain.logits_B, strict=True):
        assert (a.values_V == b.values_V).all()
        assert (a.best, a.peak, a.log_sum) == (b.best, b.peak, b.log_sum)
    assert found.draft_s > 0 == plain.draft_s
    for s in everybody:
        if texts.depths[s]:
            alone = decoder.step(*texts.nothing([s]), texts.ahead([s]))
            assert alone.tokens_B == [texts.ids[s][-1], *expected[s]]


@pytest.mark.parametrize("seed", range(4))
def test_drafts_in_int8_leave_steps_as_they_are_and_are_nearly_the_likeliest(seed, odd_model, close):
    model = odd_model(seed, num_nextn_predict_layers=1)
    texts = texts_of(model, seed, depths=[1] * 6)
    exact, rough = NativeDecoder(model), NativeDecoder(model, draft_precision="int8")
    found = rough.step(*texts.nothing(range(6)), texts.ahead(range(6)))
    drafts = {s: [found.tokens_B[2 * s + 1]] for s in range(6)}
    plain = exact.step(*texts.arguments(range(6), drafts))
    assert torch.equal(found.hidden_BD, plain.hidden_BD)
    model_rounded = round_weights(model, "int8")
    for s in range(6):
        start = len(texts.ids[s]) - 1 - texts.waiting[s]
        positions_B, table_BP = (
            torch.arange(start, len(texts.ids[s]) - 1),
            texts.table_SP[s].expand(texts.waiting[s], -1),
        )
        tokens_B = torch.tensor(texts.ids[s][start + 1 :])
        with torch.inference_mode():
            expected_BD = draft(model_rounded, 0, texts.states[s], tokens_B, positions_B, table_BP, texts.cache)
            hidden_BD = rough.draft(0, texts.states[s], tokens_B, positions_B, table_BP, texts.cache)
            logits_V = model_rounded.transformer.head(hidden_BD[-1])
        close(hidden_BD, expected_BD, 0.05)
        assert logits_V[drafts[s][0]] > logits_V.max() - 0.03 * (logits_V.max() - logits_V.min())


@pytest.mark.parametrize("words", [1, 16, 23, 1000])
def test_drafts_of_few_words_are_the_likeliest_of_these(words, odd_model):
    model = odd_model(1, num_nextn_predict_layers=1)
    texts = texts_of(model, 1, depths=[1] * 6)
    exact, few = NativeDecoder(model), NativeDecoder(model, draft_words=words)
    found = few.step(*texts.nothing(range(6)), texts.ahead(range(6)))
    drafts = {s: [found.tokens_B[2 * s + 1]] for s in range(6)}
    plain = exact.step(*texts.arguments(range(6), drafts))
    assert torch.equal(found.hidden_BD, plain.hidden_BD)
    assert all((a.values_V == b.values_V).all() for a, b in zip(found.logits_B, plain.logits_B, strict=True))
    head_VD = rounded(model.transformer.head.weight.detach(), "int4")[:words]
    for s in range(6):
        start, tokens_B = len(texts.ids[s]) - 1 - texts.waiting[s], torch.tensor(texts.ids[s])
        positions_B = torch.arange(start, len(tokens_B) - 1)
        table_BP = texts.table_SP[s].expand(texts.waiting[s], -1)
        hidden_BD = few.draft(0, texts.states[s], tokens_B[start + 1 :], positions_B, table_BP, texts.cache)
        logits_V = head_VD @ hidden_BD[-1]
        assert drafts[s][0] < words
        # Hidden states are rounded to 8 bits besides.
        assert logits_V[drafts[s][0]] >= logits_V.max() - 0.03 * (logits_V.max() - logits_V.min())


@pytest.mark.parametrize("seed", range(6))
def test_a_step_tells_the_likeliest_token_and_its_log_probability(seed, odd_model, batch_of):
    model = odd_model(seed, vocab_size=[31, 257, 700, 1024, 2000, 16][seed])
    found = NativeDecoder(model, threads=2).step(*batch_of(model, [0, 31, 64, 200], seed).arguments())
    for logits in found.logits_B:
        logits_V = torch.from_numpy(logits.values_V).double()
        assert logits.best == int(logits_V.argmax())
        assert logits.peak == float(logits_V.max())
        for token in (0, logits.best, len(logits_V) - 1):
            assert logits.logprob(token) == pytest.approx(float(logits_V.log_softmax(0)[token]), abs=2e-6)


def test_of_equal_logits_the_first_is_the_likeliest_and_what_is_not_a_number_shows(odd_model, batch_of):
    model = odd_model(1, vocab_size=600)
    batch = batch_of(model, [5, 9])
    with torch.no_grad():
        likeliest = NativeDecoder(model).step(*batch.arguments()).logits_B[0].best
        model.transformer.head.weight[599] = model.transformer.head.weight[likeliest]
    decoder = NativeDecoder(model)
    assert decoder.step(*batch.arguments()).logits_B[0].best == likeliest
    for value in (float("nan"), float("inf"), float("-inf")):
        with torch.no_grad():
            model.transformer.head.weight[3] = value
        assert not any(abs(row.log_sum) < float("inf") for row in decoder.step(*batch.arguments()).logits_B)


@pytest.mark.parametrize("seed", range(6))
def test_experts_that_tokens_chose_are_those_of_the_routers(seed, odd_model, batch_of, latents_of):
    model = odd_model(seed, num_hidden_layers=3)
    config, batch = model.config, batch_of(model, [0, 31, 64, 200], seed)
    layers = config.num_hidden_layers - config.first_k_dense_replace
    experts_BLK = torch.full((4, layers, config.num_experts_per_tok), -1, dtype=torch.int32)
    recorded = NativeDecoder(model, threads=2).step(*batch.arguments(), experts_BLK=experts_BLK)
    plain = NativeDecoder(model, threads=2).step(*batch.arguments())
    assert torch.equal(recorded.hidden_BD, plain.hidden_BD)
    for row in range(4):
        with torch.inference_mode():
            tokens_BT = batch.tokens_B[row].view(1, 1)
            _, routings = model.transformer.hidden(tokens_BT, cache=latents_of(batch.latents[row]))
        expected = [sorted(routing.index[0, 0].tolist()) for routing in routings]
        assert [sorted(chosen) for chosen in experts_BLK[row].tolist()] == expected


@pytest.mark.parametrize(
    "wrong", [torch.zeros(4, 1, 2, dtype=torch.int64), torch.zeros(3, 3, 2, dtype=torch.int32), torch.zeros(4, 3, 2)]
)
def test_room_for_experts_must_fit(wrong, odd_model, batch_of):
    model = odd_model(0, num_hidden_layers=3, first_k_dense_replace=0)
    with pytest.raises(ValueError, match="experts_BLK"):
        NativeDecoder(model).step(*batch_of(model, [1, 2, 3, 4]).arguments(), experts_BLK=wrong)


@pytest.mark.parametrize("what", ["token", "reach", "depth", "row", "last"])
def test_drafts_out_of_range_are_refused_and_nothing_is_written(what, odd_model):
    model = odd_model(2, num_nextn_predict_layers=1)
    texts = Texts(model, [200], [1], [3])
    ahead, step = texts.ahead([0]), texts.nothing([0])
    if what == "token":
        ahead.tokens_R[0] = model.config.vocab_size
    elif what == "reach":
        ahead.positions_R[0] = 254  # the third draft would be of 256, one more than the pages hold
    elif what == "row":
        ahead.to_S[0] = 2  # the last of three drafts would be beyond the step's rows
    elif what == "last":
        ahead.last_S[0] = 1
    else:
        ahead.depth_S[0] = 64
    before = [layer.clone() for layer in texts.cache.pages_N]
    with pytest.raises(IndexError):
        NativeDecoder(model).step(*step, ahead)
    assert all(torch.equal(a, b) for a, b in zip(before, texts.cache.pages_N, strict=True))
