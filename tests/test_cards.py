"""Feature cards against counting by hand; a killed run resumes to the same cards."""

import random
from itertools import pairwise

import datasets
import pytest
import torch
from test_circuits import random_sae

from bilens import saes
from bilens.circuits import FeatureLayer
from bilens.models.files import fingerprint
from bilens.models.windows import Windows, observe
from bilens.saes import FeatureCards, auroc, collect, collecting, stored
from bilens.saes import cards as records

HOOKS = ("blocks.0.hook_mlp_in", "blocks.1.hook_mlp_out")
WORDS = ("the", "cat", "dog", "sat", "ran", "on", "mat", "once", "saw", "big")


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def fitted():
    return {hook: random_sae(hook, k=6, seed=seed).float() for seed, hook in enumerate(HOOKS)}


@pytest.fixture(scope="module")
def rows():
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 40))) for _ in range(40)]
    labels = ["good", "bad", None]
    return [{"text": text, "kind": labels[i % 3]} for i, text in enumerate(texts)] + [{"text": "  ", "kind": "good"}]


@pytest.fixture(scope="module")
def found(model, fitted, rows):
    return collect(model, fitted, rows, label="kind")


def activations_of(model, sae, hook, texts):
    """Activations of every text's tokens, window by window."""
    rows = Windows.of(model, texts)
    with torch.no_grad():
        z = sae.encode(observe(model, rows, [hook])[hook])
    return [z[i][rows.counts[i]] for i in range(len(z))], rows.text.tolist()


@pytest.mark.parametrize("hook", HOOKS)
def test_counts_are_those_of_all_positions(model, fitted, rows, found, hook):
    windows, _ = activations_of(model, fitted[hook], hook, [row["text"] for row in rows if row["text"].strip()])
    z = torch.cat(windows)
    one = found[hook]
    torch.testing.assert_close(one.contexts.density, (z != 0).to(z).mean(0), check_dtype=False)
    torch.testing.assert_close(one.mean, z.sum(0) / (z != 0).sum(0).clamp(min=1), rtol=1e-4, atol=1e-6)
    assert torch.equal(one.histogram.sum(1), (z != 0).sum(0))
    edges = torch.tensor([0.0, *saes.EDGES])
    for feature in (0, 13):
        active = z[:, feature][z[:, feature] != 0]
        counts = [((active > low) & (active <= high)).sum() for low, high in pairwise(edges)]
        assert one.histogram[feature, 1:-1].tolist() == [int(count) for count in counts]
    assert (one.histogram.sum(0) > 0).sum() > 3


@pytest.mark.parametrize("hook", HOOKS)
def test_auroc_is_that_of_mean_activations_over_labelled_texts(model, fitted, rows, found, hook):
    texts = [row["text"] for row in rows if row["text"].strip()]
    windows, of = activations_of(model, fitted[hook], hook, texts)
    means = [torch.cat([w for w, t in zip(windows, of, strict=True) if t == i]).mean(0) for i in range(len(texts))]
    good, bad = (
        torch.stack([m for m, row in zip(means, rows, strict=False) if row["kind"] == kind]) for kind in ("good", "bad")
    )
    wins = (good[:, None] > bad).double() + (good[:, None] - bad == 0).double() / 2
    one = found[hook]
    assert one.labels == {"bad": len(bad), "good": len(good)}
    torch.testing.assert_close(one.auroc[:, 1].double(), wins.mean((0, 1)), atol=2e-2, rtol=0)
    torch.testing.assert_close(one.auroc.sum(1), torch.ones(40))


def test_empty_texts_count_for_nothing(model, fitted, rows, found):
    null, unlabelled, empty = (
        {"text": text, "kind": kind} for text, kind in ((None, "good"), (None, None), ("", "bad"))
    )
    gaps = [null, *rows[:20], empty, unlabelled, *rows[20:]]
    again = collect(model, fitted, datasets.Dataset.from_list(gaps), label="kind")
    for hook in HOOKS:
        assert torch.equal(again[hook].contexts.tokens, found[hook].contexts.tokens)
        assert torch.equal(again[hook].histogram, found[hook].histogram)
        assert torch.equal(again[hook].auroc, found[hook].auroc)
        assert again[hook].labels == found[hook].labels
        assert again[hook].provenance["texts"] == "44"


