"""Roles: the rules on sentences, the counts against scores of single positions, and names that say what they mean."""

from dataclasses import replace

import pytest
import torch
from test_circuits import random_sae
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from bilens import saes
from bilens.models.windows import Windows, observe
from bilens.saes import ROLES, FeatureCards, Roles, auroc, auroc_of_counts, collect

HOOK = "blocks.0.hook_mlp_in"
TEXTS = [
    "the cat sat on the mat. the dog ran, and the little cat saw a big dog!",
    "once upon a time a big cat ran on.",
    "a little dog sat and saw the mat",
    "the big mat, the little mat, the cats and the dogs",
] * 3
LEXICON = {"big": 2.0, "little": -1.5, "good": 1.9, "dull": -1.7, "no": -1.2}
SENTENCE = 'tom did n \' t say " it was not a very good film " . never dull , wise ##gi ##r verdict : good'


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def sae():
    return random_sae(HOOK, k=6).float()


@pytest.fixture(scope="module")
def roles():
    return Roles(LEXICON, frozenset({"tom", "dog", "wisegir"}))


@pytest.fixture(scope="module")
def found(model, sae, roles):
    return collect(model, {HOOK: sae}, TEXTS, roles=roles)[HOOK]


@pytest.fixture(scope="module")
def spoken(make_model):
    """A model whose vocabulary holds the words of the sentence."""
    words = dict.fromkeys(["[UNK]", "[BOS]", "[EOS]", *SENTENCE.split(), "bad"])
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Whitespace()])
    return make_model(tokenizer=tokenizer, d_vocab=len(words))


def marked(model, roles, ids):
    """Return the tokens that each role holds at."""
    marks = roles.of(model, Windows.of(model, [ids]))[0]
    return {role: [i for i in range(len(ids)) if marks[i, r]] for r, role in enumerate(ROLES)}


def test_rules_on_a_sentence(spoken, roles):
    words = SENTENCE.split()
    got = marked(spoken, roles, [spoken.tokenizer.convert_tokens_to_ids(word) for word in words])

    def at(*spoken):
        return [i for i, word in enumerate(words) if word in spoken]

    assert got["negator"] == at("t", "not", "never")
    t, no, never = got["negator"]
    assert got["after a negator"] == [*range(t + 1, t + 5), *range(no + 1, no + 5), *range(never + 1, never + 5)]
    goods = at("good")
    assert got["positive word"] == goods
    assert got["negated positive word"] == goods[:1]
    assert got["negative word"] == got["negated negative word"] == at("dull")
    assert got["name"] == at("tom", "##r")
    assert got["unfinished word"] == at("wise", "##gi")
    assert got["end of a split word"] == at("##r")
    marks = at('"')
    assert got["quotation mark"] == marks
    assert got["inside a quotation"] == list(range(marks[0] + 1, marks[1]))
    assert got["verdict slot"] == got["slot of a good verdict"] == at(":")
    assert got["slot of a bad verdict"] == []
    assert (got["article"], got["verb to be"], got["intensifier"]) == (at("a"), at("was"), at("very"))
    assert got["sentence end"] == at(".")
    assert got["after an article"] == [i + 1 for i in at("a")]
    assert got["pronoun"] == got["pronoun it"] == at("it")
    assert got["sentence start"] == [0, never]
    assert got["first 8 tokens"] == list(range(8))


def test_scope_ends_with_the_clause(spoken, roles):
    ids = [
        spoken.tokenizer.convert_tokens_to_ids(word) for word in ("not", ".", "good", "never", "verdict", ":", "bad")
    ]
    got = marked(spoken, roles, ids)
    assert got["after a negator"] == [4]
    assert got["negated positive word"] == []
    assert got["slot of a bad verdict"] == got["verdict slot"] == [5]


def test_names_are_words_with_a_capital_within_sentences():
    texts = ["Then Lily saw Tom. The dog and Lily ran.", "See, Lily ran. But Red was red, so Red and red and red"] * 2
    assert saes.names_of(texts) == {"lily"}
    assert saes.names_of(texts, least=2) == {"lily", "tom"}


