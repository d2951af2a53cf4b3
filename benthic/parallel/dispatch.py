"""Tokens on their way to experts of other ranks and back: who is sent what, as pure functions, and the messages.

A token goes once to each rank that has an expert it chose, whatever their number there; the rank returns one sum.
Nothing is dropped or padded. With node-limited routing a token's groups of experts are at most ``topk_group``, which
bounds the ranks and nodes it visits (V3 report section 2.1.2).

Shapes: N tokens here, K experts per token, E experts of a rank, R ranks, M messages (a token to a rank), P pairs (a
token and an expert it chose), D model.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from benthic.parallel.traffic import Kind, Traffic
from benthic.parallel.turns import Turns
from benthic.precision.blocks import BLOCK, ROW_TILE, dequantise_blocks, quantise_blocks


class Plan(NamedTuple):
    """What this rank sends: messages in order of rank, then token; pairs in order of message, then choice."""

    token_M: Tensor
    """The token of each message."""
    messages_R: Tensor
    pairs_R: Tensor
    """How many of each go to each rank."""
    choice_P: Tensor
    """The pair's place among all choices (N * K)."""
    expert_P: Tensor
    """The expert, counted among those of its rank."""
    message_P: Tensor
    """The message that has its token, counted among those to its rank."""


def plan_dispatch(index_NK: Tensor, experts: int, ranks: int) -> Plan:
    """Who is sent what, if each rank has so many experts, in order."""
    tokens, top_k = index_NK.shape
    rank_NK = index_NK // experts
    visits_NR = torch.zeros(tokens, ranks, dtype=torch.bool, device=index_NK.device).scatter_(1, rank_NK, True)
    rank_M, token_M = visits_NR.T.nonzero(as_tuple=True)
    place_NR = visits_NR.long().cumsum(0) - 1
    rank_C, token_C = rank_NK.flatten(), torch.arange(tokens, device=index_NK.device).repeat_interleave(top_k)
    # Choices are in order of their tokens, so that a stable sort by rank leaves them in order of messages.
    choice_P = rank_C.argsort(stable=True)
    return Plan(
        token_M,
        torch.bincount(rank_M, minlength=ranks),
        torch.bincount(rank_C, minlength=ranks),
        choice_P,
        (index_NK % experts).flatten()[choice_P],
        place_NR[token_C, rank_C][choice_P],
    )


class Arrivals(NamedTuple):
    """What has come to this rank: the same in order of sender."""

    messages: list[int]
    """From each rank."""
    pairs: list[int]
    expert_P: Tensor
    message_P: Tensor
    """Counted among all that came."""


