"""Families of cases with odd texts, token ids, numbers and dtypes; with interrupts at any line, and with kills."""

import contextlib
import copy
import gc
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fuzz_things import HOOKS, N_CTX, TEXTS, WORDS, Bench, right

import bilens
from bilens import circuits

PIECES = [
    "",
    " ",
    "\0",
    "\ud800",
    "\udfff",
    "‮שלום",
    "مرحبا",
    "é",
    "e\u0301",
    "👍🏽",
    "\n",
    "\t",
    "[BOS]",
    "[EOS]",
    "\ufeff",
]
PIECES += ["\u200d", "ﷺ", "a" * 300, "\x1b[31m", "<script>", "%s", "{}", "\\", "'", '"', "İ", "ß", "\U0010ffff"]


def texts(rng: random.Random, bench: Bench) -> str:
    """Run the model on an odd text: its loss is finite, and that of its own token ids."""
    pieces = [rng.choice(PIECES + WORDS) for _ in range(rng.choice([0, 1, 2, 5, 30]))]
    text = rng.choice(["", " "]).join(pieces)
    bench.told = repr(text)[:100]
    tokens = bench.model.to_tokens(text)
    right(tokens.dtype == torch.int64 and int(tokens.max()) < bench.model.cfg.d_vocab, f"tokens {tokens}")
    if tokens.shape[1] > 1:
        loss = bench.model(text, "loss")
        right(bool(loss.isfinite()) and torch.equal(loss, bench.model(tokens, "loss")), f"loss {loss}")
    right(len(bench.model.to_str_tokens(text)) == tokens.shape[1], "other pieces than tokens")
    return f"{tokens.shape[1]} tokens"


def many_texts(rng: random.Random, bench: Bench) -> str:
    """Give odd things for a list of texts to what reads data: the numbers are those of the texts that are texts."""
    good = rng.sample(TEXTS, rng.randint(0, 3))
    odd: list[Any] = [None, "", "   ", 3, b"bytes", ["a", "list"], {"text": "x"}, float("nan"), "\ud800", "a " * 50]
    some = [*good, *rng.sample(odd, rng.randint(0, 2))]
    rng.shuffle(some)
    given = rng.choice([some, tuple(some), iter(some), " ".join(map(str, some))])
    bench.told = repr(some)[:100]
    task = rng.choice(["evaluate", "contexts"])
    found = getattr(bilens.saes, task)(bench.model, bench.saes[HOOKS[1]], given)
    if task == "evaluate":
        right(math.isfinite(found.loss) and math.isfinite(found.fvu) and found.tokens > 0, f"{found}")
    return f"{task}: {found!r:.60}"


def ids(rng: random.Random, bench: Bench) -> str:
    """Run the model on token ids in any form: the loss is that of int64, or they are refused."""
    n, top = rng.choice([1, 2, 5, N_CTX, N_CTX + 1, 0]), bench.model.cfg.d_vocab
    plain = [[rng.randrange(top) for _ in range(n)] for _ in range(rng.choice([1, 1, 3]))]
    bad = rng.random() < 0.3 and n
    if bad:
        plain[0][rng.randrange(n)] = rng.choice([-1, top, 10**9, -(2**31)])
    kind = rng.choice(
        ["int64", "int32", "int16", "uint8", "int8", "bool", "float32", "float16", "list", "numpy", "tuple"]
    )
    given: Any = torch.tensor(plain)
    match kind:
        case "list":
            given = plain
        case "tuple":
            given = tuple(map(tuple, plain))
        case "numpy":
            given = given.numpy().astype(rng.choice(["int64", "int32", "uint8", "float64", "object"]))
        case _:
            given = given.to(getattr(torch, kind))
    same = torch.as_tensor(given.astype("int64") if kind == "numpy" else given).long().tolist() == plain
    bench.told = f"{kind} {plain!r:.80}"
    loss = bench.model(given, "loss")
    right(not bad or not same, f"ids that are none gave {loss}")
    if same and n > 1:
        right(torch.equal(loss, bench.model(torch.tensor(plain), "loss")), f"loss {loss}")
    return f"loss {loss:.3f}"