def test_one_text_is_a_text(model, fitted):
    ones = [collect(model, fitted, texts)[HOOKS[0]] for texts in ("the cat sat", ["the cat sat"])]
    assert torch.equal(ones[0].contexts.tokens, ones[1].contexts.tokens)
    assert ones[0].provenance["texts"] == "1"


def test_auroc_counts_ties_half():
    positive, negative = torch.tensor([[1.0], [2.0], [2.0]]), torch.tensor([[2.0], [0.0]])
    wins = sum((p > n) + 0.5 * (p == n) for p in [1, 2, 2] for n in [2, 0])
    assert auroc(positive, negative).item() == pytest.approx(wins / 6)


def test_tokens_are_those_whose_logits_move_most(model, fitted, found):
    hook = HOOKS[1]
    effects = saes.writers(fitted[hook]) @ model.W_U.detach()
    effects = effects - effects.mean(1, keepdim=True)
    card = found[hook][7]
    best = effects[7].argsort(descending=True)[:3].tolist()
    assert list(card.promoted)[:3] == [model.label(i) for i in best]
    assert min(card.demoted.values()) == pytest.approx(effects[7].min().item(), rel=1e-4)


@pytest.mark.parametrize("killed_after", [1, 3])
def test_a_killed_run_resumes_to_the_same_cards(model, fitted, rows, tmp_path, monkeypatch, killed_after):
    monkeypatch.setattr(collecting, "CHUNK", 8)
    whole = collect(model, fitted, rows, label="kind", folder=tmp_path / "whole")
    take_in, calls = collecting._take_in, []

    def killed(*args):
        calls.append(1)
        if len(calls) > killed_after:
            raise KeyboardInterrupt
        take_in(*args)

    monkeypatch.setattr(collecting, "_take_in", killed)
    with pytest.raises(KeyboardInterrupt):
        collect(model, fitted, rows, label="kind", folder=tmp_path / "run")
    counted = []
    monkeypatch.setattr(collecting, "_take_in", lambda *args: (counted.append(len(args[-1])), take_in(*args)))
    again = collect(model, fitted, iter(rows), label="kind", folder=tmp_path / "run")
    assert sum(counted) == len(rows) - 8 * killed_after
    for hook in HOOKS:
        stored = [(tmp_path / run / hook / saes.FILE).read_bytes() for run in ("whole", "run")]
        assert stored[0] == stored[1]
        assert torch.equal(again[hook].auroc, whole[hook].auroc)


def test_cards_are_read_beside_their_sae(model, make_model, fitted, found, tmp_path):
    hook = HOOKS[0]
    saes.save(fitted[hook], tmp_path / hook)
    found[hook].save(tmp_path / hook / saes.FILE)
    reread = FeatureCards.load(tmp_path, hook, model)
    assert torch.equal(reread.contexts.tokens, found[hook].contexts.tokens)
    assert reread[3].name == found[hook][3].name
    assert reread.provenance == found[hook].provenance
    with pytest.raises(ValueError, match="another hash"):
        FeatureCards.load(tmp_path, hook, make_model(seed=5, dtype=torch.float32))


