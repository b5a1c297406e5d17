"""What changes of an MLP's output do further on: to the logits and to the loss."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens.models.windows import Windows
from bilens.tensor.records import tabular
from bilens.tensor.resuming import UNKEPT, Stages

from .layer import FeatureLayer


@tabular(rows="edit")
class Effects(NamedTuple):
    """Mean effects of edits over the positions where the circuit's pair is active."""

    pre: Float[Tensor, " edit"]  # |change| of the output feature's pre-activation
    kl: Float[Tensor, " edit"]  # KL(as it is ‖ edited) of the next-token distribution, nats
    logits: Float[Tensor, " edit"]  # Euclidean norm of the change of the logits
    loss: Float[Tensor, " edit"]  # change of the next token's loss, nats; NaN if no such position has a next token


def percentiles(effect: Effects, others: Effects) -> dict[str, float]:
    """Return the share, in percent, of other edits with a smaller effect, ties half; NaN where one is unknown."""
    return {
        name: 100 * ((other < one).double() + 0.5 * (other == one).double()).mean().item()
        if len(other) and not (one.isnan().any() or other.isnan().any())
        else float("nan")
        for name, one, other in zip(Effects._fields, effect, others, strict=True)
    }


@dataclass(frozen=True, repr=False, eq=False)
class Baseline:
    """Windows of text that are edited at some positions, and what the model makes of them as they are."""

    lens: FeatureLayer
    reader: Float[Tensor, " d_model"]  # what is read of the layer's output
    windows: Windows
    where: Bool[Tensor, "row seq"]
    resid: Float[Tensor, "row seq d_model"]  # entering the layer
    resid_post: Float[Tensor, "row seq d_model"]  # leaving it
    x: Float[Tensor, "position d_model"]  # what enters the MLP; `position` runs over `where`
    y: Float[Tensor, "position d_model"]  # what leaves it
    z: Float[Tensor, "position feature"]  # codes of the input features, by which x is a sum of what they write
    logits: Float[Tensor, "position vocab"]
    following: Int[Tensor, " position"]  # the next token, -100 where there is none

    @classmethod
    def run(
        cls,
        lens: FeatureLayer,
        reader: Float[Tensor, " d_model"],
        windows: Windows,
        where: Bool[Tensor, "row seq"],
        most: int,
    ) -> "Baseline":
        """Run the first windows with a position in `where`, cut after the token that follows the last such position."""
        chosen = where.any(1).nonzero()[:most, 0]
        stop = int(where[chosen].any(0).nonzero().max()) + 2
        model, n = lens.model, lens.model.cfg.n_layers
        some, where = windows[chosen], where[chosen, :stop]
        windows = Windows(some.tokens[:, :stop], some.attend[:, :stop], some.counts[:, :stop], some.text)
        ends = [f"blocks.{lens.layer}.{name}" for name in ("hook_resid_pre", "hook_resid_post")]
        hooks = [ends[0], lens.hook_in, lens.hook_out, ends[1]]
        options = {"names_filter": hooks, "stop_at_layer": n, "return_cache_object": False}
        resid, found = model.run_with_cache(windows.tokens, attention_mask=windows.attend, **options)
        before, x, y, after = (found[hook] for hook in hooks)
        following = torch.full_like(windows.tokens, -100)
        following[:, :-1] = windows.tokens[:, 1:].masked_fill(~windows.attend[:, 1:], -100)
        logits = model.unembed(model.ln_final(resid[where]))
        x, y = (value[where].to(reader) for value in (x, y))
        parts = (lens.entering(x), y, lens.codes(x), logits, following[where])
        return cls(lens, reader, windows, where, before, after, *parts)

    def finish(self, resid: Float[Tensor, "row seq d_model"]) -> Float[Tensor, "position vocab"]:
        """Return the logits that a residual stream after the last layer gives."""
        model = self.lens.model
        return model.unembed(model.ln_final(resid[self.where]))

    def with_change(self, change: Float[Tensor, "position d_model"]) -> Float[Tensor, "position vocab"]:
        """Return the logits with a change added to the layer's output at those positions."""
        model, resid = self.lens.model, self.resid_post.clone()
        resid[self.where] += change.to(resid)
        span = {"start_at_layer": self.lens.layer + 1, "stop_at_layer": model.cfg.n_layers}
        return self.finish(model(resid, attention_mask=self.windows.attend, tokens=self.windows.tokens, **span))

    def effects(
        self,
        changes: Iterable[Float[Tensor, "position d_model"]],
        n: int,
        stages: Stages = UNKEPT,
        stage: str = "effects",
    ) -> Effects:
        """Add n changes to the layer's output at those positions, one after the other, and measure.

        Where the stages keep what was measured, it goes on from there.
        """
        if not n:
            return Effects(*self.x.new_zeros(4, 0))

        def measured(start: int) -> Iterator[dict[str, Tensor]]:
            for change in islice(changes, start, None):
                pre = (change.to(self.reader) @ self.reader).abs().mean().double()
                yield {"effect": torch.stack((pre, *self.compare(self.with_change(change))))[None]}

        return Effects(*stages.run(stage, n, measured, unit="edit")["effect"].T)

    def compare(self, logits: Float[Tensor, "position vocab"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean divergence, change of the logits, and change of the loss; in float64, as they can be tiny."""
        before, after = self.logits.double(), logits.double()
        log_before, log_after = before.log_softmax(-1), after.log_softmax(-1)
        kl = (log_before.exp() * (log_before - log_after)).sum(-1).mean()
        known = self.following != -100
        change = (log_before - log_after)[known].gather(1, self.following[known, None])
        return kl, (after - before).norm(dim=1).mean(), change.mean()

    def rerun(self) -> tuple[Float[Tensor, "row seq d_model"], Float[Tensor, "position d_model"]]:
        """Run the windows from the layer on, under whatever hooks there are.

        Returns:
            The residual stream after the last layer, and the MLP's output at those positions.
        """
        resid, found = self.lens.model.run_with_cache(
            self.resid,
            attention_mask=self.windows.attend,
            tokens=self.windows.tokens,
            start_at_layer=self.lens.layer,
            stop_at_layer=self.lens.model.cfg.n_layers,
            names_filter=self.lens.hook_out,
            return_cache_object=False,
        )
        return resid, found[self.lens.hook_out][self.where].to(self.reader)
