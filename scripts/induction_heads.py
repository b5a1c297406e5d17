"""Find induction heads in the weights of a two-layer model without a softmax, and take out what makes them.

    python scripts/induction_heads.py runs/induction --out scripts/results/induction.md

Features are what a token leaves in the stream that enters the second layer: at its own position (for the query), and at
the one after it (for the key), each the mean over random text less the mean of all. A head is an induction head as far
as its strongest pairs join a token with itself: what is here, and what stood before the key. That is read off the
weights by the exact ranking. Then the running model is asked, on repeated random tokens: what does each head's ablation
cost, and what does it cost to take ten pairs out of a head's scores, the strongest or others that are matched to them?
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
from bilens.tensor.forms import BilinearForm

KNOWN = PERIODS[1]  # from this position on, each token has been seen before in its window
APART = (7, 12, 17)  # from the query back to the key, among the periods that were trained on
NEAR = 50  # pairs that a matched one is drawn from


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that train_induction.py wrote")
    parser.add_argument("--pairs", type=int, default=10, help="how many are taken out together")
    parser.add_argument("--ranked", type=int, default=200, help="strongest pairs that a head is known by")
    parser.add_argument("--means", type=int, default=1500, help="windows that a token's features are the means of")
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--controls", type=int, default=60, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="markdown file")
    return parser.parse_args(arguments)


# -- from the weights -------------------------------------------------------------------------------------------------


class Features(NamedTuple):
    """What a token leaves in the stream before the second layer: where it stands, and right after it."""

    here: Tensor  # [token, d_model]
    after: Tensor

    @classmethod
    def of(cls, model: BilinearTransformer, tokens: Tensor) -> "Features":
        """Take means over windows of tokens, less the mean of all positions but the first two."""
        resid = model(tokens, stop_at_layer=1)[:, 2:]
        x = (resid - resid.mean((0, 1))).flatten(0, 1)
        n, sides = model.cfg.d_vocab - SPECIAL, []
        for token in (tokens[:, 2:], tokens[:, 1:-1]):
            onehot = torch.nn.functional.one_hot(token.flatten() - SPECIAL, n).to(x)
            sides.append(onehot.T @ x / onehot.sum(0).clamp(min=1)[:, None])
        return cls(*sides)


class Head(NamedTuple):
    """A head of the second layer, and how much of its strongest pairs join a token with itself."""

    head: int
    same: dict[int | None, float]  # by branch, None their product; the mean over distances
    apart: float  # by how many standard deviations of all pairs the mean pair of one token stands out, in the product

    @property
    def branch(self) -> int | None:
        """Where that is most."""
        return max(self.same, key=self.same.__getitem__)


def rank_heads(model: BilinearTransformer, features: Features, k: int) -> list[Head]:
    """Rank the pairs of tokens of every head of the second layer; heads with the largest share come first."""
    heads = []
    for head in range(model.cfg.n_heads):
        same = {}
        for branch in (0, 1, None):
            found = [top_attention(model, 1, k, *features, head=head, distance=apart, branch=branch) for apart in APART]
            same[branch] = torch.stack([(one.left == one.right).double().mean() for one in found]).mean().item()
        heads.append(Head(head, same, stands_out(model, features, head)))
    return sorted(heads, key=lambda one: -max(one.same.values()))


def stands_out(model: BilinearTransformer, features: Features, head: int) -> float:
    """Return by how much pairs of one token differ from all pairs, in standard deviations of those."""
    attn, found = model.blocks[1].attn, []
    for apart in APART:
        forms = [attn.score_tensor(head, apart, branch).project(*features) for branch in (0, 1)]
        table = forms[0].dense() * forms[1].dense()
        found.append((table.diagonal().mean() - table.mean()) / table.std())
    return torch.stack(found).mean().item()


def strongest(model: BilinearTransformer, features: Features, head: Head, n: int, same: bool) -> tuple[Tensor, Tensor]:
    """Return the n strongest pairs at the middle distance, of any tokens or of one: at the query, before the key."""
    middle, k = APART[len(APART) // 2], len(features.here) ** 2 if same else n
    found = top_attention(model, 1, k, *features, head=head.head, distance=middle, branch=head.branch)
    which = ((found.left == found.right) | (not same)).nonzero()[:n, 0]
    return found.left[which], found.right[which]


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
    """What a head's scores see in windows of tokens.

    The stream is the mean, plus the features of the token that is there and of the one before, plus the rest. So the
    score of branch b between positions t and s holds `coefficient_b(t - s)[i, j] / (scale_t · scale_s)` for the tokens
    i at t and j before s, exactly.
    """

    tokens: Tensor
    resid: Tensor
    scores: Tensor  # [branch, row, query, key], of the head, as they are
    query: Tensor  # [row, query, token]: one over the norm's root where that token stands
    key: Tensor  # [row, key, token]: where it stood before
    forms: list[list[BilinearForm]]  # by branch and distance

    @classmethod
    def of(cls, model: BilinearTransformer, head: int, tokens: Tensor) -> "Running":
        """Run the model on windows."""
        attn = model.blocks[1].attn
        names = [f"blocks.1.attn.hook_rot_{side}" for side in ("q", "k", "q2", "k2")]
        names += ["blocks.1.hook_resid_pre", "blocks.1.ln1.hook_scale"]
        _, seen = model.run_with_cache(tokens, names_filter=names, return_cache_object=False)
        q, k, q2, k2 = (seen[name][:, :, head] for name in names[:4])
        scores, scale = attn.config.factor * torch.stack((q @ k.mT, q2 @ k2.mT)), seen[names[5]]
        here = torch.nn.functional.one_hot(tokens, model.cfg.d_vocab).to(scores)[..., SPECIAL:]
        before = torch.cat((torch.zeros_like(here[:, :1]), here[:, :-1]), 1)
        apart = range(tokens.shape[1])
        forms = [[attn.score_tensor(head, d, branch).detach() for d in apart] for branch in (0, 1)]
        return cls(tokens, seen[names[4]], scores, here / scale, before / scale, forms)

    def activity(self) -> Tensor:
        """Return how active each pair is, `Σ (query_i key_j)²` over all queries and the keys before them."""
        return torch.einsum("rqi,rqj->ij", self.query.pow(2), self.key.pow(2).cumsum(1))

    def removed(self, features: Features, left: Tensor, right: Tensor) -> Tensor:
        """Return what pairs add to the scores, `[branch, row, query, key]`."""
        n, both = self.tokens.shape[1], []
        apart = (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0)
        for forms in self.forms:
            values = torch.stack([form.apply(features.here[left], features.after[right]) for form in forms])
            both.append(torch.einsum("rqp,rkp,qkp->rqk", self.query[..., left], self.key[..., right], values[apart]))
        return torch.stack(both).tril()

    def cost(self, model: BilinearTransformer, head: int, removed: Tensor) -> float:
        """Return the loss when something is taken out of the head's scores."""
        product = (self.scores - removed).prod(0)

        def edit(scores: Tensor, hook: object) -> Tensor:
            scores = scores.clone()
            scores[:, head] = product
            return scores

        return loss_of(model, self.tokens, [("blocks.1.attn.hook_attn_scores", edit)], self.resid)