def test_a_killed_write_leaves_the_old_file(fitted, found, tmp_path, monkeypatch):
    hook = HOOKS[0]
    writes = [
        (records, lambda: found[hook].save(tmp_path / "cards" / saes.FILE)),
        (stored, lambda: saes.save(fitted[hook], tmp_path / "sae", torch.bfloat16)),
    ]

    def killed(tensors, path, *args):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    for room, write in writes:
        write()
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        monkeypatch.setattr(room, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            write()
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_groups_are_found_and_named_by_words_and_labels(model, fitted, rows, found):
    one = found[HOOKS[0]]
    near = one.near(["cat"], share=0.99)
    for feature in near.tolist():
        windows = one.contexts.tokens[feature]
        windows = windows[windows[:, one.contexts.peak] >= 0]
        cat = model.tokenizer.convert_tokens_to_ids("cat")
        assert (windows[:, one.contexts.peak - 3 : one.contexts.peak + 1] == cat).any(1).all()
    assert 0 < len(near) < 40
    features, weights = one.telling("good", 0.1)
    torch.testing.assert_close(weights, one.auroc[features, 1] - 0.5)
    assert (weights.abs() > 0.1).all()
    best = int(one.auroc[:, 1].argmax())
    assert one.name(best).startswith("good: ")
    assert one.name([best, best]).split(": ")[1].split(" / ")[0] in one.name(best)


def test_a_group_is_named_by_the_weighted_votes_of_its_features(model):
    tokens = torch.full((2, 2, 16), -1)
    tokens[0, :, 10], tokens[1, :, 10] = torch.tensor([7, 8]), torch.tensor([9, 9])
    values = torch.zeros(2, 2, 16)
    values[0, :, 10], values[1, :, 10] = torch.tensor([3.0, 1.0]), torch.tensor([0.5, 0.5])
    contexts = saes.Contexts(tokens, values, torch.tensor([0.1, 0.1]), peak=10)

    seven, eight, nine = map(model.label, (7, 8, 9))
    assert contexts.top_tokens([0, 1], model) == [nine, seven, eight]
    assert contexts.top_tokens([0, 1], model, weights=[2.0, 0.1]) == [seven, eight, nine]
    assert contexts.label([0, 1], model, weights=[-2.0, 0.1], n=1) == seven


def test_a_layer_takes_only_saes_of_its_own(make_model, fitted, tmp_path):
    model = make_model(dtype=torch.float32)
    for point in ("hook_mlp_in", "hook_mlp_out"):
        sae = random_sae(f"blocks.1.{point}").float()
        sae.cfg.metadata.settings = {"model": fingerprint(model)}
        saes.save(sae, tmp_path / f"blocks.1.{point}")
    assert FeatureLayer.load(model, 1, tmp_path).inp_cards is None
    with pytest.raises(ValueError, match="fitted to one with other weights"):
        FeatureLayer.load(make_model(seed=5, dtype=torch.float32), 1, tmp_path)
    saes.save(random_sae("blocks.0.hook_mlp_in").float(), tmp_path / "blocks.1.hook_mlp_in")
    with pytest.raises(ValueError, match=r"has no SAE at blocks\.1\.hook_mlp_in or .*; the nearest"):
        FeatureLayer.load(model, 1, tmp_path)


@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_argument(model, fitted, rows, found, tmp_path):
    with pytest.raises(ValueError, match="column 'mood', got 'text', 'kind'"):
        collect(model, fitted, rows, label="mood")
    with pytest.raises(ValueError, match="column 'body', got 'text', 'kind'"):
        collect(model, fitted, rows, text="body")
    with pytest.raises(ValueError, match="got texts without columns"):
        collect(model, fitted, ["the cat"], label="kind")
    with pytest.raises(ValueError, match=r"dataset must hold strings, got float 0\.5 as text 1"):
        collect(model, fitted, [{"text": "the"}, {"text": 0.5}])
    with pytest.raises(ValueError, match=r"dataset must hold strings, got list \['the'\] as text 0"):
        collect(model, fitted, [["the"]])
    with pytest.raises(ValueError, match="saes must hold at least one SAE"):
        collect(model, {}, rows)
    with pytest.raises(ValueError, match="dataset must hold a text that is not empty"):
        collect(model, fitted, [" ", ""])
    with pytest.raises(ValueError, match=r"fitted at blocks\.0\.hook_mlp_in, got one of blocks\.1\.hook_mlp_out"):
        collect(model, {HOOKS[0]: fitted[HOOKS[1]]}, rows)
    with pytest.raises(ValueError, match="must read 16 dimensions"):
        collect(model, {HOOKS[0]: random_sae(HOOKS[0], d_in=8)}, rows)
    collect(model, fitted, rows, folder=tmp_path)
    with pytest.raises(ValueError, match="folder must be of this run"):
        collect(model, fitted, rows, folder=tmp_path, n=3)
    with pytest.raises(ValueError, match="dataset must begin with the 41 texts"):
        collect(model, fitted, rows[1:], folder=tmp_path)
    one = found[HOOKS[0]]
    with pytest.raises(IndexError, match="feature must lie between 0 and 39"):
        one[40]
    with pytest.raises(ValueError, match="label must be one of the cards'"):
        one.telling("mood")
    with pytest.raises(ValueError, match="least must leave features"):
        one.telling("good", 0.5)
    with pytest.raises(ValueError, match="words must hold a token"):
        one.near(["xylophone"])
    with pytest.raises(ValueError, match="near none"):
        one.near(["."])
