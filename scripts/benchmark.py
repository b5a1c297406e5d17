"""Measure every speed claim of the project, each as a ratio against a named alternative timed in turn with it.

    python scripts/benchmark.py                  # everything, about half an hour on two cores
    python scripts/benchmark.py ranking spectra  # some of it: each part stands alone
    python scripts/benchmark.py --device cuda    # a quarter of an hour; `exact`, its first part, says whether to go on

Each pair of contestants runs alternately; the ratio is that of the medians. The machine should have nothing else to do.
"""

import argparse
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from benchmark_calls import CALLS
from timing import duel, row, timed
from torch import Tensor, nn

import bilens
from bilens import BilinearTensor, saes
from bilens.circuits.scoring import Shared
from bilens.tensor.extremes import two_strongest
from bilens.tensor.precision import SCREENS, product_rates, screen_dtype

K = 1000
SHAPES = {  # d_model, hidden, features, outputs timed
    "ts-medium": (512, 2048, 2048, 2048),
    "fw-medium": (1024, 4096, 8192, 118),
}


def environment(device: str) -> None:
    """Print what the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    print(f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}")
    if device != "cpu":
        print(f"device: {device}")
    rates = ", ".join(f"{rate / 1e9:.3g} in {dtype}" for dtype, rate in product_rates(torch.device(device)).items())
    print(f"CPU capability {torch.backends.cpu.get_cpu_capability()}; GFLOP/s of products: {rates}")
    print("\n| what | bilens | alternative | ratio | |\n|---|---|---|---|---|")


# -- exactness --------------------------------------------------------------------------------------------------------


def exact(device: str) -> None:
    """Rank a layer of integers in every screening dtype: the order must be brute force's, no error above its bound."""
    g = torch.Generator().manual_seed(0)
    shapes = ((24, 96), (96, 64), (96, 64), (80, 24), (300, 64))
    down, left, right, readers, writers = (torch.randint(-2, 3, shape, generator=g).double() for shape in shapes)
    Q = torch.stack([writers @ M @ writers.T for M in BilinearTensor(down, left, right).matrix(readers)])
    strength = (Q.abs() * (2 - torch.eye(len(writers)))).triu().flatten()
    strongest = strength.argsort(descending=True, stable=True)[:K]  # ties by index
    for dtype in SCREENS:
        B = BilinearTensor(*(part.to(device) for part in (down, left, right)))
        found = bilens.top_interactions(B, K, out=readers.to(device), inp=writers.to(device), screen=dtype)
        index = (found.out * len(writers) + found.left) * len(writers) + found.right
        if not torch.equal(index.cpu(), strongest):
            raise RuntimeError(f"screened in {dtype} on {device}, the ranking is not that of brute force")
        done = found.certificate
        what = f"largest error of screening in {dtype}, against its bound"
        note = f"order of {K}, with ties, as by brute force"
        ratio = done.bound / max(done.error, 1e-300)
        print(f"| {what} | {done.error:.3g} | {done.bound:.3g} | {ratio:.3g}x | {note} |", flush=True)


# -- whole-layer ranking ----------------------------------------------------------------------------------------------


def project_then_topk(B: BilinearTensor, readers: Tensor, writers: Tensor, k: int) -> Tensor:
    """Rank as published: project each output feature in turn, then take the top k of its dense matrix."""
    n, d = writers.shape
    product, Q = writers.new_empty(n, d), writers.new_empty(n, n)
    best = []
    for weights in readers @ B.down:
        M = (B.left * weights[:, None]).T @ B.right
        torch.mm(torch.mm(writers, M + M.T, out=product), writers.T, out=Q)
        Q.diagonal().div_(2)
        best.append(Q.triu_().abs_().flatten().topk(k).values)
    return torch.cat(best).topk(k).values


