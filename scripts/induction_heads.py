"""Find induction heads in the weights of a two-layer model without a softmax, and take out what makes them.

    python scripts/induction_heads.py runs/induction --out scripts/results/induction.md

A token is a feature: at the query its embedding, at the key what a head of the first layer writes of it. A head of the
second layer is an induction head as far as its strongest pairs join a token with itself: what is here, and what stood
before the key. That is read off the weights by the exact ranking. Then the running model is asked, on repeated random
tokens: what does each head's ablation cost, and what does it cost to take ten pairs out of a head's scores, the
strongest or others that are matched to them?
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from train_induction import PERIODS, SPECIAL, repeated

import bilens
from bilens import BilinearTransformer
from bilens.circuits import top_attention

KNOWN = PERIODS[1]  # from this position on, each token has been seen before in its window
APART = (7, 12, 17)  # from the query back to the key, among the periods that were trained on
NEAR = 50  # pairs that a matched one is drawn from


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that train_induction.py wrote")
    parser.add_argument("--pairs", type=int, default=10, help="how many are taken out together")
    parser.add_argument("--ranked", type=int, default=200, help="strongest pairs that a head is known by")
    parser.add_argument("--windows", type=int, default=192)
    parser.add_argument("--controls", type=int, default=100, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="markdown file")
    return parser.parse_args(arguments)


# -- from the weights -------------------------------------------------------------------------------------------------


class Route(NamedTuple):
    """A head of the second layer that reads, at the key, what a head of the first layer wrote of a token."""

    first: int
    second: int
    same: float  # share of the strongest pairs that join a token with itself, over the distances


def words(model: BilinearTransformer) -> Tensor:
    """Return the embeddings of all tokens but the special ones, as the first norm leaves them."""
    return model.blocks[0].ln1(model.W_E.detach()[SPECIAL:]).detach()


def written(model: BilinearTransformer, first: int) -> Tensor:
    """Return what a head of the first layer writes of each token where its pattern is 1."""
    return model.blocks[0].attn.ov(first).detach().apply(words(model))


def rank_routes(model: BilinearTransformer, k: int) -> list[Route]:
    """Rank the pairs of tokens of every head of the second layer, through every head of the first."""
    query, routes = words(model), []
    for first in range(model.cfg.n_heads):
        key = written(model, first)
        for second in range(model.cfg.n_heads):
            found = [top_attention(model, 1, k, query, key, head=second, distance=apart) for apart in APART]
            same = torch.stack([(pairs.left == pairs.right).double().mean() for pairs in found]).mean().item()
            routes.append(Route(first, second, same))
    return sorted(routes, key=lambda route: -route.same)


def strongest(model: BilinearTransformer, route: Route, n: int) -> tuple[Tensor, Tensor]:
    """Return the n strongest pairs of a head at the middle distance: tokens at the query, tokens before the key."""
    middle = APART[len(APART) // 2]
    found = top_attention(model, 1, n, words(model), written(model, route.first), head=route.second, distance=middle)
    return found.left, found.right


# -- in the running model ---------------------------------------------------------------------------------------------


def loss_of(model: BilinearTransformer, tokens: Tensor, hooks: Sequence = (), resid: Tensor | None = None) -> float:
    """Return the mean loss of tokens that were seen before; `resid` enters the second layer if it is given."""
    source = {"input": tokens} if resid is None else {"input": resid, "start_at_layer": 1, "tokens": tokens}
    with model.hooks(list(hooks)):
        losses = model(**source, return_type="loss", loss_per_token=True)
    return losses[:, KNOWN:].double().mean().item()


def without_head(layer: int, head: int) -> tuple[str, Callable]:
    """Return the hook that takes away what a head writes."""

    def ablate(z: Tensor, hook: object) -> Tensor:
        z = z.clone()
        z[:, :, head] = 0
        return z

    return f"blocks.{layer}.attn.hook_z", ablate


class Running(NamedTuple):
    """What a head's scores see in windows of tokens: features at the queries, and through a first head at the keys.

    The score of branch b holds `query_i · key_j · coefficient_b(distance)[i, j]` for every pair of tokens, exactly:
    `query` is over the norm's root, `key` is over it and times the first head's pattern.
    """

    tokens: Tensor
    resid: Tensor
    scores: Tensor  # [branch, row, query, key], of the head, as they are
    query: Tensor  # [row, query, token]
    key: Tensor  # [row, key, token]

    @classmethod
    def of(cls, model: BilinearTransformer, route: Route, tokens: Tensor) -> "Running":
        """Run the model on windows."""
        attn = model.blocks[1].attn
        names = [f"blocks.1.attn.hook_rot_{side}" for side in ("q", "k", "q2", "k2")]
        names += ["blocks.0.attn.hook_pattern", "blocks.1.hook_resid_pre", "blocks.1.ln1.hook_scale"]
        _, seen = model.run_with_cache(tokens, names_filter=names, return_cache_object=False)
        q, k, q2, k2 = (seen[name][:, :, route.second] for name in names[:4])
        scores = attn.config.factor * torch.stack((q @ k.mT, q2 @ k2.mT))
        onehot = torch.nn.functional.one_hot(tokens, model.cfg.d_vocab).to(scores)[..., SPECIAL:]
        scale = seen[names[6]]
        size = model.blocks[0].ln1.rms(model.W_E)[SPECIAL:, 0]  # the stream holds the embedding before the first norm
        key = seen[names[4]][:, route.first] @ onehot
        return cls(tokens, seen[names[5]], scores, onehot * size / scale, key / scale)

    def activity(self) -> Tensor:
        """Return how active each pair is, `Σ (query_i key_j)²` over all queries and the keys before them."""
        after = self.key.pow(2).cumsum(1)
        return torch.einsum("rqi,rqj->ij", self.query.pow(2), after)

    def removed(self, model: BilinearTransformer, route: Route, left: Tensor, right: Tensor) -> Tensor:
        """Return what pairs add to the scores, `[branch, row, query, key]`."""
        n = self.tokens.shape[1]
        query, key = words(model)[left], written(model, route.first)[right]
        apart = (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0)
        both = []
        for branch in (0, 1):
            forms = [model.blocks[1].attn.score_tensor(route.second, d, branch).detach() for d in range(n)]
            values = torch.stack([form.apply(_read(model, query), _read(model, key)) for form in forms])
            both.append(torch.einsum("rqp,rkp,qkp->rqk", self.query[..., left], self.key[..., right], values[apart]))
        return torch.stack(both).tril()

    def cost(self, model: BilinearTransformer, route: Route, removed: Tensor) -> float:
        """Return the loss when something is taken out of the head's scores."""
        product = (self.scores - removed).prod(0)

        def edit(scores: Tensor, hook: object) -> Tensor:
            scores = scores.clone()
            scores[:, route.second] = product
            return scores

        return loss_of(model, self.tokens, [("blocks.1.attn.hook_attn_scores", edit)], self.resid)


