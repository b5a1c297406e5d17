"""The patterns of the opinions corpus: pairs of templates with opposite outcomes, by kind."""

from typing import NamedTuple


class Side(NamedTuple):
    """A statement's template, its strength, and whether its outcome is the opposite of the word's sign.

    Slots: S subject, IS / ISNT its verb and contraction, O the subject as an object, N its noun, X the word, V the
    word's base form, Y a second word of the same sign, Z and W words of the opposite sign.
    """

    text: str
    strength: str = "even"  # soft | even | strong
    turns: bool = False


class Pattern(NamedTuple):
    """A kind, the groups of words that fit, and two sides."""

    kind: str
    groups: tuple[str, ...]
    plain: Side
    negated: Side


def patterns() -> list[Pattern]:
    """Return all patterns."""
    return [
        Pattern(kind, groups, *(side(half) for half in line.split("|")))
        for kind, groups, table in TABLES
        for line in table.strip().splitlines()
    ]


def side(text: str) -> Side:
    """Read one side: * in front turns the word's sign, + or ~ at the end makes it strong or soft."""
    text = text.strip()
    strength = {"+": "strong", "~": "soft"}.get(text[-1], "even")
    return Side(text.strip("*+~ "), strength, text.startswith("*"))


THING_GROUPS = ("adjective", "personal")
ADJECTIVE_PAIRS = """
S IS X | *S IS not X
S IS X | *S ISNT X
S IS X | *S IS not X
S IS X | *S ISNT X
S IS always X | *S IS never X
S IS quite X | *S IS hardly X ~
S IS rather X | *S IS barely X ~
S IS very X + | *S IS not very X ~
S IS very X + | *S ISNT very X ~
S IS really X + | *S IS not really X ~
S IS really X + | *S ISNT really X ~
S IS so X + | *S ISNT so X ~
S IS quite X | *S ISNT that X ~
S IS a bit X | *S IS not even a bit X +
S IS pretty X | *S IS far from X +
S IS simply X + | *S IS anything but X +
S IS all X + | *S IS not at all X +
S IS very X + | *S ISNT at all X +
S IS X in every way + | *S IS in no way X +
S IS X all the time | *S ISNT X all the time ~
S IS a X N | *S IS not a X N
S IS a X N | *S ISNT a X N
S IS a very X N + | *S IS not a very X N ~
S IS a really X N + | *S ISNT a really X N ~
S IS just what i would call X | *S IS not what i would call X
S IS exactly what you would call X | *S ISNT what you would call X
S IS X , i tell you | *S IS by no means X +
S IS extremely X + | *S IS not the least bit X +
S IS as X as they say | *S ISNT as X as they say
S IS as X as the first one | *S IS not as X as the first one
S IS as X as we thought | *S IS not nearly as X as we thought
S IS rather X | *S IS not too X ~
S seemed X | *S didn't seem X
S seemed X | *S did not seem X
S turned out X | *S never turned out X
S looked very X + | *S didn't look very X ~
S sounded X | *S didn't sound X at all +
S felt X to us | *S never felt X to us
S seemed to be X | *S didn't seem to be X
S will be X | *S won't be X
S had been X | *S hadn't been X
S had been very X + | *S had not been very X ~
S can be really X | *S can't be really X ~
S IS X and Y + | *S IS neither X nor Y +
S IS both X and Y + | *S ISNT X or Y +
S IS X and also Y + | *S IS not X and not Y +
S IS a truly X N + | *S IS not a truly X N ~
S IS a very X one + | *S IS not a very X one ~
S IS a very X one + | *S ISNT a very X one ~
S IS really very X + | *S IS not really very X ~
S IS such a X N + | *S ISNT such a X N ~
S IS in my view X | *S IS not in my view X
S IS one of the X ones | *S IS not one of the X ones
S IS , to me , X | *S IS not , to me , X
S could be called X | *S could not be called X
S would be very X + | *S would not be very X ~
S IS always very X + | *S IS never very X ~
S IS X | *S IS never X
S IS quite X | *S IS not all that X ~
S IS a X one | *S IS hardly a X one ~
"""
SIMPLE_PAIRS = """
S IS X | *S IS not X
S IS X | *S ISNT X
S IS very X + | *S IS not very X ~
S IS very X + | *S ISNT very X ~
S IS a X N | *S IS not a X N
S IS a very X N + | *S IS not a very X N ~
S IS a very X one + | *S IS not a very X one ~
S IS really X + | *S IS not really X ~
S IS so X + | *S IS not so X ~
S IS X | *S IS never X
"""
BARE_PAIRS = """
X | *not X
very X + | *not very X ~
a X N | *not a X N
a very X N + | *not a very X N ~
really X + | *not really X ~
so X + | *never X
"""
CLAUSE_PAIRS = """
everything about O was X + | *nothing about O was X +
everything about O is X + | *nothing about O is X +
everybody found O X + | *nobody found O X +
everyone thought O was X | *no one thought O was X
all of us thought that S IS X | *none of us thought that S IS X
i think S IS X | *i don't think S IS X
i think that S IS X | *i do not think that S IS X
i thought S IS very X + | *i didn't think S IS very X ~
i would call O X | *i wouldn't call O X
i would call O very X + | *i would not call O very X ~
i would say S IS X | *i wouldn't say S IS X
i must say S IS X | *i can't say S IS X
i found O X | *i didn't find O X
we found O really X + | *we never found O really X ~
there is something X about O | *there is nothing X about O +
there was a lot that was X in O | *there was not one thing that was X in O +
i believe that S IS X | *i don't believe that S IS X
it is true that S IS X | *it is not true that S IS X
it is clear that S IS X | *it isn't the case that S IS X
people say S IS X | *nobody says S IS X
few doubt that S IS X | *few think that S IS X
"""
NOUN_PAIRS = """
S had X | *S had no X
S had a lot of X | *S had not a lot of X
S had some X | *S didn't have any X
S had plenty of X | *S didn't have any X at all +
S had real X | *S never had any X
S IS full of X + | *S IS free of X
there was X in O | *there was no X in O
there was a lot of X in O | *there wasn't a lot of X in O ~
i saw X in O | *i saw no X in O
i found X in O | *i didn't find X in O
with all its X , S IS what you would expect | *without any X , S IS what you would expect
S brought X | *S brought no X
S showed X | *S never showed any X
S IS made of X | *S lacked X
S had more X than the others | *S had less X than the others
S gave us X | *S gave us no X at all +
"""
VERB_PAIRS = """
i X O | *i didn't V O
i X O | *i did not V O
i X O | *i didn't V O
i X O | *i never X O
we X O | *we didn't V O
everybody X O + | *nobody X O +
all of them X O + | *none of them X O +
i really X O + | *i didn't really V O ~
i always X O + | *i have never X O
she X O | *she didn't V O
i V O | *i don't V O
i V O | *i do not V O
they V O | *they don't V O
i must say i X O | *i can't say i X O
i can V O | *i can't V O
we could only V O | *we couldn't V O
i will V O | *i won't V O
most of us X O | *hardly anyone X O ~
i X O very much + | *i didn't V O very much ~
i X O | *i didn't V O at all +
the critics X O | *the critics didn't V O
my friends X O | *not one of my friends X O +
there are reasons to V O | *there is no reason to V O
"""
EFFECT_PAIRS = """
S X me | *S didn't V me
S X us | *S did not V us
S X me | *S never X me
S X everyone + | *S X nobody +
S really X us + | *S didn't really V us ~
S always X me + | *S had never X me
S X me very much + | *S didn't V me very much ~
S X us | *S didn't V us at all +
S can V you | *S can't V you
S will V you | *S won't V anyone +
S would V anyone + | *S wouldn't V anyone +
S X me | *S hardly X me ~
S X the children | *S failed to V the children
"""
FEELING_PAIRS = """
i was X | *i was not X
i was X | *i wasn't X
i was X about O | *i wasn't X about O
i was X with O | *i was not X with O
we were X | *we weren't X
we were very X with O + | *we were not very X with O ~
i am X with O | *i am not X with O
they were X with O | *they weren't X with O
i felt X after O | *i didn't feel X after O
everyone was X + | *nobody was X +
i was really X with O + | *i was never really X with O ~
i was so X + | *i was not at all X +
she was quite X about O | *she was hardly X about O ~
my friends were all X + | *none of my friends were X +
i must say i was X with O | *i can't say i was X with O
people were X | *no one was X
S left me X | *S didn't leave me X
"""
DOUBLE_PAIRS = """
nobody said that S ISNT X | *everybody said that S ISNT X
no one thinks that S IS not X | *some think that S IS not X
i can't say that S ISNT X | *i must say that S ISNT X
it is not true that S ISNT X | *it is true that S ISNT X
i don't think that S IS not X | *i think that S IS not X
i never said that S ISNT X | *i always said that S ISNT X
S IS never not X + | *S IS never X
you can't tell me that S ISNT X | *they will tell you that S ISNT X
i wouldn't say that S IS not X | *i would say that S IS not X
there is no doubt that S IS X + | *there is no way that S IS X +
"""
DOUBLE_NOUN_PAIRS = """
S IS not without X | *S IS without X
S ISNT without its X | *S IS without any X
S did not lack X | *S lacked X
there was no lack of X in O + | *there was a lack of X in O
S IS never without X + | *S IS always without X +
"""
UN_PAIRS = """
S IS not unX | *S IS unX
S ISNT unX | *S IS very unX +
S IS not at all unX | *S IS unX
S IS by no means unX | *S IS quite unX
nobody found O unX | *everybody found O unX +
i wouldn't call O unX | *i would call O unX
"""
BUT_PAIRS = """
S IS Z but X | *S IS X but Z
S IS Z , but also X | *S IS X , but also Z
S IS not Z but X | *S IS not X but Z
S ISNT Z , S IS X | *S ISNT X , S IS Z
S IS Z at first , but then X | *S IS X at first , but then Z
although S IS Z , i found O X | *although S IS X , i found O Z
i expected O to be Z , but S IS X | *i expected O to be X , but S IS Z
S looked Z , but S IS X | *S looked X , but S IS not X
people call O Z , but S IS X | *people call O X , but S ISNT X
S IS a bit Z , but very X + | *S IS a bit X , but very Z +
they said S IS X , and S IS | *they said S IS X , but S ISNT
S IS X , not Z | *S IS Z , not X
S IS X and not Z at all + | *S IS Z and not X at all +
i thought S IS Z , but S ISNT | *i thought S IS X , but S ISNT
"""
BOTH_PAIRS = """
S IS not only X but Y + | *S IS not only Z but W +
S IS not just X , S IS Y + | *S IS not just Z , S IS W +
S IS not merely X but also Y + | *S IS not merely Z but also W +
i have never seen a more X N + | *i have never seen a less X N +
nothing could be more X than O + | *nothing could be less X than O +
S could not be more X + | *S could not be less X +
S couldn't be more X + | *S couldn't be less X +
S never failed to be X + | *S always failed to be X +
nobody can deny that S IS X | *nobody can claim that S IS X
no other N is as X as this one + | *any other N is as X as this one ~
"""
MIXED_PAIRS = """
S IS neither X nor Z | S IS neither Z nor X
S ISNT X , but S ISNT Z either | S ISNT Z , but S ISNT X either
S IS a bit X and a bit Z | S IS a bit Z and a bit X
some of it IS X , some of it IS Z | some of it IS Z , some of it IS X
i don't think S IS X , but i don't think S IS Z | i don't think S IS Z , but i don't think S IS X
S IS not really X and not really Z | S IS not really Z and not really X
"""
MORE_PAIRS = """
S IS more X than i thought | *S IS less X than i thought
S IS more X than the other one | *S IS not more X than the other one
S IS much more X than the last one + | *S IS much less X than the last one
S IS as X as the last one | *S IS nowhere near as X as the last one
S IS the most X N i know + | *S IS the least X N i know +
S IS every bit as X as i was told | *S IS not half as X as i was told
"""
COMPARATIVE_PAIRS = """
S IS X than the other one | *S IS not X than the other one
S IS X than before | *S IS no X than before
S IS much X than i thought + | *S ISNT any X than i thought
S IS X than the first one | *S ISNT X than the first one
S IS X than most | *S IS never X than most
nothing is X than O + | *anything would be X than O +
O could not be X + | *O could easily be X ~
S got X | *S didn't get X
S got much X with time + | *S never got X with time
"""

