"""Parts of `benchmark.py`: the calls that users make, each beside a forward pass or another way, and growth."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial

import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from timing import duel, row, timed
from torch import Tensor

import bilens
from bilens import circuits, saes

TEXTS = 2000
TEXT = "the movie was not very good , but i liked the actors and the music ."


def texts(n: int) -> list[str]:
    """Return n statements."""
    pairs = circuits.minimal_pairs()
    every = [text for pair in pairs for text in (pair.plain, pair.negated)]
    return (every * -(-n // len(every)))[:n]


def reading(model: bilens.BilinearTransformer, some: Sequence[str]) -> Callable[[], None]:
    """Return a function that does what any look at text cannot do without: a forward pass, 32 texts at a time."""
    tokens = model.to_tokens(sorted(some, key=len, reverse=True))

    @torch.no_grad()
    def read() -> None:
        for part in tokens.split(32):
            model(part[:, : int((part != model.eos_id).sum(1).max()) + 1])

    return read


def beside(what: str, call: Callable, plain: Callable, note: str, device: str, runs: int = 3) -> None:
    """Print a call beside what is in the note."""
    row(what, *duel(call, plain, runs, device), note)


def calls(device: str) -> None:
    """Compare calls on the embedded model with the forward pass over the same text, or with another way to the same."""
    model = bilens.load("bilens-mini", device=device)
    lens, generator = circuits.FeatureLayer.load(model, 2), torch.Generator().manual_seed(0)
    some, many = texts(200), texts(TEXTS)
    n_tokens = int((model.to_tokens(some) != model.eos_id).sum())
    plain = reading(model, some)
    sites = {hook: saes.load("bilens-mini", hook) for hook in (lens.hook_in, lens.hook_out)}
    beside("FeatureLayer.load", lambda: circuits.FeatureLayer.load(model, 2),
           lambda: [SAE.load_from_disk(saes.sae_folder("bilens-mini", hook)) for hook in sites],
           "with cards; against SAELens' reading of the two SAEs", device)  # fmt: skip
    beside("saes.collect, two SAEs", lambda: saes.collect(model, sites, some), plain,
           f"200 texts, {n_tokens} tokens; against the forward pass", device)  # fmt: skip
    beside("saes.evaluate", lambda: saes.evaluate(model, lens.inp, some), plain, "the same", device)
    beside("circuits.predict_all, 8 features", lambda: circuits.predict_all(lens, range(8), many), reading(model, many),
           f"{TEXTS} texts; against the forward pass, which goes on to the logits", device, 1)  # fmt: skip
    _, cache = model.run_with_cache(some[0], names_filter=[lens.hook_in, lens.hook_out])
    left, right = lens.codes(cache[lens.hook_in])[0, -1].topk(2).indices.tolist()  # a pair that the texts have
    out = int(lens.outputs(cache[lens.hook_in], cache[lens.hook_out])[0, -1].argmax())
    circuit = circuits.Circuit(2, out, left, right)
    protocol = circuits.Protocol(n_pairs=20, n_directions=5, max_windows=16)
    beside("circuits.test", lambda: circuits.test(lens, circuit, some, protocol, generator=generator), plain,
           "20 pairs, 5 directions, 16 windows; against one forward pass over 200 texts", device, 1)  # fmt: skip
    attribution(model, lens, device)


def attribution(model: bilens.BilinearTransformer, lens: circuits.FeatureLayer, device: str) -> None:
    """Compare what explains single positions with the forward pass over the text."""
    tokens = model.to_tokens(TEXT)
    n, plain = tokens.shape[1], lambda: model(tokens)
    feature = int(lens.out.encode(model.run_with_cache(tokens)[1][lens.hook_out])[0, 1:].amax(0).argmax())

    def attribute(position: int | None) -> Callable:
        return lambda: bilens.attribute(model, TEXT, 2, feature, inp=lens.inp, out=lens.out, position=position)

    every = timed(attribute(None), device)
    beside("bilens.attribute, all positions", attribute(None), plain,
           f"{n} tokens, about {n / every:.0f} a second; against the forward pass", device, 5)  # fmt: skip
    beside("bilens.attribute, one position", attribute(-1), plain, "the same", device, 5)
    before = random_sae(model, "blocks.2.hook_resid_pre").to(device)
    beside("circuits.why_attend, one pair, all heads",
           lambda: circuits.why_attend(model, TEXT, 2, query=-1, key=1, inp=before), plain,
           "the same; a random SAE", device, 5)  # fmt: skip
    expand = circuits.paths.expand
    beside("circuits.paths.expand, all positions", lambda: expand(model, TEXT), plain, "the same", device, 5)


def random_sae(model: bilens.BilinearTransformer, hook: str) -> TopKSAE:
    """Return an SAE with random weights."""
    cfg = TopKSAEConfig(k=32, d_in=model.cfg.d_model, d_sae=4 * model.cfg.d_model)
    cfg.metadata.hook_name = hook
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TopKSAE(cfg).eval()


def generation(device: str) -> None:
    """Compare generation with keys and values kept and without."""
    model = bilens.load("bilens-mini", device=device)
    for batch in (1, 16):
        tokens = model.to_tokens("the").repeat(batch, 1)
        one, other = (
            partial(model.generate, tokens, 60, temperature=0, stop_at_eos=False, use_past_kv_cache=kept)
            for kept in (True, False)
        )
        beside(
            f"generation, {batch} x 60 tokens",
            one,
            other,
            "against generation without cache",
            device,
            3 if batch == 1 else 1,
        )


# -- the main job -----------------------------------------------------------------------------------------------------

STAGES = """
import contextlib, json, sys, time
began = time.perf_counter()
from rich.console import Console
from bilens.__main__ import main
seen, plain = [], Console.status