class Sender(NamedTuple):
    """One exchange between the ranks of a group, both ways."""

    group: dist.ProcessGroup
    traffic: Traffic
    turns: Turns
    """With another pass, which computes while a message is on its way."""

    def announce(self, plan: Plan) -> tuple[Arrivals, list[int], list[int]]:
        """Tell every rank what it is going to be sent; and how many messages and pairs leave for each."""
        leaving_R2 = torch.stack((plan.messages_R, plan.pairs_R), 1)
        coming_R2 = torch.empty_like(leaving_R2)
        self._exchange(coming_R2, leaving_R2, None, None, "counts")
        messages, pairs = coming_R2.T.tolist()
        messages_out, pairs_out = leaving_R2.T.tolist()
        leaving_P2 = torch.stack((plan.expert_P, plan.message_P), 1)
        coming_P2 = leaving_P2.new_empty(sum(pairs), 2)
        self._exchange(coming_P2, leaving_P2, pairs, pairs_out, "counts")
        first_R = F.pad(coming_R2[:, 0].cumsum(0), (1, -1))
        offset_P = first_R.repeat_interleave(coming_R2[:, 1])
        return Arrivals(messages, pairs, coming_P2[:, 0], coming_P2[:, 1] + offset_P), messages_out, pairs_out

    def move(self, x: Tensor, receive: list[int], send: list[int], kind: Kind, *, fp8: bool = False) -> Tensor:
        """Rows sent and received, so many for each rank; in FP8 tiles of 1 x 128 if asked for."""
        if fp8:
            # What experts would round to in FP8 anyway: the same numbers arrive.
            numbers, scales = quantise_blocks(x, ROW_TILE, powers_of_two=True)
            got = x.new_empty(sum(receive), x.shape[1], dtype=torch.uint8)
            got_scales = scales.new_empty(sum(receive), -(-x.shape[1] // BLOCK))
            self._exchange(got, numbers.view(torch.uint8), receive, send, kind)
            self._exchange(got_scales, scales, receive, send, kind)
            return dequantise_blocks(got.view(numbers.dtype), got_scales, ROW_TILE).to(x.dtype)
        out = x.new_empty(sum(receive), *x.shape[1:])
        self._exchange(out, x.contiguous(), receive, send, kind)
        return out

    def _exchange(self, out: Tensor, x: Tensor, receive: list[int] | None, send: list[int] | None, kind: Kind) -> None:
        message = dist.all_to_all_single(out, x, receive, send, group=self.group, async_op=True)
        self.turns.hand_over()
        message.wait()
        here = self.group.rank()
        kept = send[here] if send is not None else len(x) // self.group.size()
        self.traffic.add(kind, (len(x) - kept) * x.shape[1:].numel() * x.element_size())


class _Move(torch.autograd.Function):
    """Rows to other ranks; their gradients come back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sender: Sender, receive: list[int], send: list[int], kinds: tuple[Kind, Kind],
        fp8: tuple[bool, bool],
    ) -> Tensor:  # fmt: skip
        ctx.there = sender, send, receive, kinds[1], fp8[1]
        return sender.move(x, receive, send, kinds[0], fp8=fp8[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sender, receive, send, kind, fp8 = ctx.there
        return sender.move(grads[0], receive, send, kind, fp8=fp8), None, None, None, None, None


class _Spread(torch.autograd.Function):
    """Rows (A, D) copied to (B, D), row ``source_B`` each; their gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x_AD: Tensor, source_B: Tensor) -> Tensor:
        ctx.source_B, ctx.rows = source_B, len(x_AD)
        return x_AD[source_B]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _sum_rows(grads[0], ctx.source_B, ctx.rows), None


class _Gather(torch.autograd.Function):
    """Rows (B, D) summed into (A, D) by their ``target_B``."""

    @staticmethod
    def forward(ctx: Any, y_BD: Tensor, target_B: Tensor, rows: int) -> Tensor:
        ctx.target_B = target_B
        return _sum_rows(y_BD, target_B, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0][ctx.target_B], None, None


def _sum_rows(y_BD: Tensor, target_B: Tensor, rows: int) -> Tensor:
    """Sums (rows, D) of the rows with the same target, each added in the order they have."""
    order_B = target_B.argsort(stable=True)
    counts = torch.bincount(target_B, minlength=rows)
    return F.embedding_bag(order_B, y_BD, counts.cumsum(0) - counts, mode="sum")


class Dispatch:
    """The way of one layer's tokens to their experts and back."""

    def __init__(self, sender: Sender, experts: int, *, fp8: bool) -> None:
        self._sender, self._experts, self._fp8 = sender, experts, fp8
        self._plan: Plan
        self._arrivals: Arrivals
        self._leaving: list[int]
        self._tokens = 0

    @property
    def pairs_of_senders(self) -> list[int]:
        """How many of the rows that experts now have came from each rank."""
        return self._arrivals.pairs

    def send(self, x_ND: Tensor, index_NK: Tensor, gate_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What this rank's experts have to do: a row for each pair that came, its expert (P, 1) and gate (P, 1)."""
        plan = plan_dispatch(index_NK, self._experts, self._sender.group.size())
        arrivals, messages_out, pairs_out = self._sender.announce(plan)
        self._plan, self._arrivals, self._leaving, self._tokens = plan, arrivals, messages_out, len(x_ND)
        kinds: tuple[Kind, Kind] = ("dispatch", "combine")
        sent_MD = _Spread.apply(x_ND, plan.token_M)
        came_MD = _Move.apply(sent_MD, self._sender, arrivals.messages, messages_out, kinds, (self._fp8, False))
        gate_P1 = gate_NK.flatten()[plan.choice_P].unsqueeze(1)
        gate_P1 = _Move.apply(gate_P1, self._sender, arrivals.pairs, pairs_out, kinds, (False, False))
        return _Spread.apply(came_MD, arrivals.message_P), arrivals.expert_P.unsqueeze(1), gate_P1

    def bring_back(self, y_PD: Tensor) -> Tensor:
        """Each token's sum over its experts (N, D), of what this rank's experts made of the pairs."""
        arrivals = self._arrivals
        sum_MD = _Gather.apply(y_PD, arrivals.message_P, sum(arrivals.messages))
        kinds: tuple[Kind, Kind] = ("combine", "dispatch")
        back_MD = _Move.apply(sum_MD, self._sender, self._leaving, arrivals.messages, kinds, (False, self._fp8))
        out: Tensor = _Gather.apply(back_MD, self._plan.token_M, self._tokens)
        return out