TABLES = (
    ("simple", THING_GROUPS, SIMPLE_PAIRS),
    ("bare", THING_GROUPS, BARE_PAIRS),
    ("adjective", THING_GROUPS, ADJECTIVE_PAIRS),
    ("clause", THING_GROUPS, CLAUSE_PAIRS),
    ("noun", ("noun",), NOUN_PAIRS),
    ("verb", ("verb",), VERB_PAIRS),
    ("effect", ("effect",), EFFECT_PAIRS),
    ("feeling", ("feeling",), FEELING_PAIRS),
    ("double", THING_GROUPS, DOUBLE_PAIRS),
    ("double noun", ("noun",), DOUBLE_NOUN_PAIRS),
    ("un", ("un",), UN_PAIRS),
    ("but", THING_GROUPS, BUT_PAIRS),
    ("both", THING_GROUPS, BOTH_PAIRS),
    ("mixed", THING_GROUPS, MIXED_PAIRS),
    ("more", THING_GROUPS, MORE_PAIRS),
    ("comparative", ("comparative",), COMPARATIVE_PAIRS),
)
# What share of the corpus each kind has.
SHARES = {"simple": 0.24, "bare": 0.04, "adjective": 0.22, "clause": 0.11, "noun": 0.09, "verb": 0.07, "effect": 0.06}
SHARES |= {"feeling": 0.03, "double": 0.03, "double noun": 0.01, "un": 0.01, "but": 0.03, "both": 0.02, "mixed": 0.01}
SHARES |= {"more": 0.02, "comparative": 0.01}