def numbers(rng: random.Random, bench: Bench) -> str:
    """Give odd numbers for counts, layers, features and temperatures."""
    odd = rng.choice([-(10**9), -1, 0, 1, 2, 5, 24, 25, 300, 10**9, 10**30, 0.5, -0.5, 1e30])
    whole = int(odd) if abs(odd) >= 1 or odd == 0 else 1
    model, B = bench.model, bench.model.blocks[0].mlp.tensor().detach()
    lens = circuits.FeatureLayer(model, 1, inp=bench.saes[HOOKS[0]], out=bench.saes[HOOKS[1]])
    seeded = torch.Generator().manual_seed(0)
    tasks: dict[str, Callable[[], Any]] = {
        "k": lambda: bilens.top_interactions(B, whole),
        "per_output": lambda: bilens.top_interactions(B, 5, per_output=whole),
        "memory": lambda: bilens.top_interactions(B, 5, memory=whole),
        "eigen": lambda: bilens.eigen(B, torch.ones(16), k=whole),
        "layer": lambda: circuits.FeatureLayer.load(model, whole, bench.folder / "saes"),
        "feature": lambda: lens.coefficients(whole),
        "lens.eigen": lambda: lens.eigen(3, whole),
        "new": lambda: model.generate(TEXTS[0], whole, temperature=0),
        "top_k": lambda: model.generate(TEXTS[0], 2, top_k=whole, generator=seeded),
        "temperature": lambda: model.generate(TEXTS[0], 2, temperature=odd, generator=seeded),
        "stop": lambda: model(bench.tokens, stop_at_layer=whole),
        "position": lambda: bilens.attribute(model, TEXTS[0], 1, inp=lens.inp, out=lens.out, feature=3, position=whole),
        "attributed": lambda: bilens.attribute(model, TEXTS[0], 1, inp=lens.inp, out=lens.out, feature=whole),
        "outliers": lambda: circuits.outliers(lens, k=whole),
        "batch": lambda: bilens.saes.evaluate(model, lens.out, TEXTS, batch=whole),
        "contexts": lambda: bilens.saes.contexts(model, lens.out, TEXTS, n=whole),
        "card": lambda: bilens.saes.FeatureCards.load(bench.folder / "saes", HOOKS[0], model)[whole],
    }
    task = rng.choice([*tasks])
    bench.told = f"{task} = {odd if task == 'temperature' else whole}"
    found = tasks[task]()
    right(all(bool(one.isfinite().all()) for one in _tensors(found)), f"{found!r:.100}")
    return f"{bench.told}: {found!r:.60}"


def _tensors(found: Any) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    values = found if isinstance(found, tuple | list) else vars(found).values() if hasattr(found, "__dict__") else ()
    return [one for one in values if isinstance(one, torch.Tensor) and one.is_floating_point()]


def weights(rng: random.Random, bench: Bench) -> str:
    """Rank pairs of weights that are tiny, huge, zero or equal: the strongest are those of the whole float64 cube."""
    generator = torch.Generator().manual_seed(rng.randrange(10**6))
    dtype = rng.choice([torch.float32, torch.float64, torch.float16, torch.bfloat16])
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 6), (6, 5), (6, 5))]
    kinds = [rng.choice(["as is", "tiny", "subnormal", "huge", "zero", "row", "equal", "spread"]) for _ in parts]
    for part, kind in zip(parts, kinds, strict=True):
        match kind:
            case "tiny" | "subnormal" | "huge":
                part *= {"tiny": 1e-20, "subnormal": 1e-40, "huge": 1e30 if rng.random() < 0.5 else 1e10}[kind]
            case "zero":
                part.zero_()
            case "row":
                part[rng.randrange(len(part))] = 0
            case "equal":
                part.fill_(1)
            case "spread":
                part *= 10.0 ** torch.randint(-8, 8, part.shape, generator=generator)
    parts = [part.to(dtype) for part in parts]
    bench.told = f"{dtype} {kinds}"
    k = rng.choice([1, 5, 60, 100])
    B = bilens.BilinearTensor(*parts)
    found = bilens.top_interactions(B, k)
    down, left, right_ = (part.double() for part in parts)
    cube = torch.einsum("oh,hi,hj->oij", down, left, right_)
    cube = torch.triu(cube + cube.mT - torch.diag_embed(torch.diagonal(cube, dim1=1, dim2=2)))
    best = cube.abs().flatten().sort(descending=True).values[: min(k, 60)]
    size = found.value.double().abs()
    right(len(size) == len(best), f"{len(size)} pairs")
    told = cube[found.out, found.left, found.right]
    near = 1e-5 * best + torch.finfo(torch.float32).tiny
    right(bool(((size - best).abs() <= near).all()), f"sizes {size} against {best}")
    right(bool(((found.value.double() - told).abs() <= near).all()), f"values {found.value} against {told}")
    return f"{len(size)} pairs"