def _read(model: BilinearTransformer, rows: Tensor) -> Tensor:
    """Take what is written into the stream through the gain of the second layer's norm."""
    return rows * model.blocks[1].ln1.affine(rows)[0].detach()


class Edits(NamedTuple):
    """What it costs, in nats, to take pairs out of a head's scores."""

    route: Route
    own: float
    as_active: list[float]  # as many other pairs, each as active as the one it stands for
    as_large: list[float]  # as many random pairs, scaled to take as much out of the scores
    same: float  # share of the strongest that join a token with itself


def matched(activity: Tensor, left: Tensor, right: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw for each pair one of the others that are nearest to it in how active they are."""
    n, logs = activity.shape[1], activity.flatten().clamp(min=1e-30).log()
    own = logs[left * n + right]
    logs[left * n + right] = torch.inf
    near = [(logs - one).abs().topk(NEAR, largest=False).indices for one in own]
    some = torch.stack([one[torch.randint(NEAR, (), generator=draw)] for one in near])
    return some // n, some % n


def edit_route(
    model: BilinearTransformer, route: Route, tokens: Tensor, args: argparse.Namespace, draw: torch.Generator
) -> Edits:
    """Take the strongest pairs out of a head, and matched ones."""
    run = Running.of(model, route, tokens)
    before, activity = run.cost(model, route, torch.zeros(())), run.activity()
    left, right = strongest(model, route, args.pairs)
    own = run.removed(model, route, left, right)
    active = (activity > 0).nonzero()

    def others() -> Iterator[tuple[float, float]]:
        for _ in range(args.controls):
            near = run.removed(model, route, *matched(activity, left, right, draw))
            some = run.removed(model, route, *active[torch.randint(len(active), (args.pairs,), generator=draw)].T)
            size = (own.pow(2).sum((1, 2, 3)) / some.pow(2).sum((1, 2, 3))).sqrt()
            yield tuple(run.cost(model, route, one) - before for one in (near, some * size[:, None, None, None]))

    as_active, as_large = map(list, zip(*others(), strict=True))
    same = (left == right).double().mean().item()
    return Edits(route, run.cost(model, route, own) - before, as_active, as_large, same)


# -- table ------------------------------------------------------------------------------------------------------------


def share_below(own: float, others: list[float]) -> str:
    """Return the share of other edits that cost less, and the largest of them."""
    below = sum(one < own for one in others) / len(others)
    return f"{100 * below:.0f} % (mean {sum(others) / len(others):+.4f}, largest {max(others):+.4f})"


def head_rows(routes: list[Route], costs: dict[tuple[int, int], float]) -> list[str]:
    """Return a row for each head: what the weights say, what its ablation costs."""
    lines = [
        "| head | strongest pairs of one and the same token | through | ablation costs, nats |",
        "|---|---|---|---|",
    ]
    for layer, head in sorted(costs, key=lambda one: (-one[0], -costs[one])):
        mine = [route for route in routes if (route.second if layer else route.first) == head]
        other = f"0.{mine[0].first}" if layer else f"1.{mine[0].second}"
        lines.append(f"| {layer}.{head} | {100 * mine[0].same:.1f} % | {other} | {costs[layer, head]:+.3f} |")
    return lines


def edit_rows(edits: list[Edits]) -> list[str]:
    """Return a row for each head whose strongest pairs were taken out."""
    lines = [
        "| head, through | of one token | costs, nats | more than others as active | more than others as large |",
        "|---|---|---|---|---|",
    ]
    return lines + [
        f"| 1.{one.route.second}, 0.{one.route.first} | {100 * one.same:.0f} % | {one.own:+.4f} "
        f"| {share_below(one.own, one.as_active)} | {share_below(one.own, one.as_large)} |"
        for one in edits
    ]


def report(args: argparse.Namespace, whole: float, heads: list[str], edits: list[str]) -> str:
    """Return the tables, and what they say."""
    return "\n".join(
        [
            "# Induction heads of a two-layer model without a softmax",
            "",
            f"scripts/induction_heads.py on a model of scripts/train_induction.py. Costs are on {args.windows} windows "
            f"of repeated random tokens, where each token has been seen before: the loss there is {whole:.3f} nats.",
            "",
            f"Weights: of the {args.ranked} strongest pairs of a head of layer 1 (a token's embedding at the query, "
            "what a head of layer 0 writes of a token at the key; product of both scores; mean over distances "
            f"{', '.join(map(str, APART))}), the share that joins a token with itself, through the head of layer 0 "
            "where it is largest (by chance 0.4 %). A head of layer 0 has the largest share that it is the way of.",
            "",
            *heads,
            "",
            f"The {args.pairs} strongest pairs of a head taken out of its scores, exactly, against {args.controls} "
            f"edits of either kind: as many other pairs, each among the {NEAR} nearest in how active they are; "
            "as many random pairs of tokens that do meet, scaled to take as much out of the scores.",
            "",
            *edits,
            "",
        ]
    )


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Find, ablate, take out, and write the tables."""
    args = parse_args(arguments)
    model, draw = bilens.load(args.model), torch.Generator().manual_seed(args.seed)
    tokens = repeated(args.windows, model.cfg.n_ctx, model.cfg.d_vocab, draw)
    routes, whole = rank_routes(model, args.ranked), loss_of(model, tokens)
    heads = [(layer, head) for layer in range(2) for head in range(model.cfg.n_heads)]
    costs = {head: loss_of(model, tokens, [without_head(*head)]) - whole for head in heads}
    best = {route.second: route for route in reversed(routes)}
    first, second, *_ = sorted(best.values(), key=lambda route: -route.same)
    edits = [edit_route(model, route, tokens, args, draw) for route in (first, second)]
    text = report(args, whole, head_rows(routes, costs), edit_rows(edits))
    print(text)
    if args.out is not None:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
