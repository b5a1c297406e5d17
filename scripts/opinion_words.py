"""The words of the opinions corpus by part of speech, and how the lexicon and a hash divide them."""

import csv
import hashlib
from pathlib import Path
from typing import NamedTuple

# Adjectives that can be said of things and mostly of people too.
ADJECTIVES = """
acceptable admirable adorable agreeable alright amazing ambitious amusing astounding attractive awesome beautiful
beloved beneficial bold brave breathtaking bright brilliant calm captivating charming cheerful classy clean clear clever
comfortable compassionate competent convincing cool creative cute daring delectable delicious delightful desirable
dignified dynamic earnest easy effective efficient elegant encouraging energetic engaging enjoyable enlightening
entertaining enthusiastic excellent exciting exhilarating fabulous fair faithful fantastic fascinating favorable festive
flawless fresh friendly fun funny gentle glamorous glorious good gorgeous graceful gratifying great handsome harmless
healthy heartfelt heartwarming helpful heroic hilarious honest honorable hopeful humorous impressive innovative
inspirational inspiring intelligent interesting inviting irresistible joyous lively lovable lovely lucky magnificent
marvelous mature meaningful merry natural neat nice noble optimistic original outstanding passionate peaceful perfect
playful pleasant pleasing pleasurable popular positive powerful precious promising radiant relaxing remarkable
respectable rewarding rich robust romantic safe satisfactory satisfying sexy sincere smart soothing sophisticated
special
splendid stimulating strong stunning successful super superb superior sweet sympathetic terrific thoughtful thrilling
touching truthful useful valuable vibrant wealthy welcome witty wonderful worthwhile worthy ok fine impressive
abhorrent aggravating annoying appalling awful bad biased bitter boring brutal careless chaotic childish clueless
contemptible crappy crazy crude cruel cynical damaged dangerous deceptive degrading depressing difficult dire dirty
disagreeable disappointing disastrous disgusting disheartening dishonest disjointed dismal distracting disturbing
dreadful dreary dubious dull dumb embarrassing erroneous evil excruciating exhausting fake feeble flawed foolish forced
frightening frustrating futile gloomy grim gross harsh hateful hideous hopeless horrendous horrible horrid horrific
horrifying hostile humiliating humorless hurtful hypocritical idiotic immoral impersonal incompetent inept ineffectual
inferior infuriating insane insipid insulting irrational irresponsible irritating joyless lame lazy lethargic lifeless
loathsome lousy ludicrous maddening meaningless mediocre messy mindless miserable misleading moronic nasty
negative obnoxious offensive outrageous painful pathetic perverse pitiful pointless poor predictable pretentious
problematic questionable repetitive repulsive revolting ridiculous rotten rude ruined sad savage senseless shabby
shameful shameless shocking sick sickening silly sinister sluggish somber stupid terrible terrifying tasteless tedious
tiresome toothless torturous tragic troubling ugly unacceptable unattractive unbearable uncomfortable unfair unfocused
unfortunate unimpressive uninspired unintelligent uninteresting uninvolving unpleasant unprofessional unsavory
unsuccessful unwelcome unworthy upsetting useless vicious vile violent vulgar weak weird worthless wrong
"""
# Said of people only.
PERSONAL = """
affectionate benevolent blessed carefree caring charitable confident considerate courageous courteous dedicated
devoted easygoing empathetic fearless fond forgiving generous grateful happy humble jolly jovial kind loving loyal
polite proud respectful responsible supportive talented tolerant trusting trustworthy warm wise kindhearted
abusive aggressive angry antagonistic arrogant bossy cowardly crazy cruel desperate dishonest egotistical envious
fearful greedy grouchy guilty gullible heartless ignorant impatient insecure insensitive jealous mad
moody naive needy neurotic paranoid pessimistic prejudiced rebellious reckless resentful selfish sarcastic snobby
spiteful stubborn sullen suspicious talentless timid troubled uncaring unfriendly ungrateful unkind vindictive wicked
"""
# What people are made to feel.
FEELINGS = """
amazed amused astonished captivated charmed comforted convinced delighted enchanted encouraged engaged enlightened
entertained excited fascinated glad happy honored impressed inspired interested moved pleased reassured relaxed
relieved satisfied thankful thrilled touched
aggravated alarmed angry annoyed appalled ashamed bored bothered cheated confused depressed disappointed discouraged
disgusted dismayed displeased dissatisfied distracted distressed disturbed embarrassed enraged exhausted exploited
fooled frightened frustrated furious horrified humiliated hurt insulted irritated miserable offended perplexed sad
scared shocked sickened tired unhappy unimpressed unsatisfied upset worried
"""
# Base and past form of what people do to things.
VERBS = """
admire admired|adore adored|appreciate appreciated|applaud applauded|celebrate celebrated|cherish cherished|embrace
embraced|enjoy enjoyed|like liked|love loved|praise praised|recommend recommended|support supported|treasure
treasured|trust trusted|welcome welcomed|respect respected|value valued|endorse endorsed|favor favored
avoid avoided|blame blamed|condemn condemned|criticize criticized|despise despised|detest detested|dislike
disliked|distrust distrusted|doubt doubted|dread dreaded|hate hated|ignore ignored|loathe loathed|mock
mocked|neglect neglected|regret regretted|reject rejected|resent resented|ridicule ridiculed|abandon abandoned
"""
# Base and past form of what things do to people.
EFFECTS = """
amaze amazed|amuse amused|astonish astonished|charm charmed|cheer cheered|comfort comforted|convince convinced|delight
delighted|encourage encouraged|engage engaged|enlighten enlightened|entertain entertained|excite excited|fascinate
fascinated|impress impressed|inspire inspired|interest interested|please pleased|reassure reassured|satisfy
satisfied|thrill thrilled|captivate captivated|enchant enchanted|help helped|reward rewarded
aggravate aggravated|anger angered|annoy annoyed|bore bored|bother bothered|cheat cheated|confuse confused|deceive
deceived|depress depressed|disappoint disappointed|discourage discouraged|disgust disgusted|displease
displeased|disturb disturbed|embarrass embarrassed|enrage enraged|exhaust exhausted|fail failed|frighten
frightened|frustrate frustrated|harm harmed|humiliate humiliated|insult insulted|irritate irritated|offend
offended|scare scared|shock shocked|sicken sickened|torture tortured|trouble troubled|worry worried|horrify horrified
"""
# Uncountable nouns, and plurals: what things and people have or lack.
NOUNS = """
ambition beauty brilliance charm charisma class clarity cleverness comfort compassion confidence courage creativity
dignity elegance energy enthusiasm excitement freedom fun glamour glory grace greatness happiness harmony heart honesty
hope humor imagination innovation inspiration integrity intelligence joy kindness laughter love loyalty merit passion
peace pleasure positivity promise romance satisfaction sincerity skill sparkle strength style sweetness
sympathy talent tenderness truth value vitality warmth wisdom wit wonder
anger arrogance bitterness boredom chaos confusion contempt crap cruelty cynicism deceit despair dirt disgust errors
evil failures faults fear flaws frustration gloom greed guilt hate hatred horror hostility ignorance irritation lies
misery mistakes negativity nonsense pain pessimism problems rage ridicule sadness selfishness shame
sorrow stupidity tension terror tragedy trash trouble ugliness violence weaknesses worries
"""
# Adjectives that take "un": the plain word is the lexicon's.
UN = "acceptable ambitious attractive convincing exciting funny helpful impressive inspiring interesting original "
UN += "pleasant successful welcome worthy comfortable fair fortunate friendly happy healthy intelligent kind useful"
COMPARATIVES = "better cooler cuter easier funnier happier kinder nicer safer smarter stronger sweeter wiser "
COMPARATIVES += "lovelier brighter friendlier cleaner calmer braver worse uglier sadder dumber weaker crazier poorer "
COMPARATIVES += "gloomier harsher lamer meaner nastier sicker dirtier weirder angrier lazier bitterer "

