"""A self-test of a hooked model: do its hooks, masks, caches and tensors mean what they say?"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.tensor.polynomials import degree
from bilens.tensor.records import Record, Rows

from .mlp import MLP
from .transformer import BilinearTransformer

TOLERANCE = 1e-9  # relative, in float64
HIGHEST = 20  # degree that is still measured
SEQ, SHORT = 12, 5  # tokens of the texts that are run
UNMIXED = ("bilinear", "squared")  # patterns that are products of scores


@dataclass(frozen=True)
class Check(Record):
    """What was checked, whether it holds, and what was found."""

    name: str
    passed: bool
    found: str


class _Bench:
    """The model in float64, random tokens, and one run with everything looked at."""

    def __init__(self, model: BilinearTransformer, generator: torch.Generator | None):
        self.model = copy.deepcopy(model).double().eval()
        self.model.reset_hooks(including_permanent=True)
        self.cfg, self.generator = model.cfg, generator
        seq = min(SEQ, self.cfg.n_ctx)
        device = self.model.W_E.device
        self.tokens = torch.randint(self.cfg.d_vocab, (2, seq), generator=generator).to(device)
        self.logits = self.model(self.tokens)
        _, self.cache = self.model.run_with_cache(self.tokens, return_cache_object=False)

    def frozen(self, seq: int) -> list[tuple]:
        """Return hooks that keep every norm's divisor as it is in a run on one text of that length."""
        _, cache = self.model.run_with_cache(self.tokens[:1, :seq], return_cache_object=False)
        names = [name for name in cache if name.endswith("hook_scale")]
        return [(name, lambda scale, hook, kept=cache[name]: kept.expand_as(scale)) for name in names]


@torch.no_grad()
def selftest(model: BilinearTransformer, generator: torch.Generator | None = None) -> Rows[Check]:
    """Check a model against what its interface promises, on random tokens and in float64.

    Each hook point is hit by noise: nothing that fires before it may change, and the logits must. Degrees are measured
    along random lines (`bilens.degree`), with the norms' divisors held where a run left them.

    Cost: a copy of the model in float64, and about 30 runs of 24 tokens for each layer.

    Args:
        model: Any model; it is left as it is.
        generator: Source of tokens and noise, on the CPU; torch's default one if `None`.
    """
    bench = _Bench(model, generator)
    checks = [_fires(bench), _is_read(bench), _identity(bench), _stream(bench), *_heads(bench)]
    checks += [_padded(bench), _generation(bench), *_tensors(bench)]
    checks += [*_mlp_degrees(bench), *_attention_degrees(bench), _whole_degree(bench)]
    return Rows(checks)


def _worst(name: str, differences: dict[str, float], found: str) -> Check:
    """Return a check of relative differences, which names the greatest."""
    where = max(differences, key=differences.get)
    return Check(name, differences[where] <= TOLERANCE, f"{found}; the worst is {differences[where]:.1e}, {where}")


def _gap(got: Tensor, expected: Tensor) -> float:
    """Return the greatest difference, relative to the largest value; that of masked scores is none."""
    seen = torch.isfinite(expected)
    if got.shape != expected.shape or not torch.equal(seen, torch.isfinite(got)):
        return float("inf")
    return ((got - expected)[seen].abs().max() / expected[seen].abs().max().clamp(min=1e-30)).item()


# -- hooks ------------------------------------------------------------------------------------------------------------


def _fires(bench: _Bench) -> Check:
    silent = sorted(set(bench.model.hook_dict) - set(bench.cache))
    found = f"{len(bench.cache)} hook points" if not silent else f"silent: {', '.join(silent)}"
    return Check("every hook fires", not silent, found)


def _is_read(bench: _Bench) -> Check:
    """Hit each hook point with noise: what fired before it stays, the logits do not."""
    order, wrong = list(bench.cache), []
    reference = bench.model.run_with_hooks(bench.tokens, fwd_hooks=[(lambda name: True, lambda x, hook: x)])
    for index, name in enumerate(order):

        def hit(x: Tensor, hook: object) -> Tensor:
            size = x[torch.isfinite(x)].abs().max()
            return x + size * torch.randn(x.shape, generator=bench.generator, dtype=x.dtype).to(x.device)

        with bench.model.hooks(fwd_hooks=[(name, hit)]):
            logits, cache = bench.model.run_with_cache(bench.tokens, return_cache_object=False)
        moved = [before for before in order[:index] if not torch.equal(cache[before], bench.cache[before])]
        if moved or torch.equal(logits, reference):
            wrong.append(f"{name} changes {moved[0]}, which fires before it" if moved else f"{name} is not read")
    found = f"noise at each of {len(order)} changes the logits and nothing before it" if not wrong else "; ".join(wrong)
    return Check("and is read where it says", not wrong, found)


