"""Decode steps in C++: all layers of one new token for each of several sequences in one call.

A step of plain PyTorch is some fifty operations a layer, each of which is dispatched, wakes its threads and waits for
them. Here one call reads every weight once, by threads that stay between calls (``benthic/ops/native/decode``).

A sequence's results are the same bits whatever else is in the batch, and however many threads there are: every sum is
made in one order. So are those of a sequence that stands in several rows with consecutive positions, as for the
verification of drafts: each row sees the latents of the rows before it.

Shapes: B rows, P pages of the longest sequence, D model width, V vocabulary, H heads, C latent, S stacked matrices,
M rows and K columns of a matrix.
"""

import ctypes
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from benthic.errors import WorkFailed
from benthic.inference.decoded import Ahead, Decoded
from benthic.inference.huge_pages import use_huge_pages
from benthic.inference.native_layout import DraftRequest, Layer, Matrix, Model, Request, check_layout
from benthic.inference.paged_cache import PAGE
from benthic.inference.sampling import Logits
from benthic.inference.weights import block_matrices, blocks_of, mtp_modules
from benthic.model import LanguageModel
from benthic.model.layers import RMSNorm
from benthic.model.moe import MoE
from benthic.model.mtp import MTPModule
from benthic.model.transformer import Block
from benthic.ops import native
from benthic.ops.rope import rope_angles
from benthic.precision.blocks import quantise_blocks
from benthic.precision.panels import pack_panels
from benthic.precision.quantise import Precision, bits_of, head_precision, quantise_groups

_FIRST_ANGLES = 4096
_Array: TypeAlias = ctypes.Array[Any]
_KINDS = {torch.float32: Matrix.FP32, torch.bfloat16: Matrix.BF16}
_PAGE_KINDS = _KINDS | {torch.uint8: Matrix.FP8}


class Pages(Protocol):
    """What a step asks of a paged cache."""

    pages_N: list[Tensor]
    """For each layer (pages, 64, latent), contiguous, fp32 or bf16, or rows of bytes in FP8 (precision/latents.py)."""


class CannotDecodeNatively(WorkFailed):
    """There is no native decoding here, or not of this model; the message says why."""


