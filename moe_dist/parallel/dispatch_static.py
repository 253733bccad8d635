"""Rows of fixed number to experts on other ranks and back: nothing that the host does depends on what tokens chose."""

from __future__ import annotations

from torch import Tensor

from moe_dist.models.permute import place_by_expert
from moe_dist.models.routing import Routing
from moe_dist.parallel.dispatch import AllToAllDispatcher, UnderWay


class StaticDispatcher(AllToAllDispatcher):
    """Every rank sends a row for each place of every expert, zeros for those that no token has, so no counts are
    exchanged and no host waits for its device.

    For that, micro-batches of all ranks must have as many tokens, padding included, as those of a loader have. Nobody
    compares layers and sizes either: ranks that fell out of step hang, or find that sizes differ. Where the routing
    does not say how many places suffice (evaluation, noise of experts), rows travel as by `AllToAllDispatcher`.
    """

    def begin_dispatch(self, x_TD: Tensor, routing: Routing, num_pieces: int = 1) -> list[UnderWay]:
        """(T, D): tokens set out, with fixed places in one piece."""
        if routing.places is None:
            return super().begin_dispatch(x_TD, routing, num_pieces)
        permutation = place_by_expert(routing.expert_ids_TK, self.num_experts, routing.places, self.kernels)
        arriving = permutation.rows_per_expert.view(self.ep_size, -1)  # from a peer as many as to it
        splits = [self.num_local * routing.places] * self.ep_size
        return [self._depart(x_TD, routing.weights_TK, permutation, splits, splits, arriving, None)]
