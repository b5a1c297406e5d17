"""Gather a trained model and its SAEs in one folder, with a card: data, commands, hashes, losses, curves, samples.

The embedded model was packed by

    python scripts/write_card.py runs/mini/model runs/mini/saes --out bilens/assets/bilens-mini
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import torch

import bilens

PROMPTS = ("once upon a time", "one day , tom and his dog", "this movie is", "i did not like", "the acting was")


def main() -> None:
    """Copy the files and write README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("saes", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--note", default="", help="a sentence to add on how it was trained")
    parser.add_argument("--saes-made", default="made by `scripts/fit_saes.py`", help="how the SAEs were made")
    parser.add_argument("--verdicts", type=Path, help="what evaluate_verdicts.py --out wrote")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors", "tokenizer.json", "training.json"):
        shutil.copy(args.model / file, args.out / file)
    for sae in sorted(path.parent for path in args.saes.glob("*/cfg.json")):
        (args.out / "saes" / sae.name).mkdir(parents=True, exist_ok=True)
        for file in sae.iterdir():
            shutil.copy(file, args.out / "saes" / sae.name / file.name)
    training = json.loads((args.out / "training.json").read_text())
    evaluation = json.loads((args.saes / "evaluation.json").read_text())
    parts = [
        f"# {args.out.name}",
        _what(bilens.load(args.out).cfg),
        _training(training, args.note),
        *([_verdicts(training["readout"], json.loads(args.verdicts.read_text()))] if args.verdicts else []),
        _saes(evaluation, args.saes_made),
        _samples(bilens.load(args.out)),
        _hashes(args.out),
    ]
    (args.out / "README.md").write_text("\n\n".join(parts) + "\n")
    print(f"wrote {args.out}: {sum(f.stat().st_size for f in args.out.rglob('*') if f.is_file()) / 1e6:.1f} MB")


def _what(cfg: bilens.BilinearConfig) -> str:
    return (
        f"A bilinear language model of {cfg.n_layers} layers (d_model {cfg.d_model}, d_hidden {cfg.d_hidden}, "
        f"{cfg.n_heads} heads, context {cfg.n_ctx}, vocabulary {cfg.d_vocab}) that writes short children's stories and "
        "film reviews, and judges a statement when asked for a verdict, in the published format of arXiv 2410.08417, "
        "with sparse autoencoders before and after every MLP. It is small enough to ship, and meant for trying things "
        "out: it makes up facts, and repeats the opinions and the prejudices of its texts."
    )


def _training(training: dict, note: str) -> str:
    settings = training["settings"]
    losses = "\n".join(f"| {name} | {loss:.3f} |" for name, loss in training["held-out loss"].items())
    curve = training["curve"]
    header = "| " + " | ".join(curve[0]) + " |\n|" + "---|" * len(curve[0])
    rows = "\n".join("| " + " | ".join(row.values()) + " |" for row in curve)
    data = "\n".join(f"- {name}: sha256 of its distinct texts `{digest}`" for name, digest in settings["data"].items())
    flags = {k: v for k, v in settings.items() if k not in ("data", "tokenizer", "devices", "compile")}
    command = " ".join(f"--{k.replace('_', '-')} {one}" for k, v in flags.items() for one in _values(v))
    compiled = " --compile" if settings["compile"] else ""
    return f"""## Training

TinyStories (roneneldan/TinyStories, CDLA-Sharing-1.0, 28,420 stories) and the Large Movie Review Dataset v1.0 (Maas et
al. 2011, 75,000 reviews), exact duplicates removed, 1 % of each held out by a hash of the text; texts that end in a
verdict: opinions (`scripts/make_opinions.py`, with words of the VADER lexicon, MIT), the sentences rated by people that
were published with it (Hutto & Gilbert 2014) and the ends of the labelled reviews (`scripts/make_verdicts.py`), and
sentences of the reviews with the verdict of a bag-of-words teacher that has seen no held-out text (the weak ones). A
tenth of the rated sentences, of the opinions' words and of their frames are held out:

{data}

Made by `scripts/train_language.py --data {" ".join(settings["data"])} {command}{compiled}`
with torch {training["torch"]}: bf16 autocast, Muon for the blocks' matrices, AdamW for the embeddings; the weights
are stored in bfloat16. {note}

Held-out loss of the stored weights, nats per token, over the first {settings["context"]} tokens of each text:

| corpus | loss |
|---|---|
{losses}

{header}
{rows}"""


def _values(value: object) -> list[str]:
    """Return a flag's value as it is written, each of a list's by itself."""
    if isinstance(value, list):
        return [one for part in value for one in _values(part)]
    return [f"{value:g}" if isinstance(value, float) else str(value)]


def _verdicts(readout: dict, found: dict) -> str:
    """Describe the readout, with the scores and minimal pairs of `evaluate_verdicts.py`."""
    words, prompt = ", ".join(readout["words"]), readout["prompt"].strip()
    great, good = (readout["thresholds"][name] for name in ("great", "good"))
    scores = "\n".join(
        f"| {name} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |"
        for name, row in found["sentences"].items()
    )
    columns = next(iter(found["sentences"].values()))
    rates = ("turns", "flips", "plain", "negated")
    flips = "\n".join(
        f"| {name} | {row['pairs']} | " + " | ".join(f"{100 * row[rate]:.1f} %" for rate in rates) + " |"
        for name, row in found.get("flips", {}).items()
    )
    said = "\n".join(f"| {sentence} | {value:+.2f} |" for sentence, value in found["behaviour"].items())
    return f"""## Verdicts

After a statement and `{prompt}` the next token is one of {words}: a mean rating (-4 to 4) of at least {great} is great,
of at least {good} good, the same below zero terrible and bad, and what lies between okay. The log-odds of great and
good against bad and terrible measure sentiment. On held-out sentences of film reviews rated above .7 or below -.7, and
on minimal pairs with words and frames that no opinion in training has (a pair turns if its two log-odds differ in sign,
and flips if both have the right sign, so that the word is judged too):

| judge | {" | ".join(columns)} |
|---|{"---|" * len(columns)}
{scores}

| minimal pairs | number | turn | flip | plain right | negated right |
|---|---|---|---|---|---|
{flips}

| statement | log-odds |
|---|---|
{said}"""


def _saes(evaluation: dict, made: str) -> str:
    rows = "\n".join(
        f"| {hook} | {e['fvu']:.3f} | {e['l0']:.1f} | {100 * e['dead']:.2f} % | {e['loss']:.3f} "
        f"| {e['loss_spliced']:.3f} | {e['loss_zero']:.3f} | {e['recovered']:.3f} | {e['recovered_mean']:.3f} |"
        for hook, e in evaluation.items()
    )
    tokens = next(iter(evaluation.values()))["tokens"]
    tuned = [
        f"{hook} ({e['fine-tuned']:,} tokens, loss recovered {e['recovered before']:.3f} before)"
        for hook, e in evaluation.items()
        if "fine-tuned" in e
    ]
    note = f" Fine-tuned on the model's loss after the fit: {', '.join(tuned)}." if tuned else ""
    return f"""## Sparse autoencoders

Top-k SAEs in SAELens' format (`SAE.load_from_disk` reads them), weights stored in bfloat16, {made}; the settings are in
each `cfg.json`.{note}
`cards.safetensors` holds each feature's card: the windows of held-out text at which it is most active, a histogram of
its activations, the tokens whose logits it moves, and its AUROC for the reviews' labels; made by
`scripts/make_cards.py`.

Evaluated as stored, on {tokens:,} held-out tokens of both corpora (BOS left out): fraction of variance unexplained,
active features per token, features never active, loss with the reconstruction spliced in, with zero instead, and the
loss recovered against zero and against mean ablation.

| hook point | FVU | L0 | dead | loss | spliced | zero | recovered | recovered (mean) |
|---|---|---|---|---|---|---|---|---|
{rows}"""


def _samples(model: bilens.BilinearTransformer) -> str:
    greedy = "\n".join(f"> {model.generate(prompt, 60, temperature=0)}\n>" for prompt in PROMPTS)
    generator = torch.Generator().manual_seed(0)
    sampled = "\n".join(
        f"> {model.generate(prompt, 120, temperature=0.7, top_k=40, generator=generator)}\n>" for prompt in PROMPTS
    )
    return f"## Samples\n\nGreedy:\n\n{greedy}\n\nTemperature 0.7, top-k 40, seed 0, none left out:\n\n{sampled}"


def _hashes(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json"))
    lines = (
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder).as_posix()}" for file in files
    )
    return "## Hashes\n\n```\n" + "\n".join(lines) + "\n```"


if __name__ == "__main__":
    main()