def random_layer(d: int, hidden: int, n: int, device: str) -> tuple[BilinearTensor, Tensor, Tensor]:
    """Return a layer, readers and unit writers of some size."""
    g = torch.Generator().manual_seed(0)
    B = BilinearTensor(
        *(torch.randn(shape, generator=g).to(device) for shape in ((d, hidden), (hidden, d), (hidden, d)))
    )
    readers, writers = torch.randn(n, d, generator=g), F.normalize(torch.randn(n, d, generator=g))
    return B, readers.to(device), writers.to(device)


def embedded_layer(layer: int, device: str) -> tuple[BilinearTensor, Tensor, Tensor]:
    """Return a layer of the embedded model with its SAEs."""
    model = bilens.load("bilens-mini")
    out, inp = (saes.load("bilens-mini", f"blocks.{layer}.hook_mlp_{side}") for side in ("out", "in"))
    B = model.blocks[layer].mlp.tensor().detach().to(device)
    return B, saes.readers(out).to(device), saes.writers(inp).to(device)


def product_rate(d: int, n: int, device: str) -> float:
    """Return the floating-point operations per second of products of this shape, in the dtype that is screened in."""
    dtype = screen_dtype(torch.device(device))
    a, b = torch.randn(4096, d, device=device).to(dtype), torch.randn(d, n, device=device).to(dtype)
    out = torch.empty(4096, n, device=device, dtype=dtype)
    seconds = median(timed(lambda: [torch.mm(a, b, out=out) for _ in range(5)], device) for _ in range(7)) / 5
    return 2 * 4096 * d * n / seconds


def ranking(device: str) -> None:
    """Compare (a): top 1000 of a whole layer against the published method, and against the product's roofline."""
    cases = [(f"bilens-mini layer {layer}", embedded_layer(layer, device), None) for layer in range(4)]
    cases += [(name, random_layer(*shape[:3], device), shape[3]) for name, shape in SHAPES.items()]
    for name, (B, readers, writers), outputs in cases:
        n_out, (n, d) = len(readers), writers.shape
        few = 4 if n > 4096 else 16
        some = readers if outputs is None else readers[:outputs]
        ours, theirs = duel(
            lambda B=B, some=some, writers=writers: bilens.top_interactions(B, K, out=some, inp=writers),
            lambda B=B, some=some, writers=writers, few=few: project_then_topk(B, some[:few], writers, K),
            runs=1 if n > 4096 else 3 if n > 1024 else 5, device=device,
        )  # fmt: skip
        ours, theirs = ours / len(some) * n_out, theirs / few * n_out
        roofline = n_out * n**2 * d / product_rate(d, n, device)
        extent = "" if len(some) == n_out else f", from {outputs} of {n_out} outputs"
        note = f"d {d}, {n} features; alternative from {few} outputs{extent}; {ours / roofline:.2f}x the roofline"
        row(f"top {K}, {name}", ours, theirs, note)


PEAK = """
import sys
sys.path.insert(0, "scripts")
import torch, benchmark
B, readers, writers = benchmark.embedded_layer(2, "cpu") if sys.argv[2] == "0" else benchmark.random_layer(
    *benchmark.SHAPES["fw-medium"][:3], "cpu")
small = benchmark.random_layer(64, 128, 128, "cpu")
run = {"ours": lambda B, r, w: benchmark.bilens.top_interactions(B, 1000, out=r, inp=w),
       "theirs": lambda B, r, w: benchmark.project_then_topk(B, r[:2], w, 1000)}[sys.argv[1]]
run(*small)
open("/proc/self/clear_refs", "w").write("5")
read = lambda name: next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))
before = read("VmRSS")
run(B, readers[:64] if sys.argv[2] == "1" else readers, writers)
print(read("VmHWM") - before)
"""


