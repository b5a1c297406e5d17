"""Find the circuit that tells "she" from "he" in the last layer of a bilinear model, and test it on held-out stories.

    python scripts/pronoun_circuit.py runs/annealed/model --data tinystories.train.parquet

The method of `tutorials/2_gated_to_bilinear.ipynb` on real text: the inputs of the MLP before either pronoun, their
mean and the direction in which they differ, the product of the two read from the weights, then taken out of the running
model. The margin is she - he, signed by which of them comes.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from corpora import Ends, encode, held_out_rows, is_held_out, read_corpus
from torch import Tensor

import bilens
from bilens.models.logits import logit_directions
from bilens.tensor.statistics import pearson

BATCH = 32


class Pronouns:
    """Texts in which one of two words comes next, and where: the MLP's inputs and the margin between the two there."""

    def __init__(self, model: bilens.BilinearTransformer, texts: list[str], words: tuple[str, str]):
        self.model, self.layer = model, model.cfg.n_layers - 1
        self.words = [model.to_single_token(word) for word in words]
        ends = Ends(model.bos_id, model.eos_id)
        self.tokens, self.mask = held_out_rows(
            encode(model.tokenizer.backend_tokenizer, texts, ends), model.cfg.n_ctx, ends
        )
        after = self.tokens[:, 1:]
        self.where = torch.zeros_like(self.mask)
        self.where[:, :-1] = ((after == self.words[0]) | (after == self.words[1])) & self.mask[:, 1:]
        self.sign = torch.where(after[self.where[:, :-1]] == self.words[0], 1.0, -1.0)

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield tokens, mask and the positions before one of the words."""
        return zip(*(part.split(BATCH) for part in (self.tokens, self.mask, self.where)), strict=True)

    def inputs(self) -> Tensor:
        """Return what enters the MLP there, and what the last norm divides by, `[position, d_model + 1]`."""
        names, found = [f"blocks.{self.layer}.hook_mlp_in", "ln_final.hook_scale"], []
        for tokens, mask, where in self.batches():
            _, cache = self.model.run_with_cache(tokens, attention_mask=mask, names_filter=names)
            found.append(torch.cat([cache[name][where] for name in names], -1))
        return torch.cat(found)

    def margins(self) -> Tensor:
        """Return the first word's logit over the second's."""
        found = []
        for tokens, mask, where in self.batches():
            logits = self.model(tokens, attention_mask=mask)[where]
            found.append(logits[:, self.words[0]] - logits[:, self.words[1]])
        return torch.cat(found)


@contextmanager
def without_product(pronouns: Pronouns, directions: Tensor) -> Iterator[None]:
    """Take `2 a b B(d_0, d_1)` out of what the layer writes, a and b the input's coordinates along two directions."""
    model, name = pronouns.model, f"blocks.{pronouns.layer}"
    term = 2 * model.blocks[pronouns.layer].mlp.tensor().polar(*directions)
    coordinates, seen = torch.linalg.pinv(directions), {}

    def look(x: Tensor, hook: object) -> None:
        seen["product"] = (x @ coordinates).prod(-1, keepdim=True)

    def edit(y: Tensor, hook: object) -> Tensor:
        return y - seen["product"] * term

    with model.hooks(fwd_hooks=[(f"{name}.hook_mlp_in", look), (f"{name}.hook_mlp_out", edit)]):
        yield


def changes(pronouns: Pronouns, directions: Tensor, before: Tensor) -> Tensor:
    """Return what the edit does to the margins."""
    with without_product(pronouns, directions):
        return pronouns.margins() - before


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Read the directions off training stories, the circuit off the weights, and test it on held-out stories."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a Hub repository or bilens-mini: a bilinear model")
    parser.add_argument("--data", required=True, help="a corpus as for train_language.py, split as there")
    parser.add_argument("--words", nargs=2, default=("she", "he"))
    parser.add_argument(
        "--texts", type=int, nargs=2, default=(400, 160), help="to read directions from, and to test on"
    )
    parser.add_argument("--controls", type=int, default=20, help="random directions in place of the difference")
    parser.add_argument("--holdout", type=float, default=0.01)
    args = parser.parse_args(arguments)
    model, (texts, _) = bilens.load(args.model), read_corpus(args.data)
    read = [text for text in texts if not is_held_out(text, args.holdout)][: args.texts[0]]
    seen = Pronouns(model, read, args.words)
    test = Pronouns(model, [text for text in texts if is_held_out(text, args.holdout)][: args.texts[1]], args.words)
    x = seen.inputs()[:, :-1]
    difference = (x[seen.sign > 0].mean(0) - x[seen.sign < 0].mean(0)) / 2
    directions = torch.stack((x.mean(0), difference))

    one, other = logit_directions(model, test.words)
    u = one - other
    Q = model.blocks[test.layer].mlp.tensor().project(inp=directions).matrix(u)
    print(f"mean × difference {2 * Q[0, 1]:.3f}, difference × difference {Q[1, 1]:.3f}, mean × mean {Q[0, 0]:.3f}")
    before = test.margins()
    change = changes(test, directions, before)
    inputs = test.inputs()
    coordinates = inputs[:, :-1] @ torch.linalg.pinv(directions)
    predicted = -2 * Q[0, 1] * coordinates.prod(-1) / inputs[:, -1]
    after = before + change
    print(
        f"margin at {len(before)} positions {(test.sign * before).mean():.3f}, without the product "
        f"{(test.sign * after).mean():.3f}; predicted and measured change correlate {pearson(predicted, change):.3f}, "
        f"slope {predicted @ change / (predicted @ predicted):.2f}"
    )
    generator, length = torch.Generator().manual_seed(0), difference.norm()
    controls = []
    for _ in range(args.controls):
        other = torch.randn(len(difference), generator=generator)
        pair = torch.stack((directions[0], other * length / other.norm()))
        controls.append((test.sign * changes(test, pair, before)).mean().item())
    if controls:
        print(f"{len(controls)} random directions instead: margin {min(controls):+.3f} to {max(controls):+.3f}")


if __name__ == "__main__":
    main()
