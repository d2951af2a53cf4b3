"""Native decode steps against plain PyTorch, and against themselves in other company."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benthic.config.presets import PRESETS
from benthic.inference.native_decode import CannotDecodeNatively, NativeDecoder
from benthic.inference.weights import round_weights
from benthic.model import build_model
from benthic.model.transformer import attention_context
from benthic.ops import native

OPENMP_CAN_PAUSE = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "omp_pause_resource_all")
LENGTHS = [0, 1, 5, 31, 32, 33, 63, 64, 65, 127, 130, 520, 1100]


def threads_here():
    """Of this process, where the system tells."""
    tasks = Path("/proc/self/task")
    return set(tasks.iterdir()) if tasks.exists() else set()


def keep_openmp_threads():
    """Let an operation of PyTorch be shared out, so that OpenMP has threads; returns those it has started."""
    count = torch.get_num_threads()
    torch.set_num_threads(3)  # which may start threads of other pools
    before = threads_here()
    torch.zeros(2**20).exp_()
    started = threads_here() - before
    torch.set_num_threads(count)
    return started


@pytest.mark.parametrize("seed", range(14))
def test_equals_the_transformer_over_caches_of_many_lengths(seed, odd_model, batch_of, close):
    model = odd_model(seed)
    batch = batch_of(model, LENGTHS, seed)
    logits_BV, hidden_BD = NativeDecoder(model, threads=1 + seed % 3)(*batch.arguments())
    expected_BV, expected_BD = batch.expected(model)
    close(logits_BV, expected_BV)
    close(hidden_BD, expected_BD)


@pytest.mark.parametrize("preset", ["tiny", "nano"])
def test_writing_token_by_token_equals_a_full_forward(preset, batch_of, close):
    model = build_model(PRESETS[preset], seed=1)
    tokens_BT = torch.randint(model.config.vocab_size, (2, 140), generator=torch.Generator().manual_seed(0))
    batch = batch_of(model, [140, 140])
    decoder = NativeDecoder(model, threads=2)
    for layer in batch.cache.pages_N:
        layer.fill_(float("nan"))
    logits = [
        decoder(tokens_B, torch.full((2,), position), batch.table_BP, batch.cache)[0]
        for position, tokens_B in enumerate(tokens_BT.T)
    ]
    with torch.inference_mode():
        close(torch.stack(logits, 1), model(tokens_BT))


@pytest.mark.parametrize("seed", range(4))
def test_a_row_is_the_same_bits_in_any_batch_on_any_number_of_threads(seed, odd_model, batch_of):
    model = odd_model(seed)
    lengths = [*LENGTHS, 300, 64, 7, 0]
    decoder = NativeDecoder(model, threads=2)
    whole = decoder(*batch_of(model, lengths, seed).arguments())
    for threads in (1, 3):
        again = NativeDecoder(model, threads=threads)(*batch_of(model, lengths, seed).arguments())
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    batch = batch_of(model, lengths, seed)
    for rows in ([0], [4], [11], [12], [3, 12], [16, 1, 9], [5, 6, 7, 8], list(range(2, 11))):
        for found, expected in zip(decoder(*batch.arguments(*rows)), whole, strict=True):
            assert torch.equal(found, expected[rows])


@pytest.mark.parametrize("wanted", [[], [5], [12, 0, 3], list(range(13))])
def test_logits_of_some_rows_are_the_same_bits(wanted, odd_model, batch_of):
    model, rows_W = odd_model(3), torch.tensor(wanted, dtype=torch.int64)
    decoder, batch = NativeDecoder(model, threads=2), batch_of(model, LENGTHS, 3)
    logits_BV, hidden_BD = decoder(*batch.arguments())
    some_WV, same_BD = decoder(*batch.arguments(), wanted_W=rows_W)
    assert torch.equal(some_WV, logits_BV[rows_W])
    assert torch.equal(same_BD, hidden_BD)
    with pytest.raises(IndexError, match="rows of 0 to 12"):
        decoder(*batch.arguments(), wanted_W=torch.tensor([2, 13]))


def test_a_sequence_in_several_rows_reads_as_one_token_after_another(odd_model, batch_of):
    model = odd_model(2)
    decoder, tokens_B = NativeDecoder(model, threads=2), torch.tensor([3, 9, 4, 1])
    one, other = batch_of(model, [62 + 4], 5), batch_of(model, [62 + 4], 5)
    table_BP, positions_B = one.table_BP.expand(4, -1), torch.arange(62, 66)
    together = decoder(tokens_B, positions_B, table_BP, one.cache)
    for row in range(4):
        alone = decoder(tokens_B[row : row + 1], positions_B[row : row + 1], other.table_BP, other.cache)
        for found, expected in zip(together, alone, strict=True):
            assert torch.equal(found[row], expected[0])
    for found, expected in zip(one.cache.pages_N, other.cache.pages_N, strict=True):
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("seed", [0, 1])
def test_bf16_weights_and_latents(seed, odd_model, batch_of, close):
    narrow = odd_model(seed, dtype=torch.bfloat16)
    wide = odd_model(seed)
    wide.load_state_dict({name: value.float() for name, value in narrow.state_dict().items()})
    batch = batch_of(wide, LENGTHS, seed)
    batch.latents = [latents.bfloat16().float() for latents in batch.latents]
    expected_BV, _ = batch.expected(wide)
    rounded = batch_of(wide, LENGTHS, seed, dtype=torch.bfloat16)
    logits_BV, _ = NativeDecoder(narrow, threads=2)(*rounded.arguments())
    # Only the new token's own latent is rounded besides.
    close(logits_BV, expected_BV, 1e-2)
    in_fp32 = batch_of(wide, LENGTHS, seed)
    close(NativeDecoder(narrow)(*in_fp32.arguments())[0], batch_of(wide, LENGTHS, seed).expected(wide)[0])


@pytest.mark.parametrize("seed", range(6))
def test_latents_in_fp8(seed, odd_model, batch_of, close):
    model = odd_model(seed, kv_lora_rank=[3, 75, 128, 131, 300, 512][seed])
    exact, rounded = batch_of(model, LENGTHS, seed), batch_of(model, LENGTHS, seed, dtype=torch.float8_e4m3fn)
    exact.latents = [rounded.format.rounded(latents) if latents.numel() else latents for latents in exact.latents]
    decoder = NativeDecoder(model, threads=1 + seed % 3)
    logits_BV, hidden_BD = decoder(*rounded.arguments())

    def written(row):
        """What the step has kept of a row's token: what the reference would keep, but for ties of its last bits."""
        page, slot = rounded.table_BP[row, LENGTHS[row] // 64], LENGTHS[row] % 64

        def of(layer, latent_TL):
            found_TL = rounded.format.unpack(rounded.cache.pages_N[layer][page, slot][None])
            most = latent_TL.abs().max()
            assert ((found_TL - latent_TL).abs() <= latent_TL.abs() / 15 + most / 448 / 1000).all()
            return found_TL

        return of

    expected_BV, expected_BD = exact.expected(model, written)
    close(logits_BV, expected_BV)
    close(hidden_BD, expected_BD)
    again = batch_of(model, LENGTHS, seed, dtype=torch.float8_e4m3fn)
    for row in range(len(LENGTHS)):
        assert torch.equal(decoder(*again.arguments(row))[0][0], logits_BV[row])


@pytest.mark.parametrize("precision", [None, "fp8"])
@pytest.mark.parametrize("seed", range(4))
def test_drafts_are_those_of_the_mtp_modules(seed, precision, odd_model, batch_of, latents_of, close):
    model = odd_model(seed, num_nextn_predict_layers=2)
    batch = batch_of(model, [0, 5, 64, 200], seed)
    decoder = NativeDecoder(model, precision=precision, threads=2)
    round_weights(model, precision or "fp32")
    for module in range(2):
        layer = model.config.num_hidden_layers + module
        hidden_BD = torch.randn(4, model.config.hidden_size)
        found_BD = decoder.draft(module, hidden_BD, *batch.arguments())
        alone_BD = decoder.draft(module, hidden_BD[2:3], *batch.arguments(2))
        assert torch.equal(found_BD[2], alone_BD[0])
        for row in range(4):
            cache = latents_of(batch.latents[row])
            with torch.inference_mode():
                tokens_BT = batch.tokens_B[row].view(1, 1)
                expected, _ = model.mtp[module](
                    hidden_BD[row].view(1, 1, -1), model.transformer.embed(tokens_BT),
                    attention_context(model.config, tokens_BT, cache=cache),
                )  # fmt: skip
            close(found_BD[row], expected[0, 0])
            written = batch.cache.pages_N[layer][batch.table_BP[row, cache.length // 64], cache.length % 64]
            close(written, cache.latents_NSL[layer][-1])


def test_what_is_not_a_number_stays_so(odd_model, batch_of):
    model = odd_model(1)
    batch = batch_of(model, [10, 10, 70])
    batch.cache.pages_N[0][batch.table_BP[1, 0], 4, 0] = float("nan")
    logits_BV, _ = NativeDecoder(model)(*batch.arguments())
    assert logits_BV.isnan().all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("tokens", "position", "page"), [(-1, 3, 0), (99, 3, 0), (0, -1, 0), (0, 64, 0), (0, 3, -1), (0, 3, 3)]
)
def test_what_is_out_of_range_is_refused(tokens, position, page, odd_model, batch_of):
    model = odd_model(1)
    cache = batch_of(model, [3]).cache
    before = [layer.clone() for layer in cache.pages_N]
    with pytest.raises(IndexError):
        NativeDecoder(model)(torch.tensor([tokens]), torch.tensor([position]), torch.tensor([[page]]), cache)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, cache.pages_N, strict=True))