class Edits(NamedTuple):
    """What it costs, in nats, to take pairs out of a head's scores."""

    head: int
    same: float  # share of the strongest that join a token with itself
    own: float
    as_active: list[float]  # as many other pairs, each as active as the one it stands for
    as_large: list[float]  # the same pairs, scaled to take as much out of the scores


def matched(activity: Tensor, left: Tensor, right: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw for each pair one of the others that are nearest to it in how active they are."""
    n, logs = activity.shape[1], activity.flatten().clamp(min=1e-30).log()
    own = logs[left * n + right]
    logs[left * n + right] = torch.inf
    near = [(logs - one).abs().topk(NEAR, largest=False).indices for one in own]
    some = torch.stack([one[torch.randint(NEAR, (), generator=draw)] for one in near])
    return some // n, some % n


def edit_head(
    model: BilinearTransformer,
    features: Features,
    found: Head,
    tokens: Tensor,
    args: argparse.Namespace,
    one_token: bool,
) -> Edits:
    """Take the strongest pairs out of a head, and matched ones."""
    draw = torch.Generator().manual_seed(args.seed)
    head, run = found.head, Running.of(model, found.head, tokens)
    before, activity = run.cost(model, head, torch.zeros(())), run.activity()
    left, right = strongest(model, features, found, args.pairs, one_token)
    own = run.removed(features, left, right)

    def others() -> Iterator[tuple[float, float]]:
        for _ in range(args.controls):
            some = run.removed(features, *matched(activity, left, right, draw))
            size = (own.pow(2).sum((1, 2, 3)) / some.pow(2).sum((1, 2, 3)).clamp(min=1e-30)).sqrt()
            yield tuple(run.cost(model, head, one) - before for one in (some, some * size[:, None, None, None]))

    as_active, as_large = map(list, zip(*others(), strict=True))
    same = (left == right).double().mean().item()
    return Edits(head, same, run.cost(model, head, own) - before, as_active, as_large)


# -- table ------------------------------------------------------------------------------------------------------------


def share_below(own: float, others: list[float]) -> str:
    """Return the share of other edits that cost less, and the largest of them."""
    below = sum(one < own for one in others) / len(others)
    return f"{100 * below:.0f} % (mean {sum(others) / len(others):+.4f}, largest {max(others):+.4f})"


def head_rows(found: list[Head], costs: dict[tuple[int, int], float]) -> list[str]:
    """Return a row for each head: what the weights say, what its ablation costs."""
    shares = {
        one.head: " | ".join([f"{100 * share:.1f} %" for share in one.same.values()] + [f"{one.apart:+.2f}"])
        for one in found
    }
    lines = [
        "| head | pairs of one token: score 1 | score 2 | product | stand out by | ablation costs, nats |",
        "|---|---|---|---|---|---|",
    ]
    for layer, head in sorted(costs, key=lambda one: (-one[0], -costs[one])):
        lines.append(f"| {layer}.{head} | {shares[head] if layer else ' | | | '} | {costs[layer, head]:+.3f} |")
    return lines


def edit_rows(edits: list[Edits]) -> list[str]:
    """Return a row for each head whose strongest pairs were taken out."""
    lines = [
        "| head | of one token | costs, nats | more than others as active | more than the same, as large |",
        "|---|---|---|---|---|",
    ]
    return lines + [
        f"| 1.{one.head} | {100 * one.same:.0f} % | {one.own:+.5f} | {share_below(one.own, one.as_active)} "
        f"| {share_below(one.own, one.as_large)} |"
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
            f"Weights: of the {args.ranked} strongest pairs of a head of layer 1 (what a token leaves at its position, "
            "at the query; what it leaves right after it, at the key; in either score and in their product, mean over "
            f"distances {', '.join(map(str, APART))}), the share that joins a token with itself (by chance 0.4 %). "
            "Beside it: by how many standard deviations of all pairs the mean pair of one token stands out.",
            "",
            *heads,
            "",
            f"The {args.pairs} strongest pairs of a head taken out of its scores, exactly, against {args.controls} "
            f"times as many others: each is one of the {NEAR} nearest in how active they are. They are taken out as "
            "they are, and scaled to take as much out of the scores.",
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
    features = Features.of(model, random(args.means, model, draw))
    found, whole = rank_heads(model, features, args.ranked), loss_of(model, tokens)
    heads = [(layer, head) for layer in range(2) for head in range(model.cfg.n_heads)]
    costs = {head: loss_of(model, tokens, [without_head(*head)]) - whole for head in heads}
    print(*head_rows(found, costs), sep="\n", flush=True)
    edits = [edit_head(model, features, one, tokens, args, same) for one in found[:2] for same in (False, True)]
    text = report(args, whole, head_rows(found, costs), edit_rows(edits))
    print(text)
    if args.out is not None:
        args.out.write_text(text)


def random(n: int, model: BilinearTransformer, draw: torch.Generator) -> Tensor:
    """Return windows of BOS and random tokens that do not repeat on purpose."""
    tokens = torch.randint(SPECIAL, model.cfg.d_vocab, (n, model.cfg.n_ctx), generator=draw)
    tokens[:, 0] = 1
    return tokens


if __name__ == "__main__":
    main()
