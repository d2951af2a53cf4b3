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
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from benthic.config.schema import ModelConfig
from benthic.errors import WorkFailed
from benthic.inference.huge_pages import use_huge_pages
from benthic.inference.native_layout import Layer, Matrix, Model, Request, check_layout
from benthic.model import LanguageModel
from benthic.model.layers import SwiGLU
from benthic.model.mla import LatentAttention
from benthic.model.moe import MoE
from benthic.model.mtp import MTPModule
from benthic.model.transformer import Block
from benthic.ops import native
from benthic.ops.rope import rope_angles

PAGE = 64
"""Tokens a page of the cache."""
_FIRST_ANGLES = 4096


class Pages(Protocol):
    """What a step asks of a paged cache."""

    pages_N: list[Tensor]
    """For each layer (pages, 64, latent), contiguous, fp32 or bf16."""


class CannotDecodeNatively(WorkFailed):
    """There is no native decoding here, or not of this model; the message says why."""


def native_decoder(model: LanguageModel, *, threads: int | None = None) -> "NativeDecoder | None":
    """A :class:`NativeDecoder`, or None where there cannot be one."""
    try:
        return NativeDecoder(model, threads=threads)
    except CannotDecodeNatively:
        return None


class NativeDecoder:
    """Decodes with one model, whose weights must not change or move as long as this lives.

    Args:
        model: on the CPU, fp32 or bf16. Its weights are used where they are; the key and value projections of
            attention, less than a tenth of them, are kept once more, as the absorbed form wants them.
        threads: at work in a step; by default as many as PyTorch uses.

    Raises:
        CannotDecodeNatively: see :func:`native_decoder`.
    """

    def __init__(self, model: LanguageModel, *, threads: int | None = None) -> None:
        library, self.name = native.decode_library()
        if library is None:
            raise CannotDecodeNatively(self.name)
        check_layout(library)
        self._weights = _Weights(model)
        self._library, self._config = library, model.config
        self._lock = threading.Lock()
        library.decode_new.restype = ctypes.c_void_p
        self._decoder = library.decode_new(
            ctypes.byref(self._weights.model), ctypes.c_int64(threads or torch.get_num_threads())
        )
        weakref.finalize(self, library.decode_free, ctypes.c_void_p(self._decoder))
        self._cos_TP = self._sin_TP = torch.empty(0, 0)

    @torch.inference_mode()
    def __call__(self, tokens_B: Tensor, positions_B: Tensor, table_BP: Tensor, cache: Pages) -> tuple[Tensor, Tensor]:
        """One new token for each row: logits (B, V) and hidden states (B, D) after the final norm, both fp32.

        Args:
            tokens_B: int64, the new tokens.
            positions_B: int64, their positions, which are the tokens cached before them.
            table_BP: int32, page numbers of each row's sequence in order; unused entries are not looked at.
            cache: receives the new latents.

        Raises:
            IndexError: a token, a position or a page is out of range; the cache is as before.
        """
        logits_BV = torch.empty(len(tokens_B), self._config.vocab_size)
        hidden_BD = self._step(
            positions_B, table_BP, cache, layers=(0, self._config.num_hidden_layers), norm=self._weights.norms[0],
            tokens_B=tokens_B, logits_BV=logits_BV,
        )  # fmt: skip
        return logits_BV, hidden_BD

    @torch.inference_mode()
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
        input_BD = torch.stack(
            [self._weights.join(module, hidden_D, token) for hidden_D, token in zip(hidden_BD, tokens_B, strict=True)]
        )
        layer = self._config.num_hidden_layers + module
        return self._step(
            positions_B, table_BP, cache, layers=(layer, layer + 1), norm=self._weights.norms[1 + module],
            input_BD=input_BD.float(),
        )  # fmt: skip

    def _step(
        self, positions_B: Tensor, table_BP: Tensor, cache: Pages, *, layers: tuple[int, int], norm: Tensor,
        tokens_B: Tensor | None = None, input_BD: Tensor | None = None, logits_BV: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        batch, pages = len(positions_B), cache.pages_N[layers[0]]
        hidden_BD = torch.empty(batch, self._config.hidden_size)
        # Held by name until the step is done: what follows may be copies.
        positions_B, table_BP = positions_B.long().contiguous(), table_BP.int().contiguous()
        tokens_B = None if tokens_B is None else tokens_B.long().contiguous()
        input_BD = None if input_BD is None else input_BD.contiguous()
        with self._lock:
            self._reach(int(positions_B.max()))
            request = Request(
                batch=batch, first=layers[0], last=layers[1], tokens=_pointer(tokens_B), input=_pointer(input_BD),
                positions=_pointer(positions_B), table=_pointer(table_BP), table_stride=table_BP.shape[1],
                pages=_addresses(cache.pages_N), page_count=len(pages), wide=pages.dtype == torch.float32,
                cos=_pointer(self._cos_TP), sin=_pointer(self._sin_TP), angles=len(self._cos_TP), norm=_pointer(norm),
                hidden=_pointer(hidden_BD), logits=_pointer(logits_BV),
            )  # fmt: skip
            if self._library.decode_step(ctypes.c_void_p(self._decoder), ctypes.byref(request)):
                raise IndexError("decode: a token, a position or a page is out of range")
        return hidden_BD

    def _reach(self, position: int) -> None:
        """Have the rotations of every position up to this one."""
        if position >= len(self._cos_TP):
            count = max(_FIRST_ANGLES, 2 * (position + 1))
            self._cos_TP, self._sin_TP = (x.contiguous() for x in rope_angles(self._config, torch.arange(count)))


class _Weights:
    """A model's weights as the library reads them, and whatever has to stay alive for it."""

    def __init__(self, model: LanguageModel) -> None:
        transformer = model.transformer
        parameters = list(model.parameters())
        if any(p.device.type != "cpu" or p.dtype not in (torch.float32, torch.bfloat16) for p in parameters):
            raise CannotDecodeNatively("PyTorch decoding (the model is not on the CPU in fp32 or bf16)")
        self._kept: list[Tensor] = []
        self._embed = transformer.embed
        self._mtp = [module for module in model.mtp if isinstance(module, MTPModule)]
        self.norms = [norm.weight.detach().float() for norm in (transformer.norm, *(mtp.norm for mtp in self._mtp))]
        blocks = [block for block in transformer.layers if isinstance(block, Block)]
        blocks += [mtp.block for mtp in self._mtp]
        self._layers = (Layer * len(blocks))(*(self._layer(block) for block in blocks))
        config = model.config
        self.model = Model(
            layers=ctypes.cast(self._layers, ctypes.c_void_p), embed=self._matrix(transformer.embed.weight),
            head=self._matrix(transformer.head.weight), width=config.hidden_size, heads=config.num_attention_heads,
            q_rank=config.q_lora_rank or 0, c=config.kv_lora_rank, nope=config.qk_nope_head_dim,
            rope=config.qk_rope_head_dim, value=config.v_head_dim, groups=config.n_group,
            top_groups=config.topk_group, top_k=config.num_experts_per_tok, normalise=config.norm_topk_prob,
            eps=config.rms_norm_eps, latent_eps=blocks[0].attention.kv_norm.eps,
            softmax_scale=blocks[0].attention.scale, gate_scale=config.routed_scaling_factor,
        )  # fmt: skip
        use_huge_pages(model)

    def join(self, module: int, hidden_D: Tensor, token: Tensor) -> Tensor:
        """What enters an MTP module's block (D,): by itself, for products of several rows sum in other orders."""
        mtp = self._mtp[module]
        embedding_1D, hidden_1D = self._embed(token[None]), hidden_D[None].to(self._embed.weight.dtype)
        joined: Tensor = mtp.project(torch.cat((mtp.embed_norm(embedding_1D), mtp.hidden_norm(hidden_1D)), -1))
        return joined[0]

    def _layer(self, block: Block) -> Layer:
        layer = Layer(attention_norm=self._norm(block.attention_norm), ffn_norm=self._norm(block.ffn_norm))
        self._add_attention(layer, block.attention)
        dense = block.ffn if isinstance(block.ffn, SwiGLU) else block.ffn.shared
        if dense is not None:
            layer.gate_up = self._matrix(dense.gate_up.weight.unflatten(0, (2, -1)))
            layer.down = self._matrix(dense.down.weight)
        if isinstance(block.ffn, MoE):
            layer.router = self._matrix(block.ffn.router.weight.float())
            layer.router_bias = self._keep(block.ffn.router.bias)
            layer.expert_gate_up = self._matrix(block.ffn.experts.gate_up.unflatten(1, (2, -1)).flatten(0, 1))
            layer.expert_down = self._matrix(block.ffn.experts.down)
        return layer

    def _add_attention(self, layer: Layer, attention: LatentAttention) -> None:
        config: ModelConfig = attention.config
        if config.q_lora_rank is None:
            layer.q_b = self._matrix(attention.q.weight)
        else:
            layer.q_a, layer.q_b = self._matrix(attention.q_a.weight), self._matrix(attention.q_b.weight)
            layer.q_norm = self._norm(attention.q_norm)
        layer.kv_a, layer.kv_norm = self._matrix(attention.kv_a.weight), self._norm(attention.kv_norm)
        kv_b_HXC = attention.kv_b.weight.unflatten(0, (config.num_attention_heads, -1))
        key_HNC, value_HVC = kv_b_HXC.split((config.qk_nope_head_dim, config.v_head_dim), 1)
        layer.key, layer.value = self._matrix(key_HNC.transpose(1, 2)), self._matrix(value_HVC)
        layer.o = self._matrix(attention.o.weight)

    def _matrix(self, weight_SMK: Tensor) -> Matrix:
        """A weight (M, K) or a stack of them (S, M, K), where it is if it is contiguous."""
        kind = {torch.float32: Matrix.FP32, torch.bfloat16: Matrix.BF16}[weight_SMK.dtype]
        rows, columns = weight_SMK.shape[-2:]
        return Matrix(data=self._keep(weight_SMK.detach().contiguous()), kind=kind, rows=rows, columns=columns)

    def _norm(self, norm: nn.Module) -> int:
        assert isinstance(norm.weight, Tensor)
        return self._keep(norm.weight.detach().float().contiguous())

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _addresses(tensors: Sequence[Tensor]) -> "ctypes.Array[ctypes.c_void_p]":
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