def dtypes(rng: random.Random, bench: Bench) -> str:
    """Use a model that was cast with SAEs of the model as it was: numbers near those of the original."""
    dtype = rng.choice([torch.float16, torch.bfloat16, torch.float64])
    model = copy.deepcopy(bench.model).to(dtype)
    sae = bench.saes[HOOKS[1]]
    task = rng.choice(["loss", "evaluate", "lens", "splice", "cards", "generate"])
    bench.told = f"{dtype} {task}"
    match task:
        case "loss":
            loss = model(bench.tokens, "loss").item()
            right(abs(loss - bench.loss) < 0.1 + 0.02 * abs(bench.loss), f"loss {loss} against {bench.loss}")
        case "evaluate":
            ours, cast = (bilens.saes.evaluate(one, sae, TEXTS) for one in (bench.model, model))
            right(abs(ours.loss_spliced - cast.loss_spliced) < 0.2, f"{cast} against {ours}")
        case "lens":
            lens = circuits.FeatureLayer(model, 1, inp=bench.saes[HOOKS[0]], out=sae)
            right(bool(circuits.outliers(lens, k=3).values.isfinite().all()), "scores")
        case "splice":
            hook = (HOOKS[1], lambda x, hook: sae.decode(sae.encode(x.to(sae.W_dec))).to(x))
            right(bool(model.run_with_hooks(bench.tokens, "loss", fwd_hooks=[hook]).isfinite()), "loss")
        case "cards":
            for hook in HOOKS:
                bilens.saes.FeatureCards.load(bench.folder / "saes", hook, model)
        case "generate":
            right(len(model.generate(TEXTS[0], 4, temperature=0)) > 0, "no text")
    return bench.told


# -- interrupts -------------------------------------------------------------------------------------------------------


def _interruptible(bench: Bench) -> dict[str, Callable[[], Any]]:
    """Return what is interrupted: every kind of call that hooks a model, edits it, or writes files."""
    model, sae = bench.model, bench.saes[HOOKS[1]]
    zero = ("blocks.0.hook_mlp_out", lambda x, hook: x * 0)
    B, case = model.blocks[0].mlp.tensor().detach(), bench.folder / "case"
    lens = partial(circuits.FeatureLayer, model, 1, inp=bench.saes[HOOKS[0]], out=sae)
    return {
        "run_with_cache": lambda: model.run_with_cache(bench.tokens),
        "backward": lambda: model.run_with_cache(bench.tokens, return_type="loss", incl_bwd=True),
        "run_with_hooks": lambda: model.run_with_hooks(bench.tokens, fwd_hooks=[zero, zero]),
        "generate": lambda: model.generate(TEXTS[0], 3, temperature=0, fwd_hooks=[zero]),
        "evaluate": lambda: bilens.saes.evaluate(model, sae, TEXTS),
        "collect": lambda: bilens.saes.collect(model, bench.saes, TEXTS, folder=case / "interrupted"),
        "attribute": lambda: bilens.attribute(model, TEXTS[0], 1, inp=lens().inp, out=sae, feature=3),
        "rank": lambda: bilens.top_interactions(B, 40, checkpoint=case / "ranked"),
        "save": lambda: bilens.save(model, case / "saved"),
        "edit": lambda: _edited(lens()),
    }


def _edited(lens: Any) -> float:
    with circuits.edits.without_pair(lens, 1, 2):
        return lens.model(TEXTS[0], "loss").item()