def _identity(bench: _Bench) -> Check:
    with_hooks = bench.model.run_with_hooks(bench.tokens, fwd_hooks=[(lambda name: True, lambda x, hook: x)])
    return _worst("identity hooks change nothing", {"logits": _gap(with_hooks, bench.logits)}, "at every hook point")


def _stream(bench: _Bench) -> Check:
    """Check that each block starts with what the last one left, and that its outputs are what is added."""
    cache, differences = bench.cache, {}
    x = start = cache[bench.cfg.start_hook]
    for layer, block in enumerate(bench.model.blocks):
        at = f"blocks.{layer}.hook_"
        differences[f"{at}resid_pre"] = _gap(cache[f"{at}resid_pre"], block.entering(x, start))
        x = cache[f"{at}resid_pre"] + cache[f"{at}attn_out"]
        if isinstance(block.mlp, MLP):
            differences[f"{at}resid_mid"] = _gap(cache[f"{at}resid_mid"], x)
            x = cache[f"{at}resid_mid"] + cache[f"{at}mlp_out"]
        differences[f"{at}resid_post"] = _gap(cache[f"{at}resid_post"], x)
        x = cache[f"{at}resid_post"]
    return _worst("the stream is the sum of what is added", differences, f"{len(differences)} sums")


def _heads(bench: _Bench) -> Iterator[Check]:
    cache, differences = bench.cache, {}
    for layer, block in enumerate(bench.model.blocks):
        at = f"blocks.{layer}"
        out = block.ln1_post(cache[f"{at}.attn.hook_result"].sum(2) + block.attn.b_O)
        if bench.cfg.stream.interpolate:
            out = out - block.attn.config.scale * cache[f"{at}.hook_resid_pre"]
        differences[f"{at}.hook_attn_out"] = _gap(cache[f"{at}.hook_attn_out"], out)
    yield _worst("attention's output is the sum of its heads", differences, f"{len(differences)} layers")


# -- texts ------------------------------------------------------------------------------------------------------------


def _padded(bench: _Bench) -> Check:
    """Check a short text between paddings of either side against the text alone."""
    seq, short = bench.tokens.shape[1], min(SHORT, bench.tokens.shape[1])
    alone, differences = bench.model(bench.tokens[1:, :short]), {}
    for side, where in (("right", slice(0, short)), ("left", slice(seq - short, seq))):
        tokens, mask = bench.tokens.clone(), torch.ones_like(bench.tokens)
        mask[1] = 0
        mask[1, where] = 1
        tokens[1, where] = bench.tokens[1, :short]
        got = bench.model(tokens, attention_mask=mask)
        differences[f"padding on the {side}"] = max(_gap(got[1:, where], alone), _gap(got[:1], bench.logits[:1]))
    return _worst("a padded text gives what it gives alone", differences, f"{short} of {seq} tokens")