@contextlib.contextmanager
def status(self, what, **options):
    start = time.perf_counter()
    with plain(self, what, **options) as found:
        yield found
    seen.append((what, time.perf_counter() - start))

Console.status = status
main(sys.argv[1:])
print("\\n" + json.dumps([*seen, ("the main job", time.perf_counter() - began)]))
"""


def main_job(device: str) -> None:
    """Time the stages of `python -m bilens`, beside what a process that imports torch takes."""

    def run(code: str, *arguments: str) -> str:
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        return done.stdout

    torch_alone = timed(lambda: run("import torch"))
    with tempfile.TemporaryDirectory() as folder:
        said = run(STAGES, "--json", "--out", f"{folder}/report.html")
    for what, seconds in json.loads(said.splitlines()[-1]):
        row(what.removesuffix(" ..."), seconds, torch_alone, "against a process that imports torch")


# -- growth -----------------------------------------------------------------------------------------------------------


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Fit `seconds ~ size ** exponent` by least squares of the logarithms."""
    x, y = (torch.tensor(part, dtype=torch.float64).log() for part in (sizes, seconds))
    x, y = x - x.mean(), y - y.mean()
    return float(x.dot(y) / x.dot(x))


Sized = Callable[[int], Callable]


def grows(what: str, sizes: Sequence[int], ours: Sized, plain: str, theirs: Sized, device: str) -> None:
    """Print how a call and its alternative grow with a size: their exponents side by side."""
    times = [duel(ours(size), theirs(size), 3, device) for size in sizes]
    one, other = (exponent(sizes, part) for part in zip(*times, strict=True))
    told = f"{what}, {sizes[0]} to {sizes[-1]} | exponent {one:.2f} | exponent {other:.2f}"
    print(f"| {told} | {times[-1][1] / times[-1][0]:.2f}x | against {plain}; ratio at the largest |", flush=True)


def random_model(device: str, n_layers: int = 4, d_model: int = 128) -> bilens.BilinearTransformer:
    """Return a model with random weights."""
    cfg = bilens.BilinearConfig(
        n_layers=n_layers, d_model=d_model, n_ctx=1024, d_vocab=512,
        attention=bilens.AttentionConfig.of_width(d_model, n_heads=4), mlp=bilens.MLPConfig(d_hidden=4 * d_model),
    )  # fmt: skip
    return bilens.BilinearTransformer(cfg).to(device).eval()


@torch.no_grad()
def growth(device: str) -> None:
    """Fit how time grows with layers, width, features and tokens."""
    from benchmark import project_then_topk, random_layer

    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(512, (4, 1024), generator=g).to(device)

    def cached(model: bilens.BilinearTransformer, ids: Tensor) -> Callable:
        return lambda: model.run_with_cache(ids)

    def plain(model: bilens.BilinearTransformer, ids: Tensor) -> Callable:
        return lambda: model(ids)

    made = random_model(device)
    grows("forward with every hook cached, by tokens", (64, 128, 256, 512), lambda n: cached(made, tokens[:, :n]),
          "the forward pass without hooks", lambda n: plain(made, tokens[:, :n]), device)  # fmt: skip
    for what, sizes, name in (("layers", (2, 4, 8, 16), "n_layers"), ("width", (64, 128, 256, 512), "d_model")):
        models = {size: random_model(device, **{name: size}) for size in sizes}
        grows(f"forward with every hook cached, by {what}", sizes, lambda n, of=models: cached(of[n], tokens[:, :128]),
              "the forward pass without hooks", lambda n, of=models: plain(of[n], tokens[:, :128]), device)  # fmt: skip

    def ranking(B: bilens.BilinearTensor, readers: Tensor, writers: Tensor) -> Callable:
        return lambda: bilens.top_interactions(B, 100, out=readers, inp=writers)

    def published(B: bilens.BilinearTensor, readers: Tensor, writers: Tensor) -> Callable:
        return lambda: project_then_topk(B, readers, writers, 100)

    for what, sizes, shape in (
        ("features before the MLP", (256, 512, 1024, 2048), lambda n: (128, 512, n)),
        ("width", (64, 128, 256, 512), lambda d: (d, 4 * d, 1024)),
    ):
        layers = {size: random_layer(*shape(size), device) for size in sizes}
        layers = {size: (B, readers[:64], writers) for size, (B, readers, writers) in layers.items()}
        grows(f"ranking of 64 outputs, by {what}", sizes, lambda n, of=layers: ranking(*of[n]),
              "project, then topk", lambda n, of=layers: published(*of[n]), device)  # fmt: skip


CALLS = {"calls": calls, "generation": generation, "main": main_job, "growth": growth}