def memory(device: str) -> None:
    """Compare (f): peak memory of (a) beyond the weights, each in a process of its own."""
    folder = Path(__file__).parents[1]
    for which, name in enumerate(("bilens-mini layer 2", "fw-medium shape")):
        peaks = []
        for side in ("ours", "theirs"):
            command = [sys.executable, "-c", PEAK, side, str(which)]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
            peaks.append(int(done.stdout))
        ours, theirs = (f"{peak / 2**20:.0f} MiB" for peak in peaks)
        print(f"| peak memory, {name} | {ours} | {theirs} | {peaks[1] / peaks[0]:.2f}x | budget 1024 MiB |", flush=True)


# -- search for motifs ------------------------------------------------------------------------------------------------


@torch.no_grad()
def search(device: str) -> None:
    """Compare what `circuits.search` shares among outputs with each output's own matrix, product and whole spectrum."""
    B, readers, writers = embedded_layer(2, device)
    shared, some = Shared(B, writers, len(readers)), readers[:32]
    M = B.matrix(some)
    row("matrices of 32 outputs", *duel(lambda: shared.residual.of(some), lambda: B.matrix(some)), "from half the cube")
    row(
        "largest coefficient of each feature, 32 outputs",
        *duel(
            lambda: shared.frame.largest(shared.inner.of(some), 1 << 24),
            lambda: [(writers @ one @ writers.T).abs().amax(1) for one in M],
        ),
        "in a basis of features; alternative from dense matrices",
    )
    row("two strongest eigenvalues, 32 outputs", *duel(lambda: two_strongest(M), lambda: torch.linalg.eigvalsh(M)))


# -- spectra ----------------------------------------------------------------------------------------------------------


def every_spectrum(B: BilinearTensor, readers: Tensor, k: int) -> Tensor:
    """Decompose the matrix of each output feature, and take those with the largest two eigenvalues."""
    scores = [torch.linalg.eigvalsh(B.matrix(some)).abs().topk(2).values.sum(1) for some in readers.split(16)]
    return torch.cat(scores).topk(k).indices


def spectra(device: str) -> None:
    """Compare (b): the outputs with the largest top-2 eigenvalues against eigvalsh on each."""
    cases = [(f"bilens-mini layer {layer}", embedded_layer(layer, device)) for layer in range(4)]
    cases.append(("ts-medium", random_layer(*SHAPES["ts-medium"][:3], device)))
    for name, (B, readers, _) in cases:
        few = readers[: 256 if len(readers) > 1024 else None]
        ours, theirs = duel(
            lambda B=B, readers=readers: bilens.top_outputs(B, readers, 20, by="top2"),
            lambda B=B, few=few: every_spectrum(B, few, 20), runs=3, device=device,
        )  # fmt: skip
        decomposed = bilens.top_outputs(B, readers, 20, by="top2").decomposed
        note = f"20 of {len(readers)} outputs, {decomposed} decomposed; alternative from {len(few)}"
        row(f"top-2 eigenvalues, {name}", ours, theirs * len(readers) / len(few), note)


# -- the hooked model -------------------------------------------------------------------------------------------------