def _generation(bench: _Bench) -> Check:
    start = bench.tokens[:, : bench.tokens.shape[1] // 2 or 1]
    new = min(bench.cfg.n_ctx - start.shape[1], SEQ)
    options = {"temperature": 0, "stop_at_eos": False}
    with_cache, without = (bench.model.generate(start, new, use_past_kv_cache=use, **options) for use in (True, False))
    same = torch.equal(with_cache, without)
    found = f"{new} greedy tokens are {'the same' if same else 'others'}"
    return Check("generation with a cache is that without", same, found)


# -- polynomials ------------------------------------------------------------------------------------------------------


def _tensors(bench: _Bench) -> Iterator[Check]:
    if bench.cfg.mlp is None:
        return
    differences, refused = {}, []
    for layer, block in enumerate(bench.model.blocks):
        x = bench.cache[f"blocks.{layer}.hook_mlp_in"]
        if bench.cfg.mlp.quadratic:
            differences[f"blocks.{layer}.mlp"] = _gap(block.mlp.tensor().apply(x), block.mlp(x))
        else:
            refused.append(_refusal(block.mlp))
    if refused:
        yield Check("an MLP that is no tensor says so", all(refused), refused[0] or "tensor() returned something")
    else:
        yield _worst("tensor() computes what the MLP does", differences, f"{len(differences)} layers")


def _refusal(mlp: MLP) -> str:
    try:
        mlp.tensor()
    except TypeError as error:
        return str(error)
    return ""


def _degree_check(name: str, f: "MLP | _Stretch", expected: int | None, bench: _Bench) -> Check:
    """Measure a degree; a polynomial may have a lower one where its weights are zero."""
    width, scale = (f.width, f.scale) if isinstance(f, _Stretch) else (bench.cfg.d_model, 1.0)
    options = {"max_degree": (expected or 6) + 1, "lines": 4, "scale": scale, "generator": bench.generator}
    found = degree(f, width, **options)
    passed = found.degree is None if expected is None else found.degree is not None and found.degree <= expected
    words = "no polynomial" if expected is None else f"degree {expected}"
    return Check(name, passed, f"measured {found!r}; {words} by its shape")


def _mlp_degrees(bench: _Bench) -> Iterator[Check]:
    if bench.cfg.mlp is not None:
        expected = _mlp_degree(bench)
        for layer, block in enumerate(bench.model.blocks):
            yield _degree_check(f"degree of blocks.{layer}.mlp", block.mlp, expected, bench)


def _attention_degrees(bench: _Bench) -> Iterator[Check]:
    """Measure what each layer's attention adds, as a function of the stream, with norms held."""
    for layer in range(bench.cfg.n_layers):
        run = _Stretch(bench, layer, layer + 1, f"blocks.{layer}.hook_attn_out")
        yield _degree_check(f"degree of blocks.{layer}.attn", run, _attention_degree(bench), bench)


def _whole_degree(bench: _Bench) -> Check:
    """Measure the stream after as many blocks as can be, as a function of its start, and say what all of them give."""
    degrees = [1]
    for _ in range(bench.cfg.n_layers):
        after = _after(degrees[-1], _attention_degree(bench), _mlp_degree(bench))
        degrees.append(after)
        if after is None:
            break
    blocks = max((i for i, one in enumerate(degrees) if one is not None and one <= HIGHEST), default=0)
    blocks = blocks or 1
    run = _Stretch(bench, 0, blocks, f"blocks.{blocks - 1}.hook_resid_post")
    expected = degrees[blocks]
    if expected is not None and expected > HIGHEST:
        return Check("degree of the model, norms held", True, f"{degrees[-1]} by its shape: too high to be measured")
    check = _degree_check("degree of the model, norms held", run, expected, bench)
    whole = "no polynomial" if degrees[-1] is None else f"degree {degrees[-1]}"
    return Check(check.name, check.passed, f"{blocks} of {bench.cfg.n_layers} blocks: {check.found}; all: {whole}")


class _Stretch:
    """Some blocks as a function of the stream that enters them, `[n, seq · d_model]`, their norms held."""

    def __init__(self, bench: _Bench, start: int, stop: int, hook: str):
        self.bench, self.span, self.hook = bench, {"start_at_layer": start, "stop_at_layer": stop}, hook
        self.seq = min(3, bench.tokens.shape[1])
        self.width, self.hooks = self.seq * bench.cfg.d_model, bench.frozen(self.seq)
        entered = bench.cache[f"blocks.{start}.hook_resid_pre"]
        self.scale = entered.square().mean().sqrt().item()  # random points are as large as what is there in a run

    def __call__(self, x: Float[Tensor, "n inp"]) -> Float[Tensor, "n out"]:
        x, seen = x.unflatten(-1, (self.seq, -1)), {}
        tokens: Int[Tensor, "n seq"] = self.bench.tokens[:1, : self.seq].expand(len(x), -1)
        watch = (self.hook, lambda value, hook: seen.update(out=value))
        self.bench.model.run_with_hooks(x, tokens=tokens, fwd_hooks=[*self.hooks, watch], **self.span)
        return seen["out"].flatten(1)


def _mlp_degree(bench: _Bench) -> int | None:
    mlp = bench.cfg.mlp
    if mlp is None or mlp.act == "identity":
        return 1
    return 2 if mlp.quadratic else None


def _attention_degree(bench: _Bench) -> int | None:
    """Two scores of degree two, times a value; a softmax, or a division by the row's sum, is no polynomial."""
    attention = bench.cfg.attention
    return 5 if attention.kind in UNMIXED and not attention.normalize else None


def _after(before: int | None, attention: int | None, mlp: int | None) -> int | None:
    return None if None in (before, attention, mlp) else before * attention * mlp