def interrupts(rng: random.Random, bench: Bench) -> str:
    """Interrupt a call at any line of bilens or transformer_lens; the model is as it was, and the call works again."""
    if not hasattr(bench, "lines"):
        bench.lines = {}
    calls = _interruptible(bench)
    task = rng.choice([*calls])
    if task not in bench.lines:
        bench.lines[task] = _traced(calls[task], None)
    at = rng.randrange(bench.lines[task])
    bench.told = f"{task} at line {at} of {bench.lines[task]}"
    with contextlib.suppress(KeyboardInterrupt):
        _traced(calls[task], at)
    _check_left(bench)
    return bench.told


def _check_left(bench: Bench) -> None:
    """Make sure that an interrupt left nothing; what it left goes, so that the next case is its own."""
    model = bench.model
    left = [name for name, point in model.hook_dict.items() if point._forward_hooks or point._backward_hooks]
    left += [name for name, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]
    for point in model.hook_dict.values() if left else ():
        for hooks in (point._forward_hooks, point._backward_hooks, point.fwd_hooks, point.bwd_hooks):
            hooks.clear()
    right(not left, f"{len(left)} hooks are left: {left[:3]}")
    right(model.context_level == 0, f"context_level {model.context_level}")
    graded = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    right(graded, "gradients are left off")
    loss = model(bench.tokens, "loss").item()
    right(loss == bench.loss, f"loss {loss} against {bench.loss}")
    folder = bench.folder / "case"
    if list(folder.rglob("*.partial")):
        gc.collect()  # a write interrupted before its clean-up began is cleaned up when Python drops it, from a cycle
    partials = list(folder.rglob("*.partial"))
    for path in partials:
        path.unlink()
    right(not partials, f"left behind: {[path.name for path in partials]}")


def _traced(call: Callable[[], Any], stop: int | None) -> int:
    """Run a call and count its lines in bilens and transformer_lens; interrupt it, as Ctrl-C does, at one of them."""
    count, frames = 0, ("/bilens/", "/transformer_lens/", "/contextlib.py")

    def lines(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if event == "line":
            if count == stop:
                count += 1
                signal.raise_signal(signal.SIGINT)
            count += 1
        return lines

    def calls(frame: Any, event: str, arg: Any) -> Any:
        return lines if any(part in frame.f_code.co_filename for part in frames) else None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.settrace(calls)
    try:
        call()
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGINT, before)
    return count


def kills(rng: random.Random, bench: Bench) -> str:
    """Kill a process that ranks, or reads text, at any time; the same call goes on to the result of one in a piece."""
    folder, task = bench.folder / "killed" / str(rng.random()), rng.choice(["rank", "collect"])
    code = f"""
import sys, torch, bilens
torch.set_num_threads(1)
model = bilens.load({str(bench.folder / "model")!r})
print("ready", flush=True)
if {task!r} == "rank":
    from bilens.tensor.keeping import Pace
    Pace.due = lambda self: True
    B = model.blocks[0].mlp.tensor().detach()
    g = torch.Generator().manual_seed(0)
    out, inp = torch.randn(300, 16, generator=g), torch.randn(200, 16, generator=g)
    print(bilens.top_interactions(B, 20, out, inp, memory=1 << 26, checkpoint={str(folder)!r}).value.tolist())
else:
    import bilens.saes.collecting
    bilens.saes.collecting.CHUNK = 4
    saes = {{h: bilens.saes.load({str(bench.folder / "saes")!r}, h) for h in {HOOKS!r}}}
    found = bilens.saes.collect(model, saes, {TEXTS!r} * 40, folder={str(folder)!r})
    print(found[{HOOKS[1]!r}].mean.tolist())
"""
    bench.told = task
    start = partial(subprocess.Popen, [sys.executable, "-c", code], text=True, stdout=-1, stderr=-1)
    first = start()
    first.stdout.readline()
    time.sleep(rng.random() * 1.5)
    first.kill()
    first.communicate()
    results = []
    for fresh in (False, True):
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        out, err = start().communicate(timeout=300)
        right("ready" in out and out.count("\n") == 2, f"no result: {err[-300:]}")
        results.append(out)
    right(results[0] == results[1], "another result")
    return task


FAMILIES = {
    "texts": (texts, 10),
    "lists of texts": (many_texts, 8),
    "token ids": (ids, 10),
    "numbers": (numbers, 10),
    "weights": (weights, 8),
    "dtypes": (dtypes, 4),
    "interrupts": (interrupts, 55),
    "kills": (kills, 0.1),
}