def test_auroc_of_counts_is_that_of_binned_activations():
    generator = torch.Generator().manual_seed(0)
    bins = torch.randint(0, 5, (200, 7), generator=generator)  # 0 below zero, 1 zero, then 2 to 4
    marks = torch.rand(200, 3, generator=generator) < 0.3
    order = [0, 2, 3, 4]
    inside = torch.stack([torch.stack([(bins[marks[:, r]] == b).sum(0) for b in order], 1) for r in range(3)], 2)
    overall = torch.stack([(bins == b).sum(0) for b in order], 1)
    got = auroc_of_counts(inside, overall, marks.sum(0), 200)
    for r in range(3):
        expected = auroc(bins[marks[:, r]].double(), bins[~marks[:, r]].double())
        torch.testing.assert_close(got[:, r].double(), expected, rtol=0, atol=1e-6)
    assert auroc_of_counts(inside * 0, overall, torch.tensor([0, 0, 0]), 200).isnan().all()


def test_scores_are_those_of_single_positions(model, sae, roles, found):
    windows = Windows.of(model, TEXTS)
    with torch.no_grad():
        z = sae.encode(observe(model, windows, [HOOK])[HOOK])[windows.counts]
    marks = roles.of(model, windows)[windows.counts]
    scores = found.roles
    assert list(scores.places.values()) == marks.sum(0).tolist()
    inside = torch.stack([(z.clamp(min=0) * one[:, None]).sum(0) for one in marks.T], 1)
    share = (inside / z.clamp(min=0).sum(0)[:, None]).nan_to_num(0)
    torch.testing.assert_close(scores.share, share, rtol=1e-4, atol=1e-5)
    edges = torch.tensor([0.0, *saes.EDGES])
    binned = torch.where(z == 0, 0.5, torch.bucketize(z, edges).double())  # zero between the negative and the positive
    for role in ("positive word", "article", "name"):
        r = ROLES.index(role)
        expected = auroc(binned[marks[:, r]], binned[~marks[:, r]])
        torch.testing.assert_close(scores.auroc[:, r].double(), expected, rtol=0, atol=1e-6)
    tokens = windows.tokens[windows.counts]
    feature = int(z.clamp(min=0).sum(0).argmax())
    for token, got, base in zip(*(part[feature] for part in scores.at), strict=True):
        here = z[:, feature].clamp(min=0)
        assert got.item() == pytest.approx((here[tokens == token].sum() / here.sum()).item(), abs=1e-4)
        assert base.item() == pytest.approx((tokens == token).double().mean().item(), abs=1e-6)


def test_shares_after_tokens_count_the_token_before(model, sae, found):
    windows = Windows.of(model, TEXTS)
    with torch.no_grad():
        z = sae.encode(observe(model, windows, [HOOK])[HOOK]).clamp(min=0) * windows.counts[..., None]
    before = windows.tokens.roll(1, 1)
    for feature in (3, 11):
        token, share = found.roles.after.tokens[feature, 0], found.roles.after.share[feature, 0]
        expected = z[..., feature][before == token].sum() / z[..., feature].sum()
        assert share.item() == pytest.approx(expected.item(), abs=1e-4)


def with_role(found, role, auroc, share):
    """Return cards whose feature 5 has one role, and no token that tells."""
    scores = found.roles
    told, inside = torch.full_like(scores.auroc, 0.5), torch.zeros_like(scores.share)
    told[5, ROLES.index(role)], inside[5, ROLES.index(role)] = auroc, share
    scores = replace(scores, auroc=told, share=inside, positions=10_000)
    return replace(found, roles=scores)


def test_a_detected_role_names_a_feature(model, found, roles):
    whole = with_role(found, "negator", 0.97, 0.9)
    assert whole.role(5).name == "negator"
    assert whole.name(5).startswith("negator")
    assert "AUROC .97" in whole.name(5)
    part = with_role(found, "positive word", 0.6, 0.96)
    assert "96 %" in part.name(5)
    assert "AUROC" not in part.name(5)
    assert part.describe(5).startswith("positive word: AUROC 0.60, 96 % of its activation there")
    for auroc_, share in ((0.97, 0.4), (0.6, 0.5)):
        assert with_role(found, "negator", auroc_, share).role(5) is None
    assert part.name([5, 5, 6], [1.0, -1.0, 0.5]).startswith("positive word (")
    windows = Windows.of(model, TEXTS)
    marks = roles.of(model, windows)
    assert torch.equal(part.label(5).holds(windows, marks), marks[:, :, ROLES.index("positive word")])


