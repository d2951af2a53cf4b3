"""Which GPU holds which expert, so that all have about the same to do: DeepSeek's expert-parallel load balancer.

Busy experts get replicas, and replicas are packed on GPUs (V3 report section 3.4; the algorithm as DeepSeek published
it under the name EPLB). The global policy packs replicas anywhere. The hierarchical one first packs whole groups of
experts on nodes, so that group-limited routing sends a token to few nodes, then replicates and packs within each.

Functions of loads alone, on the CPU. Shapes: M MoE layers, E experts, S slots (each holds a replica of one expert),
G GPUs, N items, P packs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benthic.errors import InputError


@dataclass(frozen=True)
class Placement:
    """The expert in each slot; GPU g has the slots from g S/G to (g + 1) S/G, a node the GPUs likewise."""

    expert_MS: Tensor
    """Index of the expert, int64."""
    replicas_ME: Tensor
    """Slots that hold each expert, int64, at least 1."""
    gpus: int
    nodes: int

    def gpu_load(self, load_ME: Tensor) -> Tensor:
        """Load of each GPU (M, G) in fp64, if an expert's tokens are dealt to its replicas in equal parts."""
        share_ME = load_ME.double() / self.replicas_ME
        load_MG: Tensor = share_ME.gather(-1, self.expert_MS).unflatten(-1, (self.gpus, -1)).sum(-1)
        return load_MG

    def node_load(self, load_ME: Tensor) -> Tensor:
        """Load of each node (M, nodes) in fp64."""
        load: Tensor = self.gpu_load(load_ME).unflatten(-1, (self.nodes, -1)).sum(-1)
        return load


def in_order(layers: int, experts: int, *, gpus: int, nodes: int = 1) -> Placement:
    """Experts in their order, one replica each: what there is without balancing.

    Raises:
        InputError: experts cannot be dealt equally to GPUs, or GPUs to nodes.
    """
    _check(experts, experts, gpus, nodes, 1)
    expert_ME = torch.arange(experts).expand(layers, experts)
    return Placement(expert_ME, torch.ones_like(expert_ME), gpus, nodes)


def balanced(load_ME: Tensor, *, slots: int, gpus: int, nodes: int = 1, groups: int = 1) -> Placement:
    """Slots chosen by load: hierarchical where ``nodes`` divides ``groups``, else global.

    Args:
        load_ME: tokens each expert received, or is expected to; none negative.
        slots: replicas in all.
        gpus: each holds ``slots / gpus`` replicas.
        nodes: each holds ``gpus / nodes`` GPUs.
        groups: of neighbouring experts, as the router's ``n_group``.

    Raises:
        InputError: a number does not divide where it must, or ``slots`` are fewer than experts.
    """
    experts = load_ME.shape[-1]
    _check(experts, slots, gpus, nodes, groups)
    if not bool((load_ME >= 0).all()):
        raise InputError("load_ME: holds a negative load or NaN")
    load_ME = load_ME.double().cpu()
    if groups % nodes == 0:
        expert_MS = _hierarchical(load_ME, slots, gpus, nodes, groups)
    else:
        expert_MS = _hierarchical(load_ME, slots, gpus, 1, 1)
    ones_MS = torch.ones_like(expert_MS)
    replicas_ME = torch.zeros_like(load_ME, dtype=torch.int64).scatter_add_(-1, expert_MS, ones_MS)
    return Placement(expert_MS, replicas_ME, gpus, nodes)


def pack(load_MN: Tensor, packs: int) -> Tensor:
    """Items of each row in packs of N / P, the loads of packs near each other: their order (M, N), pack after pack.

    The heaviest item first, each to the pack with the least load that has room. Where each pack has one item, they
    stay as they are.
    """
    room = load_MN.shape[-1] // packs
    if room == 1:
        return torch.arange(packs).expand(load_MN.shape)
    rows = []
    for load_N in load_MN.tolist():
        filled: list[list[int]] = [[] for _ in range(packs)]
        totals = [0.0] * packs
        for item in sorted(range(len(load_N)), key=lambda item: -load_N[item]):
            lightest = min((p for p in range(packs) if len(filled[p]) < room), key=totals.__getitem__)
            filled[lightest].append(item)
            totals[lightest] += load_N[item]
        rows.append([item for one in filled for item in one])
    return torch.tensor(rows, dtype=torch.int64).view(load_MN.shape)


def replicate(load_ME: Tensor, slots: int) -> Tensor:
    """Experts (M, S) that slots hold, each at least once; the largest load of a replica is the least possible.

    Every further slot goes to the expert whose replicas have most to do.
    """
    layers, experts = load_ME.shape
    replicas_ME = torch.ones(layers, experts, dtype=torch.int64)
    held = [torch.arange(experts).expand(layers, experts)]
    for _ in range(slots - experts):
        busiest_M1 = (load_ME / replicas_ME).argmax(-1, keepdim=True)
        replicas_ME.scatter_add_(-1, busiest_M1, torch.ones_like(busiest_M1))
        held.append(busiest_M1)
    return torch.cat(held, -1)


def _hierarchical(load_ME: Tensor, slots: int, gpus: int, nodes: int, groups: int) -> Tensor:
    """Groups to nodes, then in each node its experts to replicas, and these to GPUs: the experts of slots (M, S)."""
    layers, experts = load_ME.shape
    size = experts // groups
    group_order_MQ = pack(load_ME.unflatten(-1, (groups, size)).sum(-1), nodes)
    # Experts in the order of nodes; a row of what follows is one node of one layer.
    order_ME = (group_order_MQ[..., None] * size + torch.arange(size)).flatten(-2)
    of_node = order_ME.view(layers * nodes, experts // nodes)
    load_of_node = load_ME.gather(-1, order_ME).view_as(of_node)
    held = replicate(load_of_node, slots // nodes)
    count = torch.zeros_like(of_node).scatter_add_(-1, held, torch.ones_like(held))
    share = (load_of_node / count).gather(-1, held)
    slot_order = pack(share, gpus // nodes)
    return of_node.gather(-1, held.gather(-1, slot_order)).view(layers, slots)


def _check(experts: int, slots: int, gpus: int, nodes: int, groups: int) -> None:
    for name, number in (("slots", slots), ("gpus", gpus), ("nodes", nodes), ("groups", groups)):
        if number < 1:
            raise InputError(f"{name}={number}: must be at least 1")
    for small, large in (
        (("nodes", nodes), ("gpus", gpus)),
        (("gpus", gpus), ("slots", slots)),
        (("groups", groups), ("experts", experts)),
    ):
        if large[1] % small[1]:
            raise InputError(f"{small[0]}={small[1]}: must divide {large[0]}={large[1]}")
    if slots < experts:
        raise InputError(f"slots={slots}: must be at least the number of experts, {experts}")