def test_long_positions_have_their_rotations(odd_model, batch_of, close):
    model = odd_model(1)
    batch = batch_of(model, [4095, 5000])
    close(NativeDecoder(model, threads=2)(*batch.arguments())[0], batch.expected(model)[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_decodes_too(odd_model, batch_of):
    model = odd_model(1)
    decoder = NativeDecoder(model, threads=2)
    expected_BV, _ = decoder(*batch_of(model, [70]).arguments())
    batch = batch_of(model, [70])
    keep_openmp_threads()
    child = os.fork()
    if child == 0:
        # Of PyTorch, nothing that is shared out: OpenMP waits for ever for threads that stayed with the parent.
        os._exit(0 if torch.equal(decoder(*batch.arguments())[0], expected_BV) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(decoder(*batch_of(model, [70]).arguments())[0], expected_BV)


DECODES_FIRST_IN_A_CHILD = """
import os
import torch
torch.set_num_threads(3)
torch.zeros(2**20).exp_()
child = os.fork()
if child:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
torch.set_num_threads(1)
from benthic.config.presets import PRESETS
from benthic.inference.native_decode import NativeDecoder
from benthic.inference.paged_cache import PagedCache
from benthic.model import build_model
model = build_model(PRESETS["tiny"])
cache = PagedCache(model.config, 2, dtype=torch.float32)
NativeDecoder(model, threads=2)(torch.tensor([1]), torch.tensor([0]), torch.tensor([[0]]), cache)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_that_first_loads_the_library_does_not_wait_for_its_parents_threads():
    subprocess.run([sys.executable, "-c", DECODES_FIRST_IN_A_CHILD], check=True, timeout=120)


@pytest.mark.skipif(not OPENMP_CAN_PAUSE, reason="needs OpenMP 5.0 and Linux")
def test_pytorchs_threads_do_not_spin_beside_a_step(odd_model, batch_of):
    model = odd_model(1)
    decoder = NativeDecoder(model, threads=2)
    batch = batch_of(model, [70])
    decoder(*batch.arguments())
    kept = keep_openmp_threads()
    assert kept
    decoder(*batch.arguments())
    # A thread that has ended stays for a moment.
    deadline = time.monotonic() + 5
    while kept & threads_here() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not kept & threads_here()


def test_without_the_library_there_is_none_and_a_reason(monkeypatch, odd_model):
    native.decode_library.cache_clear()
    monkeypatch.setenv("BENTHIC_NATIVE", "0")
    try:
        with pytest.raises(CannotDecodeNatively, match="BENTHIC_NATIVE"):
            NativeDecoder(odd_model(1))
    finally:
        native.decode_library.cache_clear()


def test_a_model_in_float64_is_left_to_pytorch(odd_model):
    with pytest.raises(CannotDecodeNatively, match="fp32 or bf16"):
        NativeDecoder(odd_model(1, dtype=torch.float64))