class NativeDecoder:
    """Decodes with one model, whose weights must not change or move as long as this lives.

    Args:
        model: on the CPU, fp32 or bf16. Its weights are used where they are; the key and value projections of
            attention, less than a tenth of them, are kept once more, as the absorbed form wants them.
        precision: that the weights are kept in, beside the model's own; by default the one they have. The model stays
            as it is: :func:`benthic.inference.weights.round_weights`, called afterwards, lets prefill compute with
            the same numbers. In ``int8`` and ``int4`` activations are rounded to 8 bits besides, in groups of 32.
        draft_precision: that MTP modules, and a copy of the head for them, are kept in; by default like all the rest.
            What they say is only a guess, which costs the less the fewer bits are read for it.
        draft_words: the head's copy has only so many of the first words of the vocabulary, and those in ``int4``;
            nothing else is ever drafted within a step.
        threads: at work in a step; by default as many as PyTorch uses.

    Raises:
        CannotDecodeNatively: there is no compiler, or the model is elsewhere or in another dtype.
        WorkFailed: in ``fp8``, a weight is not finite.
    """

    def __init__(
        self, model: LanguageModel, *, precision: Precision | None = None, draft_precision: Precision | None = None,
        draft_words: int | None = None, threads: int | None = None,
    ) -> None:  # fmt: skip
        library, self.name = native.decode_library()
        if library is None:
            raise CannotDecodeNatively(self.name)
        check_layout(library)
        self._weights = _Weights(model, precision, draft_precision, draft_words)
        blocks = blocks_of(model)[: model.config.num_hidden_layers]
        self._sparse_layers = sum(isinstance(block.ffn, MoE) for block in blocks)
        self.drafts = len(model.mtp) == 1
        """Whether steps can make drafts: with one MTP module."""
        self._library, self._config = library, model.config
        self._lock = threading.Lock()
        library.decode_new.restype = ctypes.c_void_p
        self._decoder = library.decode_new(
            ctypes.byref(self._weights.model), ctypes.c_int64(threads or torch.get_num_threads())
        )
        weakref.finalize(self, library.decode_free, ctypes.c_void_p(self._decoder))
        self._cos_TP = self._sin_TP = torch.empty(0, 0, dtype=torch.float32)

    def __call__(
        self, tokens_B: Tensor, positions_B: Tensor, table_BP: Tensor, cache: Pages, experts_BLK: Tensor | None = None,
        wanted_W: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One new token for each row: logits (B, V) and hidden states (B, D) after the final norm, both fp32.

        Args:
            tokens_B: int64, the new tokens.
            positions_B: int64, their positions, which are the tokens cached before them.
            table_BP: int32, page numbers of each row's sequence in order; unused entries are not looked at.
            cache: receives the new latents.
            experts_BLK: int32, contiguous, over the layers that have experts: receives those each token chose.
            wanted_W: rows whose logits, then (W, V), are asked for; by default all.

        Raises:
            IndexError: a token, a position, a page or a row is out of range; the cache is as before.
            ValueError: ``experts_BLK`` has another shape or type.
        """
        outputs, count = self._recorded(experts_BLK, len(tokens_B)), len(tokens_B)
        if wanted_W is not None:
            wanted_W, count = wanted_W.int().contiguous(), len(wanted_W)
            if count and not 0 <= int(wanted_W.min()) <= int(wanted_W.max()) < len(tokens_B):
                raise IndexError(f"wanted_W: rows of 0 to {len(tokens_B) - 1}")
            outputs["head_rows"] = wanted_W
        logits_BV = torch.empty(count, self._config.vocab_size, dtype=torch.float32)
        if count:
            outputs["logits"] = logits_BV
        hidden_BD = outputs["hidden"] = torch.empty(len(tokens_B), self._config.hidden_size, dtype=torch.float32)
        self._run(tokens_B, positions_B, table_BP, cache, outputs=outputs)
        return logits_BV, hidden_BD

    def _recorded(self, experts_BLK: Tensor | None, batch: int) -> dict[str, Tensor]:
        if experts_BLK is None:
            return {}
        shape = (batch, self._sparse_layers, self._config.num_experts_per_tok)
        if experts_BLK.shape != shape or experts_BLK.dtype != torch.int32 or not experts_BLK.is_contiguous():
            raise ValueError(f"experts_BLK: must be contiguous int32 {shape}")
        return {"experts": experts_BLK}

    def step(
        self, tokens_B: Tensor, positions_B: Tensor, table_BP: Tensor, cache: Pages, ahead: Ahead | None = None,
        experts_BLK: Tensor | None = None,
    ) -> Decoded:  # fmt: skip
        """The same, with what it takes to choose the next tokens, and with drafts if they are asked for.

        Args:
            tokens_B: as for a call; those that drafts become are not looked at, but for being in range.
            positions_B: as for a call. table_BP: as for a call. cache: as for a call.
            ahead: drafts to make first. They are the same whatever else is in the step.
            experts_BLK: as for a call, whose errors it raises.
        """
        batch = tokens_B.shape[0]
        outputs: dict[str, Tensor | _Array] = {**self._recorded(experts_BLK, batch)}
        hidden_BD = outputs["hidden"] = torch.empty(batch, self._config.hidden_size, dtype=torch.float32)
        logits_BV = outputs["logits"] = torch.empty(batch, self._config.vocab_size, dtype=torch.float32)
        best_B = outputs["best"] = (ctypes.c_int64 * batch)()
        peak_B, log_sum_B = outputs["peak"], outputs["log_sum"] = (ctypes.c_float * batch)(), (ctypes.c_float * batch)()
        drafts = _Drafts(ahead, self._config.num_hidden_layers, self._weights.norms[1]) if ahead else None
        tokens_B = tokens_B.clone() if drafts else tokens_B
        self._run(tokens_B, positions_B, table_BP, cache, outputs=outputs, drafts=drafts)
        numbers = zip(logits_BV.numpy(), best_B, peak_B, log_sum_B, strict=True)
        return Decoded(
            tokens_B.tolist(), [Logits(*row) for row in numbers], hidden_BD, drafts.request.seconds if drafts else 0.0
        )

    def draft(
        self, module: int, hidden_BD: Tensor, tokens_B: Tensor, positions_B: Tensor, table_BP: Tensor, cache: Pages
    ) -> Tensor:
        """One step of an MTP module for each row: its hidden states (B, D), ready for the head.

        Args:
            module: index of the module, whose latents lie in layer ``num_hidden_layers + module`` of the cache.
            hidden_BD: what the head sees at each position, from the transformer or the module before.
            tokens_B: int64, the token that the module joins to it.
            positions_B: int64, the index of the hidden state in its sequence.
            table_BP: as for a step. cache: as for a step.
        """
        out_BD = torch.empty(len(tokens_B), self._config.hidden_size, dtype=torch.float32)
        previous_BD = _as(hidden_BD, torch.float32)
        self._run(
            tokens_B, positions_B, table_BP, cache, module=module, outputs={"hidden": out_BD, "previous": previous_BD}
        )
        return out_BD

    def _run(
        self, tokens_B: Tensor, positions_B: Tensor, table_BP: Tensor, cache: Pages, *,
        outputs: Mapping[str, Tensor | _Array], module: int | None = None, drafts: "_Drafts | None" = None,
    ) -> None:  # fmt: skip
        """A step of the transformer or of an MTP module. ``outputs`` are the request's pointers to float and others."""
        layers = self._config.num_hidden_layers
        first, last = (0, layers) if module is None else (layers + module, layers + module + 1)
        norm, pages = self._weights.norms[0 if module is None else 1 + module], cache.pages_N[first]
        # Held by name until the step is done: what follows may be copies.
        tokens_B, positions_B = _as(tokens_B, torch.int64), _as(positions_B, torch.int64)
        table_BP = _as(table_BP, torch.int32)
        width = table_BP.shape[1]
        with self._lock:
            self._reach(width * PAGE)
            request = Request(
                batch=tokens_B.shape[0], first=first, last=last, tokens=_pointer(tokens_B),
                positions=_pointer(positions_B), table=_pointer(table_BP), table_stride=width,
                pages=_addresses(cache.pages_N), page_count=pages.shape[0], page_kind=_PAGE_KINDS[pages.dtype],
                cos=_pointer(self._cos_TP), sin=_pointer(self._sin_TP), angles=self._cos_TP.shape[0],
                norm=_pointer(norm),
                head_count=len(outputs.get("head_rows", ())),
                **{name: _pointer(tensor) for name, tensor in outputs.items()},
            )  # fmt: skip
            ahead = drafts and ctypes.byref(drafts.request)
            if self._library.decode_step(ctypes.c_void_p(self._decoder), ctypes.byref(request), ahead):
                raise IndexError("decode: a token, a position or a page is out of range")

    def _reach(self, positions: int) -> None:
        """Have the rotations of so many positions."""
        if positions > self._cos_TP.shape[0]:
            count = max(_FIRST_ANGLES, 2 * positions)
            self._cos_TP, self._sin_TP = (x.contiguous() for x in rope_angles(self._config, torch.arange(count)))


class _Drafts:
    """What a step is told of the drafts to make first, and what has to stay alive for it."""

    def __init__(self, ahead: Ahead, layer: int, norm: Tensor) -> None:
        self._hidden_RD = _as(ahead.hidden_RD, torch.float32)
        # A tensor takes several times as long to be made, and a step of a small model is over in 0.2 ms.
        self._tokens_R, self._positions_R = (_array(ctypes.c_int64, x) for x in (ahead.tokens_R, ahead.positions_R))
        self._last_S, self._depth_S, self._to_S = (
            _array(ctypes.c_int32, x) for x in (ahead.last_S, ahead.depth_S, ahead.to_S)
        )
        self.request = DraftRequest(
            layer=layer, rows=len(ahead.tokens_R), tokens=ctypes.addressof(self._tokens_R),
            previous=_pointer(self._hidden_RD), positions=ctypes.addressof(self._positions_R),
            norm=_pointer(norm), sequences=len(ahead.last_S),
            last=ctypes.addressof(self._last_S), depth=ctypes.addressof(self._depth_S),
            to=ctypes.addressof(self._to_S),
        )  # fmt: skip


class _Weights:
    """A model's weights as the library reads them, and whatever has to stay alive for it."""

    def __init__(
        self, model: LanguageModel, precision: Precision | None, draft_precision: Precision | None,
        draft_words: int | None,
    ) -> None:  # fmt: skip
        if any(p.device.type != "cpu" or p.dtype not in _KINDS for p in model.parameters()):
            raise CannotDecodeNatively("PyTorch decoding (the model is not on the CPU in fp32 or bf16)")
        self._precision: Precision | None = precision
        self._kept: list[Tensor] = []
        modules = mtp_modules(model)
        norms = [model.transformer.norm, *(mtp.norm for mtp in modules)]
        self.norms = [norm.weight.detach().float() for norm in norms]
        blocks, count = blocks_of(model), model.config.num_hidden_layers
        layers = [self._layer(block) for block in blocks[:count]]
        config, embed = model.config, self._as_it_is(model.transformer.embed.weight.detach())
        head_1VD = model.transformer.head.weight.detach()[None]
        head = self._matrix(head_1VD, precision and head_precision(precision))
        # From here on, what drafts are made with.
        self._precision = draft_precision or precision
        for block, mtp in zip(blocks[count:], modules, strict=True):
            layers.append(self._layer(block))
            self._add_projection(layers[-1], mtp)
        draft_head = Matrix()
        if modules and (draft_words or draft_precision):
            draft_head = self._matrix(head_1VD[:, :draft_words], "int4" if draft_words else draft_precision)
        self._layers = (Layer * len(layers))(*layers)
        self.model = Model(
            layers=ctypes.cast(self._layers, ctypes.c_void_p), embed=embed, head=head, draft_head=draft_head,
            width=config.hidden_size,
            heads=config.num_attention_heads, q_rank=config.q_lora_rank or 0, c=config.kv_lora_rank,
            nope=config.qk_nope_head_dim, rope=config.qk_rope_head_dim, value=config.v_head_dim,
            groups=config.n_group, top_groups=config.topk_group, top_k=config.num_experts_per_tok,
            normalise=config.norm_topk_prob, eps=config.rms_norm_eps, latent_eps=blocks[0].attention.kv_norm.eps,
            softmax_scale=blocks[0].attention.scale, gate_scale=config.routed_scaling_factor,
        )  # fmt: skip
        use_huge_pages(self._kept)

    def _layer(self, block: Block) -> Layer:
        layer = Layer(attention_norm=self._norm(block.attention_norm), ffn_norm=self._norm(block.ffn_norm))
        layer.kv_norm = self._norm(block.attention.kv_norm)
        if block.attention.config.q_lora_rank is not None:
            layer.q_norm = self._norm(block.attention.q_norm)
        for name, weight_SMK in block_matrices(block).items():
            setattr(layer, name, self._matrix(weight_SMK, self._precision))
        if isinstance(block.ffn, MoE):
            layer.router = self._as_it_is(block.ffn.router.weight.detach().float())
            layer.router_bias = self._keep(block.ffn.router.bias)
        return layer

    def _add_projection(self, layer: Layer, mtp: MTPModule) -> None:
        layer.embed_norm, layer.hidden_norm = self._norm(mtp.embed_norm), self._norm(mtp.hidden_norm)
        layer.project = self._matrix(mtp.project.weight.detach().unsqueeze(0), self._precision)

    def _matrix(self, weight_SMK: Tensor, precision: Precision | None) -> Matrix:
        match precision:
            case "fp8":
                return self._blocks(weight_SMK)
            case "int8" | "int4":
                return self._panels(weight_SMK, precision)
            case _:
                dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, None: weight_SMK.dtype}[precision]
                return self._as_it_is(weight_SMK.to(dtype))

    def _as_it_is(self, weight_SMK: Tensor) -> Matrix:
        """A weight (M, K) or a stack of them (S, M, K), where it is if it is contiguous."""
        rows, columns = weight_SMK.shape[-2:]
        data = self._keep(weight_SMK.contiguous())
        return Matrix(data=data, kind=_KINDS[weight_SMK.dtype], rows=rows, columns=columns)

    def _blocks(self, weight_SMK: Tensor) -> Matrix:
        # A matrix at a time: quantising all of a stack at once would take several times its memory.
        numbers, scales = zip(*(quantise_blocks(weight_MK) for weight_MK in weight_SMK), strict=True)
        numbers_SMK, scale_SPQ = torch.stack(numbers), torch.stack(scales)
        if not scale_SPQ.isfinite().all():
            raise WorkFailed("fp8: a weight is not finite")
        return Matrix(
            data=self._keep(numbers_SMK), scales=self._keep(scale_SPQ), kind=Matrix.FP8, rows=weight_SMK.shape[1],
            columns=weight_SMK.shape[2],
        )  # fmt: skip

    def _panels(self, weight_SMK: Tensor, precision: Literal["int8", "int4"]) -> Matrix:
        bits = bits_of(precision)
        panels = []
        for weight_1MK in weight_SMK.split(1):
            numbers_1MK, scale_1MG = quantise_groups(weight_1MK, bits)
            panels.append(pack_panels(numbers_1MK, scale_1MG, bits))
        kind = Matrix.INT8 if bits == 8 else Matrix.INT4
        return Matrix(
            data=self._keep(torch.cat(panels)), kind=kind, rows=weight_SMK.shape[1], columns=weight_SMK.shape[2]
        )

    def _norm(self, norm: RMSNorm) -> int:
        return self._keep(norm.weight.detach().float().contiguous())

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In this type and contiguous; to ask for a type that a tensor has costs two microseconds of a small step."""
    return (tensor if tensor.dtype == dtype else tensor.to(dtype)).contiguous()


def _array(kind: type[ctypes.c_int32] | type[ctypes.c_int64], numbers: Sequence[int]) -> _Array:
    return (kind * len(numbers))(*numbers)


def _pointer(numbers: Tensor | _Array | None) -> int | None:
    if numbers is None:
        return None
    return numbers.data_ptr() if isinstance(numbers, Tensor) else ctypes.addressof(numbers)


def _addresses(tensors: Sequence[Tensor]) -> "ctypes.Array[ctypes.c_void_p]":
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