def test_the_role_that_fits_best_is_the_one(found):
    scores = found.roles
    told, inside = torch.full_like(scores.auroc, 0.5), torch.zeros_like(scores.share)
    slot, good = ROLES.index("verdict slot"), ROLES.index("slot of a good verdict")
    told[0, [slot, good]], inside[0, [slot, good]] = torch.tensor([1.0, 0.99]), torch.tensor([1.0, 0.5])
    told[1, [slot, good]], inside[1, [slot, good]] = torch.tensor([0.75, 1.0]), torch.tensor([1.0, 1.0])
    scores = replace(scores, auroc=told, share=inside)
    assert [scores.best(feature).name for feature in (0, 1)] == ["verdict slot", "slot of a good verdict"]


def test_tokens_name_what_has_no_role_and_say_where_they_are(model, found):
    scores = replace(found.roles, auroc=torch.full_like(found.roles.auroc, 0.5), share=found.roles.share * 0)
    cat, dog = (model.tokenizer.convert_tokens_to_ids(word) for word in ("cat", "dog"))
    tokens, share, base = (part.clone() for part in scores.at)
    tokens[5, :2], share[5] = torch.tensor([cat, dog]), 0.0
    share[5, :2], base[5] = torch.tensor([0.6, 0.3]), 0.01
    silent = saes.rolescores.TokenShares(tokens, share * 0, base)
    here = replace(found, roles=replace(scores, at=saes.rolescores.TokenShares(tokens, share, base), after=silent))
    later = replace(found, roles=replace(scores, after=saes.rolescores.TokenShares(tokens, share, base), at=silent))
    assert here.name(5).startswith('"cat / dog"')
    assert later.name(5).startswith('after "cat / dog"')
    windows = Windows.of(model, ["the cat sat"])
    text = windows.tokens[windows.counts].tolist()
    marks = torch.zeros(*windows.tokens.shape, len(ROLES), dtype=torch.bool)
    assert here.label(5).holds(windows, marks)[windows.counts].tolist() == [token == cat for token in text]
    assert later.label(5).holds(windows, marks)[windows.counts].tolist() == [False, *(t == cat for t in text[:-1])]


def test_all_labels_fit_and_none_is_a_bare_word(found):
    for cards in (found, replace(found, roles=None)):
        for feature in range(len(cards)):
            label = cards.label(feature)
            assert len(label.text) <= 44
            assert label.role or label.text[0] in '["(' or " [" in label.text or label.text.startswith("after ")


def test_a_feature_without_contexts_is_called_so(found):
    contexts = replace(found.contexts, tokens=torch.full_like(found.contexts.tokens, -1))
    for roles in (found.roles, None):
        assert replace(found, contexts=contexts, roles=roles).name(5) == "(never active)"


def test_cards_with_roles_are_read_again_and_older_ones_too(model, sae, found, tmp_path):
    for folder, cards in (("new", found), ("old", replace(found, roles=None))):
        saes.save(sae, tmp_path / folder / HOOK)
        cards.save(tmp_path / folder / HOOK / saes.FILE)
    new, old = (FeatureCards.load(tmp_path / folder, HOOK, model) for folder in ("new", "old"))
    torch.testing.assert_close(new.roles.auroc, found.roles.auroc, atol=1e-3, rtol=0, equal_nan=True)
    torch.testing.assert_close(new.roles.share, found.roles.share, atol=1e-3, rtol=0)
    assert new.roles.places == found.roles.places
    assert torch.equal(new.roles.after.tokens, found.roles.after.tokens)
    assert [one.role(3) for one in (old,)] == [None]
    assert old.roles is None
    assert "[" in old.name(3)


def test_a_killed_run_resumes_to_the_same_roles(model, sae, roles, found, tmp_path, monkeypatch):
    monkeypatch.setattr(saes.collecting, "CHUNK", 5)
    whole = collect(model, {HOOK: sae}, TEXTS, roles=roles)[HOOK]
    collect(model, {HOOK: sae}, TEXTS[:5], roles=roles, folder=tmp_path)
    again = collect(model, {HOOK: sae}, TEXTS, roles=roles, folder=tmp_path)[HOOK]
    assert all(torch.equal(*pair) for pair in zip(again.roles.at, whole.roles.at, strict=True))
    torch.testing.assert_close(again.roles.auroc, whole.roles.auroc, atol=0, rtol=0, equal_nan=True)
    with pytest.raises(ValueError, match="folder must be of this run"):
        collect(model, {HOOK: sae}, TEXTS, roles=Roles(), folder=tmp_path)