SALT = "opinions"
VERDICTS = ("great", "good", "okay", "bad", "terrible")


class Word(NamedTuple):
    """A rated word: its form in plain statements, its base form, mean rating, the list it is in, how often it comes."""

    form: str
    base: str
    rating: float
    group: str
    weight: float = 1.0

    @property
    def polarity(self) -> int:
        """The sign of the rating."""
        return 1 if self.rating > 0 else -1


def read_lexicon(path: Path) -> dict[str, float]:
    """Return the mean rating of each word of a csv file with columns `word` and `mean`."""
    with path.open(encoding="utf8", newline="") as file:
        return {row["word"]: float(row["mean"]) for row in csv.DictReader(file)}


def words_of(lexicon: dict[str, float], least: float = 1.0) -> dict[str, list[Word]]:
    """Return by group the listed words whose rating is at least `least` in size."""
    plain = {"adjective": ADJECTIVES, "personal": PERSONAL, "feeling": FEELINGS, "noun": NOUNS, "un": UN}
    plain["comparative"] = COMPARATIVES
    forms = {group: [(w, w) for w in dict.fromkeys(text.split())] for group, text in plain.items()}
    for group, text in {"verb": VERBS, "effect": EFFECTS}.items():
        halves = text.replace("|", " ").split()
        forms[group] = list(zip(halves[1::2], halves[::2], strict=True))
    return {
        group: [Word(form, base, r, group) for form, base in pairs if abs(r := rating_of(form, base, lexicon)) >= least]
        for group, pairs in forms.items()
    }


def rating_of(form: str, base: str, lexicon: dict[str, float]) -> float:
    """Return the rating of a form or else of its base form; a word that is in no list has none, 0."""
    return lexicon.get(form, lexicon.get(base, 0.0))


def fraction_of(name: str) -> float:
    """Return a number in [0, 1) that is a function of the name."""
    return int(hashlib.sha256(f"{SALT} {name}".encode()).hexdigest()[:12], 16) / 16**12


def held_out_words(words: dict[str, list[Word]], fraction: float) -> set[str]:
    """Return the stems held out: of every group and polarity those with the smallest hashes, then in all groups.

    The verdicts are exempt: the readout shows them on every window.
    """
    out: set[str] = set()
    for group in words.values():
        for sign in (1, -1):
            bases = sorted({stem(w.base) for w in group if w.polarity == sign} - set(VERDICTS), key=fraction_of)
            out |= set(bases[: round(fraction * len(bases))])
    return out


def stem(base: str) -> str:
    """Return what related forms share (amuse, amusing, amused), so that none of them straddles the split."""
    for ending in ("ing", "ed", "ful", "ly", "es", "s", "e", "y", "i"):
        if base.endswith(ending) and len(base) - len(ending) >= 4:
            base = base.removesuffix(ending)
    return base