def lens_model(model: bilens.BilinearTransformer) -> nn.Module:
    """Put the weights of a bilinear model into transformer_lens' HookedTransformer."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = model.cfg
    hooked = HookedTransformer(HookedTransformerConfig(
        n_layers=cfg.n_layers, d_model=cfg.d_model, n_ctx=cfg.n_ctx, d_head=cfg.d_head, n_heads=cfg.n_heads,
        d_mlp=cfg.d_hidden, d_vocab=cfg.d_vocab, act_fn="silu", gated_mlp=True, normalization_type="RMSPre",
        eps=cfg.eps, positional_embedding_type="rotary", rotary_dim=cfg.d_head, use_hook_mlp_in=True, seed=0,
    ))  # fmt: skip
    state = {key: torch.zeros_like(value) for key, value in hooked.state_dict().items() if "b_" in key.split(".")[-1]}
    state |= {"embed.W_E": model.W_E, "unembed.W_U": model.W_U}
    for i, block in enumerate(model.blocks):
        state |= {f"blocks.{i}.attn.W_{name}": getattr(block.attn, f"W_{name}") for name in "QKVO"}
        state |= {f"blocks.{i}.mlp.W_{name}": getattr(block.mlp, f"W_{name}") for name in ("gate", "in", "out")}
    hooked.load_state_dict(state, strict=False)
    for block in hooked.blocks:
        block.mlp.act_fn = nn.Identity()
    return hooked.eval()


class Plain(nn.Module):
    """The same model as a plain nn.Module: what a forward pass costs without hook points."""

    def __init__(self, model: bilens.BilinearTransformer):
        super().__init__()
        self.model, cfg = model, model.cfg
        frequencies = 10000 ** (-torch.arange(0, cfg.d_head, 2, device=model.W_E.device) / cfg.d_head)
        angles = torch.arange(cfg.n_ctx, device=model.W_E.device)[:, None] * frequencies
        self.cos, self.sin = angles.cos(), angles.sin()

    def norm(self, x: Tensor) -> Tensor:
        """Divide by the root mean square."""
        return x / (x.pow(2).mean(-1, keepdim=True) + self.model.cfg.eps).sqrt()

    def rotate(self, x: Tensor) -> Tensor:
        """Apply rotary positions to `[batch, head, seq, d_head]`."""
        first, second = x.chunk(2, -1)
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        cfg, x = self.model.cfg, self.model.embed(tokens)
        for block in self.model.blocks:
            q, k, v = (
                part.view(*part.shape[:2], cfg.n_heads, -1).transpose(1, 2)
                for part in block.attn.qkv(self.norm(x)).chunk(3, -1)
            )
            z = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
            x = x + cfg.attention.scale * block.attn.o(z.transpose(1, 2).flatten(2))
            left, right = block.mlp.w(self.norm(x)).chunk(2, -1)
            x = x + block.mlp.p(left * right)
        return self.model.unembed(self.norm(x))


@torch.no_grad()
def forward(device: str) -> None:
    """Compare (c) and (d): cached forward passes against transformer_lens, plain ones against a plain module."""
    model = bilens.load("bilens-mini", device=device)
    theirs, plain = lens_model(model).to(device), Plain(model)
    pair = [f"blocks.{layer}.hook_mlp_{side}" for layer in range(model.cfg.n_layers) for side in ("in", "out")]
    for batch, seq in ((1, 64), (16, 256)):
        g = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.cfg.d_vocab, (batch, seq), generator=g).to(device)
        logits, runs = model(tokens), 41 if batch == 1 else 15
        torch.testing.assert_close(theirs(tokens), logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(plain(tokens), logits, rtol=1e-3, atol=1e-3)
        for what, names in (("every hook_mlp_in and hook_mlp_out", lambda name: name in pair), ("everything", None)):
            times = duel(
                lambda tokens=tokens, names=names: model.run_with_cache(tokens, names_filter=names),
                lambda tokens=tokens, names=names: theirs.run_with_cache(tokens, names_filter=names), runs, device,
            )  # fmt: skip
            row(f"forward caching {what}", *times, f"against HookedTransformer, {batch} x {seq} tokens")
        times = duel(lambda tokens=tokens: model(tokens), lambda tokens=tokens: plain(tokens), 2 * runs, device)
        row("forward without hooks", *times, f"against a plain nn.Module, {batch} x {seq} tokens")


def imports(device: str) -> None:
    """Compare (e): importing bilens against importing torch, each in a process of its own."""

    def start(module: str) -> None:
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)

    row("import bilens", *duel(lambda: start("bilens"), lambda: start("torch"), runs=9), "against import torch")


PARTS = {
    "exact": exact,
    "ranking": ranking,
    "memory": memory,
    "search": search,
    "spectra": spectra,
    "forward": forward,
    "imports": imports,
    **CALLS,
}


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"PART must be any of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    environment(args.device)
    for name in args.parts or PARTS:
        PARTS[name](args.device)


if __name__ == "__main__":
    main()
